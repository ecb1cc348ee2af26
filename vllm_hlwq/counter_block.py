"""The counters of all layers of a rank in one tensor, and its reading while steps run.

On CUDA the planner kernels count in device memory, and a reading can fall between the counts of two layers, or in the
middle of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .expert_cache import COUNTERS, SlotState
from .side_reader import SideReader


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
        self._reader = SideReader(counters)

    def read(self) -> list[list[int]]:
        """The counters of each layer; waits for no step."""
        return self._reader.read().tolist()
