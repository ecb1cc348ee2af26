"""The counters of all layers of a rank in one tensor, and its reading while steps run.

On CUDA the planner kernels count in device memory. A reader copies the tensor on a stream of its own into page-locked
memory and polls an event: the stream that computes is never waited for, and the host thread that enqueues steps is left
alone but for the copy's launch. A reading can fall between the counts of two layers, or in the middle of a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .expert_cache import COUNTERS, SlotState

_POLL_SECONDS = 0.0005


class CounterBlock:
    """The counters of several layers, int64 [layers, len(COUNTERS)].

    Args:
        tables: each layer's slot table, whose counters move here; None for a layer that counts nothing, which has
            zeros. On CUDA before anything is captured, for a graph keeps addresses.
    """

    def __init__(self, tables: Sequence[SlotState | None]) -> None:
        counting = [table for table in tables if table is not None]
        device = counting[0].counters.device if counting else torch.device("cpu")
        self.counters = torch.zeros(len(tables), len(COUNTERS), dtype=torch.int64, device=device)
        for table, row in zip(tables, self.counters, strict=True):
            if table is not None:
                table.count_in(row)

    def reader(self) -> CounterReader:
        """A reader for one thread; on CUDA waits for the device once, so that a reset is seen from the start."""
        return CounterReader(self.counters)


class CounterReader:
    """Reads counters from a thread that is not the one that runs steps."""

    def __init__(self, counters: torch.Tensor) -> None:
        self._counters = counters
        self._on_device = counters.device.type == "cuda"
        if self._on_device:
            torch.cuda.synchronize(counters.device)
            self._stream = torch.cuda.Stream(counters.device)  # type: ignore[no-untyped-call]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._host = torch.empty(counters.shape, dtype=counters.dtype, pin_memory=True)

    def read(self) -> list[list[int]]:
        """The counters of each layer; waits for no step."""
        if not self._on_device:
            return self._counters.tolist()
        # A thread begins on device 0, which another rank may own.
        with torch.cuda.device(self._counters.device), torch.cuda.stream(self._stream):
            self._host.copy_(self._counters, non_blocking=True)
            self._copied.record()
            while not self._copied.query():  # type: ignore[no-untyped-call]
                time.sleep(_POLL_SECONDS)
        return self._host.tolist()
