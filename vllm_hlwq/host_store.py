"""Expert weights in host memory: one region a layer, one contiguous record an expert.

A record holds all of an expert's weight fields one after the other, each 16-byte aligned, in the layout that the
compute backend reads, so that loading an expert is a plain copy. The loader writes checkpoint tensors straight into
the records, so that the experts exist in host memory once. ``pinned_memory`` maps and page-locks the region.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from .cudart import CudaError, CudaRuntime, PageLocker
from .errors import ExpertCacheError
from .pinned_memory import HostRegion, device_numa_node, logger

FIELD_ALIGNMENT = 16
"""Bytes. The widest load of a GPU thread; also divides evenly by every dtype's size."""


@dataclass(frozen=True)
class Field:
    """One weight field of an expert: its shape without the expert dimension, its dtype, its offset in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class RecordLayout(Mapping[str, Field]):
    """The fields of an expert's record by name, in order, and the record's size."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Lay fields out one after the other.

        Args:
            shapes: for each field the shape of one expert's part and its dtype.
        """
        self._fields: dict[str, Field] = {}
        offset = 0
        for name, (shape, dtype) in shapes.items():
            field = Field(tuple(shape), dtype, offset)
            self._fields[name] = field
            offset += -(-field.nbytes // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
        self.record_bytes = offset

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def views(self, records: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields of records, as strided views ``[n, *shape]`` of uint8 ``[n, record_bytes]``."""
        return {
            name: records[:, field.offset : field.offset + field.nbytes]
            .view(field.dtype)
            .view(len(records), *field.shape)
            for name, field in self._fields.items()
        }

    def key(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """Hashable identity: layers with equal keys can share a staging bank."""
        return tuple((name, field.shape, field.dtype) for name, field in self._fields.items())


class HostStore:
    """All experts of one layer as ``num_experts`` records in host memory.

    The memory is zero until written, and returned to the system when the last tensor over it is gone.

    Attributes:
        records: uint8 ``[num_experts, record_bytes]``.
        converted: whether the records are what the kernels read, and need no conversion though the format has one.
    """

    converted = False

    def __init__(self, num_experts: int, layout: RecordLayout, device: torch.device | None = None) -> None:
        """Map ``num_experts * layout.record_bytes`` bytes.

        Args:
            num_experts: records.
            layout: what a record holds.
            device: the device that will read the store; of a CUDA device the nearest host memory is preferred.

        Raises:
            ExpertCacheError: the system refuses the mapping.
        """
        self.num_experts = num_experts
        self.layout = layout
        self.nbytes = num_experts * layout.record_bytes
        self.device_address: int | None = None
        self._locking: Future[None] | None = None
        try:
            self._region = HostRegion(self.nbytes, None if device is None else nearest_numa_node(device))
        except (OSError, ValueError) as error:
            raise ExpertCacheError(
                f"host memory for {num_experts} experts ({self.nbytes} bytes) could not be mapped: {error}; "
                "free memory or serve a smaller model"
            ) from None
        self.records = torch.frombuffer(self._region.buffer, dtype=torch.uint8).view(num_experts, layout.record_bytes)

    @property
    def address(self) -> int:
        """Address of the first record on the host."""
        return self._region.address

    @property
    def memory(self) -> memoryview:
        """All records as bytes."""
        return memoryview(self._region.buffer)

    def field(self, name: str) -> torch.Tensor:
        """View of one field of all experts, ``[num_experts, *shape]``; the expert dimension is strided."""
        return self.layout.views(self.records)[name]

    def relabel(self, layout: RecordLayout) -> None:
        """Take the records for records of another layout of the same size, once they have been rewritten."""
        if layout.record_bytes != self.layout.record_bytes:
            raise ValueError(f"records of {self.layout.record_bytes} bytes cannot hold {layout.record_bytes}")
        self.layout = layout

    def page_lock_on(self, executor: Executor, runtime: PageLocker | None, device: torch.device) -> None:
        """Begin to make the pages and lock them on a thread of ``executor``; ``page_lock`` then waits for it.

        Making pages takes as long as copying as many bytes, and a loader that comes later finds them there. It is done
        first because CUDA works on nothing else while it locks.

        Args:
            executor: its threads lock.
            runtime: by default the CUDA runtime of this process.
            device: whose context the threads use.
        """
        self._locking = executor.submit(self._populate_and_lock, runtime, device)

    def page_lock(self, runtime: PageLocker | None = None) -> None:
        """Register the region with CUDA until the store is gone or the process exits.

        Copies from it then run asynchronously at full link speed, and kernels read it at ``device_address``, which
        stays as it is for the store's life. A store that is page-locked already stays so: CUDA refuses to lock memory
        twice.

        Args:
            runtime: by default the CUDA runtime of this process.

        Raises:
            ExpertCacheError: the driver refuses, mostly because of a limit on locked memory.
        """
        if self._locking is None:
            self._page_lock(runtime)
        else:
            self._locking.result()

    def _populate_and_lock(self, runtime: PageLocker | None, device: torch.device) -> None:
        self._region.populate()
        # A thread that has never chosen a device would make a context on the first one.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._page_lock(runtime)

    def _page_lock(self, runtime: PageLocker | None) -> None:
        if self.device_address is None:
            self.device_address = self._region.page_lock(CudaRuntime() if runtime is None else runtime)


def nearest_numa_node(device: torch.device) -> int | None:
    """NUMA node that a CUDA device is attached to; None for other devices and where it cannot be told."""
    if device.type != "cuda":
        return None
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        return device_numa_node(CudaRuntime().pci_id(index))
    except CudaError as error:
        logger.debug("Expert cache: NUMA node of %s is not known: %s", device, error)
        return None
