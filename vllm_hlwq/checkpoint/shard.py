"""Lays out one safetensors file and streams tensors into it.

safetensors has no writer that streams, and a shard at a time in memory would break the bound on memory for a model
whose largest tensor exceeds it; files are read back through the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .hashes import byte_view, describe
from .tensor_folder import DTYPE_NAMES


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that are produced together, from one parameter; a group is never split between shards."""

    parameter: str
    tensors: tuple[TensorPlan, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


Produce = Callable[[Group], Iterator[tuple[str, torch.Tensor]]]
"""Yields the bytes of a group's tensors, piece by piece; the pieces of one tensor in order."""


def shards_of(groups: list[Group], limit: int) -> list[list[Group]]:
    """Deal groups to shards in order, opening a new one when the next group would exceed the limit."""
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.bytes
    return shards


def shard_name(index: int, count: int) -> str:
    """File name of a shard, counted from 0."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def shard_index(shards: list[list[Group]]) -> dict[str, Any]:
    """Contents of ``model.safetensors.index.json``."""
    weight_map = {
        tensor.name: shard_name(index, len(shards))
        for index, groups in enumerate(shards)
        for group in groups
        for tensor in group.tensors
    }
    return {"metadata": {"total_size": sum(g.bytes for s in shards for g in s)}, "weight_map": weight_map}


def shard_layout(plans: list[TensorPlan]) -> tuple[bytes, dict[str, int], int]:
    """Lay out a safetensors file.

    Returns:
        The bytes before the data, each tensor's offset in the file, ascending, and the size of the file. Wide dtypes
        come first, so that every tensor is aligned to its own size.
    """
    offsets, end = {}, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for plan in sorted(plans, key=lambda plan: (-plan.dtype.itemsize, plan.name)):
        offsets[plan.name] = end
        header[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [end, end + plan.bytes],
        }
        end += plan.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}, len(head) + end


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(path: Path, groups: list[Group], produce: Produce) -> dict[str, Any]:
    """Write a safetensors file piece by piece, under its name only when it is whole and on the disk.

    Args:
        path: the file.
        groups: its tensors.
        produce: makes a group's tensors.

    Returns:
        The entries of the hash list, by tensor.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    plans = [tensor for group in groups for tensor in group.tensors]
    head, offsets, size = shard_layout(plans)
    by_name = {plan.name: plan for plan in plans}
    written = dict.fromkeys(by_name, 0)
    digests = {name: hashlib.sha256() for name in by_name}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is noticed before the work is done
            file.write(head)
            file.flush()
            for group in groups:
                for name, piece in produce(group):
                    if piece.dtype != by_name[name].dtype:
                        raise RuntimeError(f"{name}: produced as {piece.dtype}, planned as {by_name[name].dtype}")
                    data = byte_view(piece)
                    digests[name].update(data)
                    _write_at(file.fileno(), data, offsets[name] + written[name])
                    written[name] += len(data)
            short = next((name for name, plan in by_name.items() if written[name] != plan.bytes), None)
            if short is not None:
                raise RuntimeError(f"{short}: {written[short]} of {by_name[short].bytes} bytes were produced")
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return {n: describe(p.dtype, p.shape, digests[n].hexdigest()) for n, p in by_name.items()}


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
