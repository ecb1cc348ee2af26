"""Experts of a layer that are copied before its router has spoken: which they are, and their way over the link.

Copy engines carry them, because the kernels that compute meanwhile fill the GPU: a kernel that copies would take
multiprocessors from Marlin, whose blocks expect all of them, and both would run one after the other. A copy engine is
told by the host what to copy, so the host reads the slot tables once in a forward pass: one wait a pass, none a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from .cudart import CudaRuntime
from .host_store import HostStore
from .weight_bank import WeightBank

if TYPE_CHECKING:
    from .device_expert_cache import DeviceExpertCache


class SlotSnapshot:
    """The slot tables of layers as they were at a point of a forward pass, for the host.

    Its memory is taken once: page-locked memory that is given back while a graph is captured, would leave torch with an
    event of the capture to ask, which CUDA refuses.
    """

    def __init__(self, layers: Sequence[DeviceExpertCache]) -> None:
        """Take memory for the tables of some layers, each of which has one; nothing is read yet."""
        self._layers = {id(layer): place for place, layer in enumerate(layers)}
        self._tables = [layer.table.slot_of_expert for layer in layers if layer.table is not None]
        experts = [layer.num_experts for layer in layers]
        device, dtype = self._tables[0].device, self._tables[0].dtype
        self._host = torch.empty(sum(experts), dtype=dtype, pin_memory=device.type == "cuda")
        self._rows = torch.split(self._host, experts)
        self._arrived: Any = torch.get_device_module(device).Event()

    def read(self) -> None:
        """Enqueue the copy to the host; what it says of a layer holds until that layer is planned."""
        self._host.copy_(torch.cat(self._tables), non_blocking=True)
        self._arrived.record()

    def experts_to_prefetch(self, layer: DeviceExpertCache, rows: int) -> list[int]:
        """The experts that ``plan_kernel.prefetch`` names for a layer; waits until what was read is there.

        Args:
            layer: one of those read, not yet planned since.
            rows: experts of a staging bank.
        """
        self._arrived.synchronize()
        slots = self._rows[self._layers[id(layer)]].tolist()
        absent = [expert for expert, slot in enumerate(slots) if slot < 0]
        return absent[:rows] if len(absent) == layer.num_experts - layer.num_slots else []


def copy_records(store: HostStore, experts: list[int], bank: WeightBank, stream: Any) -> None:
    """Enqueue the copy of experts into rows 0, 1, 2 ... of a bank.

    Args:
        store: where the records are; page-locked if the bank is on a CUDA device.
        experts: ascending.
        bank: of the same layout.
        stream: of CUDA; another device's is not asked, and the copy is done on return.
    """
    row = 0
    for first, end in runs(experts):
        for name, field in store.layout.items():
            target = bank.fields[name][row : row + end - first]
            if not target.is_cuda:
                target.copy_(store.field(name)[first:end])
                continue
            CudaRuntime.loaded().copy_rows_to_device(
                target.data_ptr(), field.nbytes,
                store.address + first * store.layout.record_bytes + field.offset, store.layout.record_bytes,
                field.nbytes, end - first, stream.cuda_stream,
            )  # fmt: skip
        row += end - first


def runs(experts: list[int]) -> Iterator[tuple[int, int]]:
    """Stretches of successive numbers in an ascending list, as (first, end)."""
    if not experts:
        return
    borders = [i + 1 for i, (a, b) in enumerate(pairwise(experts)) if b != a + 1]
    for start, end in pairwise([0, *borders, len(experts)]):
        yield experts[start], experts[end - 1] + 1
