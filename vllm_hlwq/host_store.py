"""Expert weights in host memory: one region a layer, one contiguous record an expert.

A record holds all of an expert's weight fields one after the other, each 16-byte aligned, in the layout that the
compute backend reads, so that loading an expert is a plain copy. The region is an anonymous mapping of exactly the
bytes needed: torch's pinned allocator would round it up to a power of two. The loader writes checkpoint tensors
straight into the records, so that the experts exist in host memory once.
"""

from __future__ import annotations

import math
import mmap
import resource
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ExpertCacheError

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

    def key(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """Hashable identity: layers with equal keys can share a staging bank."""
        return tuple((name, field.shape, field.dtype) for name, field in self._fields.items())


class HostStore:
    """All experts of one layer as ``num_experts`` records in host memory.

    The memory is zero until written, and returned to the system when the last tensor over it is gone.
    """

    def __init__(self, num_experts: int, layout: RecordLayout) -> None:
        """Map ``num_experts * layout.record_bytes`` bytes.

        Raises:
            ExpertCacheError: the system refuses the mapping.
        """
        self.num_experts = num_experts
        self.layout = layout
        self.nbytes = num_experts * layout.record_bytes
        try:
            region = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise ExpertCacheError(
                f"host memory for {num_experts} experts ({self.nbytes} bytes) could not be mapped: {error}; "
                "free memory or serve a smaller model"
            ) from None
        self._bytes = torch.frombuffer(region, dtype=torch.uint8).view(num_experts, layout.record_bytes)

    def field(self, name: str) -> torch.Tensor:
        """View of one field of all experts, ``[num_experts, *shape]``; the expert dimension is strided."""
        field = self.layout[name]
        part = self._bytes[:, field.offset : field.offset + field.nbytes].view(field.dtype)
        return part.view(self.num_experts, *field.shape)

    def page_lock(self) -> None:
        """Register the region with CUDA, so that copies from it run asynchronously at full link speed.

        Raises:
            ExpertCacheError: the driver refuses, mostly because of a limit on locked memory.
        """
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self._bytes.data_ptr()
        portable_and_mapped = 0x1 | 0x2
        status = int(cudart.cudaHostRegister(address, self.nbytes, portable_and_mapped))
        if status != 0:
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
            raise ExpertCacheError(
                f"page-locking {self.nbytes} bytes of expert weights was refused (CUDA error {status}; "
                f"ulimit -l is {limit}); raise the locked-memory limit or free host memory"
            )
        weakref.finalize(self, cudart.cudaHostUnregister, address)
