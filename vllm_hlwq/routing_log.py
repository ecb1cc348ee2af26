"""What has been recorded of a trace so far, in host memory: bounded, and readable while it grows.

Where ids are read on the host, layers append here themselves; ``routing_ring.py`` is the way of a device's ids here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .trace import Array, Header, Trace, TraceLayer, id_dtype

MAX_TRACE_BYTES = 256 * 2**20
"""Where a recording ends: with 48 layers of 8 of 128 experts after 310,000 tokens decoded one by one, or after 690,000
of prompts."""

ENTRY_BYTES = 10
"""Of the file's step, layer and tokens; the ids come on top."""


@dataclass(frozen=True)
class Chunk:
    """Successive entries: int32 ``[n, 2]``, layer and tokens of each, and their expert ids in a trace's dtype."""

    entries: Array
    expert_ids: Array

    @property
    def nbytes(self) -> int:
        """What it takes in a file."""
        return int(len(self.entries) * ENTRY_BYTES + self.expert_ids.nbytes)


class RoutingLog:
    """Chunks of a recording in the order of time."""

    def __init__(self, layers: Sequence[TraceLayer], max_bytes: int = MAX_TRACE_BYTES) -> None:
        self._dtype, self._no_expert = id_dtype(layers)
        self._max_bytes = max_bytes
        self._chunks: list[Chunk] = []
        self.nbytes = 0

    def add(self, chunk: Chunk) -> bool:
        """Append a chunk; False, and nothing is appended, if the trace would exceed its largest size."""
        if self.nbytes + chunk.nbytes > self._max_bytes:
            return False
        if len(chunk.entries):
            self._chunks.append(chunk)
            self.nbytes += chunk.nbytes
        return True

    def add_step(self, layer: int, expert_ids: torch.Tensor) -> bool:
        """Append what a layer is asked for: ids ``[tokens, k]`` on any device, below 0 where there is none."""
        ids = expert_ids.cpu().numpy()
        entry = np.array([[layer, len(ids)]], dtype=np.int32)
        return self.add(Chunk(entry, np.where(ids < 0, self._no_expert, ids).astype(self._dtype).ravel()))

    def trace(self, header: Header) -> Trace:
        """All chunks so far as a trace; safe in another thread while chunks are appended."""
        chunks = list(self._chunks)
        entries = [np.zeros((0, 2), np.int32), *(chunk.entries for chunk in chunks)]
        ids = [np.zeros(0, self._dtype), *(chunk.expert_ids for chunk in chunks)]
        return Trace.of_entries(header, np.concatenate(entries), np.concatenate(ids))
