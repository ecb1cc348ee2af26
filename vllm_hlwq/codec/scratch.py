"""Working memory that is taken once and used for every chunk.

Fresh memory costs more than the arithmetic here: the kernel clears each page of a large allocation at its first touch,
which took 12 ms where converting the same codes took 1 ms.
"""

from __future__ import annotations

import math

import torch

MOST_VIEWS = 128
"""Shapes differ by the few widths of a model's matrices."""


class Scratch:
    """Named buffers on one device; a name's buffer grows to the largest request and is never cleared."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, torch.Tensor] = {}
        # Slicing and viewing are operations like any other, at which threads wait for Python's lock.
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; it shares memory with earlier ones of the same name, whatever their dtype."""
        key = (name, tuple(shape), dtype)
        view = self._views.get(key)
        if view is None:
            with torch.inference_mode(False):  # what is made in it can be written to nowhere else
                view = self._buffer(name, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
            self._views[key] = view
        return view

    def _buffer(self, name: str, size: int) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if len(self._views) >= MOST_VIEWS or buffer is None or len(buffer) < size:
            self._views.clear()
        if buffer is None or len(buffer) < size:
            # The old buffer goes first: both would be there at once.
            self._buffers.pop(name, None)
            del buffer
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return buffer[:size]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
