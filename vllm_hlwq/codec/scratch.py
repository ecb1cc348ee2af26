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
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; it shares memory with earlier ones of the same name, whatever their dtype."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            # The old buffer goes first: both would be there at once.
            self._buffers.pop(name, None)
            del buffer
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return buffer[:size].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
