"""Working memory that is taken once and used for every chunk.

Fresh memory costs more than the arithmetic here: the kernel clears each page of a large allocation at its first touch,
which took 12 ms where converting the same codes took 1 ms.
"""

from __future__ import annotations

import math

import torch


class Scratch:
    """Named buffers on one device; a name's buffer grows to the largest request and is never cleared."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; it shares memory with earlier ones of the same name and dtype."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < count:
            buffer = torch.empty(count, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:count].view(shape)
