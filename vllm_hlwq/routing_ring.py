"""How routing that only the device knows gets into a trace: a ring in device memory, filled inside of the steps.

Each layer's step appends its ids by one launch, at fixed addresses, so that it can be captured in a CUDA graph. What is
new is copied to the host in the order of the stream: the first copy says how far the ring is written, the next one
fetches that much. Nobody waits; what is not yet there is fetched after a later step.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .errors import TraceError
from .routing_log import Chunk
from .trace import Array, TraceLayer, id_dtype

PASSES = 8
"""Forward passes of the largest size that the ring holds. Up to four are under way when steps are scheduled ahead."""

MIN_IDS = 2**20
MIN_ENTRIES = 2**14

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit(
    # As with the planner: no value or alignment may ask for a compilation while a graph is captured.
    do_not_specialize=["expert_ids", "layer", "tokens"],
    do_not_specialize_on_alignment=["expert_ids"],
)
def append_kernel(
    expert_ids, layer, tokens, ring_entries, ring_ids, written,
    K: tl.constexpr, NO_EXPERT: tl.constexpr, ENTRIES: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append one step of a layer; one program."""
    entry = tl.load(written)
    first = tl.load(written + 1)
    count = tokens * K
    offset = (first % IDS).to(tl.int32)
    for start in range(0, count, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < tl.minimum(count, IDS)  # what exceeds the ring is seen by the count
        expert = tl.load(expert_ids + position, mask=inside, other=-1)
        value = tl.where(expert < 0, NO_EXPERT, expert).to(ring_ids.dtype.element_ty)
        place = offset + position
        tl.store(ring_ids + tl.where(place < IDS, place, place - IDS), value, mask=inside)
    tl.store(ring_entries + entry % ENTRIES * 2, layer)
    tl.store(ring_entries + entry % ENTRIES * 2 + 1, tokens)
    tl.debug_barrier()  # every thread has read what is overwritten here
    tl.store(written, entry + 1)
    tl.store(written + 1, first + count)


class RingOverrunError(TraceError):
    """Entries were overwritten before they were read."""


class RoutingRing:
    """The latest steps of an engine's layers in device memory.

    All methods belong to the thread and stream on which the layers run.
    """

    def __init__(
        self,
        layers: Sequence[TraceLayer],
        max_tokens: int,
        device: torch.device | str,
        capacity: tuple[int, int] | None = None,
    ) -> None:
        """Make an empty ring and compile its kernel.

        Args:
            layers: of the trace.
            max_tokens: rows of the largest step.
            device: where the layers' ids are.
            capacity: entries and ids that it holds; by default ``PASSES`` of the largest forward passes.
        """
        dtype, self._no_expert = id_dtype(layers)
        ids_of_a_pass = sum(layer.top_k for layer in layers) * max_tokens
        self._capacity = capacity or (
            max(MIN_ENTRIES, PASSES * len(layers)), max(MIN_IDS, PASSES * ids_of_a_pass)
        )  # fmt: skip
        cuda = torch.device(device).type == "cuda"

        def zeros(shape: tuple[int, ...], of: torch.dtype, pinned: bool = False) -> torch.Tensor:
            return torch.zeros(shape, dtype=of, **({"pin_memory": cuda} if pinned else {"device": device}))

        entries, ids = self._capacity
        id_type = torch.from_numpy(np.zeros(1, dtype)).dtype
        self._ring = (zeros((entries, 2), torch.int32), zeros((ids,), id_type))
        self._host = (zeros((entries, 2), torch.int32, True), zeros((ids,), id_type, True))
        self._written, self._host_written = zeros((2,), torch.int64), zeros((2,), torch.int64, True)
        self._copied: Any = torch.get_device_module(device).Event()
        for top_k in {layer.top_k for layer in layers}:
            self.append(0, torch.full((1, top_k), -1, dtype=torch.int32, device=device))
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes on the device; as many are page-locked on the host."""
        return sum(tensor.nbytes for tensor in (*self._ring, self._written))

    def append(self, layer: int, expert_ids: torch.Tensor) -> None:
        """Enqueue the recording of a step.

        Args:
            layer: index of the layer.
            expert_ids: int32 ``[tokens, k]`` on the ring's device, contiguous; below 0 where there is no expert.
        """
        append_kernel[(1,)](
            expert_ids, layer, expert_ids.shape[0], *self._ring, self._written,
            K=expert_ids.shape[1], NO_EXPERT=self._no_expert, ENTRIES=self._capacity[0], IDS=self._capacity[1],
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip

    def reset(self) -> None:
        """Forget everything, also what is under way; only enqueues."""
        self._written.zero_()
        self._fetched = self._fetching = self._known = (0, 0)
        self._enqueue_copy()

    def poll(self) -> Chunk | None:
        """Take what has arrived since the last call and ask for more; None if that has not arrived yet. Never waits.

        Raises:
            RingOverrunError: a part of it was overwritten; call ``reset`` before any other method.
        """
        if not self._copied.query():
            return None
        chunk = self._arrived()
        self._enqueue_copy()
        return chunk

    def drain(self) -> Iterator[Chunk]:
        """All that has been appended; waits for the device.

        Raises:
            RingOverrunError: a part of it was overwritten.
        """
        # What is under way; what it says is there, as far as known; the rest.
        for _ in range(3):
            self._copied.synchronize()
            yield self._arrived()
            self._enqueue_copy()

    def _arrived(self) -> Chunk:
        """What the latest copy brought, once it is done."""
        written = self._host_written.tolist()
        if any(end - start > size for end, start, size in zip(written, self._fetched, self._capacity, strict=True)):
            raise RingOverrunError(
                f"{written[0] - self._fetched[0]} steps of layers came before the first of them was read; the ring "
                f"holds {self._capacity[0]} with {self._capacity[1]} expert ids"
            )
        arrays: list[Array] = [
            host[: end - start].numpy().copy()
            for host, start, end in zip(self._host, self._fetched, self._fetching, strict=True)
        ]
        self._fetched, self._known = self._fetching, (written[0], written[1])
        return Chunk(*arrays)

    def _enqueue_copy(self) -> None:
        """Ask for what is known to be written, and for how far the ring is written by now.

        In this order on one stream: that nothing was overwritten before it was copied is then seen by the latter.
        """
        for ring, host, start, end, size in zip(
            self._ring, self._host, self._fetched, self._known, self._capacity, strict=True
        ):
            first = min(end - start, size - start % size)
            host[:first].copy_(ring[start % size : start % size + first], non_blocking=True)
            host[first : end - start].copy_(ring[: end - start - first], non_blocking=True)
        self._host_written.copy_(self._written, non_blocking=True)
        self._fetching = self._known
        self._copied.record()
