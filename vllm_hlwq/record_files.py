"""One layer's records in a file: written from and read into host memory as they are, in blocks, on several threads.

    magic, 16 bytes | length and CRC-32 of the header, 8 bytes each | header, JSON | zeros up to 4096 * n | records

The header holds the key of what the records were made of, their layout, and a CRC-32 for each block of records. Blocks
are checked by the thread that has read them, while the next ones are read. The file is not mapped: what CUDA page-locks
should be anonymous memory (huge pages, near the GPU), and a check reads every byte anyway.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .atomic_file import replacing
from .host_store import HostStore, RecordLayout

MAGIC = b"vllm-hlwq-expert"
PREFIX_BYTES = len(MAGIC) + 16
ALIGNMENT = 4096
BLOCK_BYTES = 16 * 2**20
THREADS = min(8, os.cpu_count() or 1)
"""A CRC-32 takes about as long as a fast disk needs for two blocks; eight threads keep up with any."""

Progress = Callable[[int], None]


class RecordFileError(ValueError):
    """A file that does not hold the records that are asked for; the message says why."""


def write_records(path: Path, key: dict[str, Any], store: HostStore, progress: Progress) -> None:
    """Write a layer's records, under the file's name only when they are whole and on the disk.

    Args:
        path: the file; its folder is there.
        key: JSON values.
        store: the records.
        progress: called with bytes that are written, by this thread.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    blocks = _blocks(store.nbytes)
    header = {
        "key": key,
        "fields": described(store.layout),
        "experts": store.num_experts,
        "record_bytes": store.layout.record_bytes,
        "block_bytes": BLOCK_BYTES,
        "checksums": ["0" * 8] * len(blocks),
    }
    start = len(_encoded(header))
    memory = store.memory

    with replacing(path) as file:

        def write(block: slice) -> str:
            _write_all(file, memory[block], start + block.start)
            return f"{zlib.crc32(memory[block]):08x}"

        header["checksums"] = list(_on_threads(write, blocks, progress))
        _write_all(file, memoryview(_encoded(header)), 0)


def read_records(
    path: Path, key: dict[str, Any], num_experts: int, device: torch.device | None, progress: Progress
) -> HostStore:
    """Read a layer's records into new host memory, each byte once, and check them.

    Args:
        path: the file.
        key: what the records must have been made of.
        num_experts: how many there must be.
        device: that will read the store.
        progress: called with bytes that are read, by this thread.

    Raises:
        FileNotFoundError: there is no file.
        RecordFileError: it is damaged, cut off, or of something else.
        OSError: it cannot be read.
        ExpertCacheError: there is no host memory for it.
    """
    with _opened(path) as file:
        header, start = _header(file)
        if header["key"] != key:
            raise RecordFileError(f"made of something else: {_difference(header['key'], key)}")
        layout = RecordLayout({name: (tuple(shape), getattr(torch, dtype)) for name, shape, dtype in header["fields"]})
        needed = start + num_experts * layout.record_bytes
        size = os.fstat(file).st_size
        if size != needed or header["experts"] != num_experts:
            raise RecordFileError(f"cut off or too long: {size} bytes in place of {needed}")
        store = HostStore(num_experts, layout, device)
        checksums = header["checksums"]
        memory = store.memory
        progress(start)

        def read(block: slice) -> None:
            _read_all(file, memory[block], start + block.start)
            if f"{zlib.crc32(memory[block]):08x}" != checksums[block.start // BLOCK_BYTES]:
                raise RecordFileError(f"damaged: checksum of bytes {start + block.start} to {start + block.stop}")

        for _ in _on_threads(read, _blocks(store.nbytes), progress):
            pass
    store.converted = True
    return store


def described(layout: RecordLayout) -> list[list[Any]]:
    """A layout as JSON values: name, shape and torch's name of the dtype of each field."""
    return [[name, list(field.shape), str(field.dtype).removeprefix("torch.")] for name, field in layout.items()]


def _blocks(nbytes: int) -> list[slice]:
    return [slice(begin, min(begin + BLOCK_BYTES, nbytes)) for begin in range(0, nbytes, BLOCK_BYTES)]


def _on_threads(work: Callable[[slice], Any], blocks: list[slice], progress: Progress) -> Iterator[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for block, done in zip(blocks, pool.map(work, blocks), strict=True):
                progress(block.stop - block.start)
                yield done
        finally:
            pool.shutdown(cancel_futures=True)


def _encoded(header: dict[str, Any]) -> bytes:
    """Everything before the records; of the same size whatever the checksums are."""
    text = json.dumps(header).encode()
    prefix = MAGIC + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(8, "little")
    padding = -(len(prefix) + len(text)) % ALIGNMENT
    return prefix + text + bytes(padding)


def _header(file: int) -> tuple[dict[str, Any], int]:
    """A file's header, and where its records start."""
    prefix = os.pread(file, PREFIX_BYTES, 0)
    if len(prefix) < PREFIX_BYTES or not prefix.startswith(MAGIC):
        raise RecordFileError("not a file of expert records")
    length = int.from_bytes(prefix[len(MAGIC) : -8], "little")
    text = os.pread(file, length, PREFIX_BYTES) if length <= os.fstat(file).st_size else b""
    if len(text) != length or zlib.crc32(text) != int.from_bytes(prefix[-8:], "little"):
        raise RecordFileError("damaged: its header")
    header: dict[str, Any] = json.loads(text)
    if header["block_bytes"] != BLOCK_BYTES:
        raise RecordFileError(f"in blocks of {header['block_bytes']} bytes in place of {BLOCK_BYTES}")
    return header, -(-(PREFIX_BYTES + length) // ALIGNMENT) * ALIGNMENT


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    name = next(name for name in [*wanted, *found] if found.get(name) != wanted.get(name))
    return f"{name} {found.get(name)!r} in place of {wanted.get(name)!r}"


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(file: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], offset + done)
        if count == 0:
            raise RecordFileError(f"cut off at byte {offset + done}")
        done += count


def _write_all(file: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(file, memory[done:], offset + done)
