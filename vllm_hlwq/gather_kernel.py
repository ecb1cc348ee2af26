"""Gather: one kernel that copies experts' records from page-locked host memory into rows of a weight bank.

The kernel reads host memory through its device address, so a captured CUDA graph loads other experts at each replay:
which, where to and how many it reads from device memory. Records are cut into chunks that all programs share, so one
expert already occupies the whole grid. ``WeightBank.load`` is the mirror on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .host_store import FIELD_ALIGNMENT, RecordLayout
from .weight_bank import WeightBank

PROGRAMS = 64
"""Programs of the grid. Assuming 2 us to fetch, a PCIe 5 x16 link (55 GB/s) has about 110 KB under way. 64 programs
with a chunk each ask for several times that, so the link stays full while some of them look up their next chunk, and
about half of a data-centre GPU's multiprocessors stay free for what computes meanwhile."""

CHUNK_BYTES = 8192
"""Bytes that a program copies at once: with ``WARPS`` warps, four 16-byte reads under way in each thread."""

WARPS = 4

NARROW_CHUNK_BYTES = tl.constexpr(512)
"""Chunk of a field whose bank rows are not 16-byte aligned, copied byte by byte. No INT4 layout of vLLM has one; per
tensor scales of FP8 and NVFP4 experts (4 bytes an expert) are such fields, too small for their speed to matter."""


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "store_address", "record_bytes", "chunk_table", "chunks", "bank_rows", "experts", "rows", "count", "skip",
        "first",
    ]
)  # fmt: skip
def gather_chunks(  # type: ignore[no-untyped-def]
    store_address, record_bytes, chunk_table, chunks, bank_rows, experts, rows, count, skip, first,
    CHUNK: tl.constexpr, READ_CACHE: tl.constexpr,
):  # fmt: skip
    """Copy entries ``max(first, skip) .. min(count, first + bank_rows)``, chunk by chunk.

    ``chunk_table`` is what ``chunks_of_a_record`` returns. No argument is specialised on its value or alignment: one
    compiled kernel serves every layout, bank and list, so none has to be compiled while a graph is captured.
    """
    begin = tl.maximum(tl.load(skip), first)
    items = (tl.minimum(tl.load(count), first + bank_rows) - begin) * chunks
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        entry = begin + item // chunks
        chunk = chunk_table + (item % chunks) * 4
        expert = tl.load(experts + entry).to(tl.int64)
        row = tl.load(rows + entry).to(tl.int64)
        source = store_address + expert * record_bytes + tl.load(chunk)
        row_bytes = tl.load(chunk + 2)
        target = tl.load(chunk + 1) + row * row_bytes
        nbytes = tl.load(chunk + 3)
        if (tl.load(chunk + 1) | row_bytes) % 16 == 0:
            word = tl.arange(0, CHUNK // 4)
            in_chunk = word < nbytes // 16 * 4
            source_words = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
            target_words = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
            words = tl.load(source_words + word, mask=in_chunk, cache_modifier=READ_CACHE)
            tl.store(target_words + word, words, mask=in_chunk)
        else:
            byte = tl.arange(0, NARROW_CHUNK_BYTES)
            in_narrow_chunk = byte < nbytes
            narrow = tl.load(source.to(tl.pointer_type(tl.uint8)) + byte, mask=in_narrow_chunk)
            tl.store(target.to(tl.pointer_type(tl.uint8)) + byte, narrow, mask=in_narrow_chunk)


def chunks_of_a_record(layout: RecordLayout, bank: WeightBank, chunk_bytes: int) -> torch.Tensor:
    """How one record is cut into chunks, none of them across fields.

    Args:
        layout: the record's fields.
        bank: where they go; each field contiguous.
        chunk_bytes: the largest chunk of a field whose bank rows are 16-byte aligned.

    Returns:
        int64 [chunks, 4] on the CPU: offset in the record, address in the bank's row 0, bytes from row to row, bytes.

    Raises:
        ValueError: the bank's fields are not those of the layout, or not contiguous.
    """
    if list(bank.fields) != list(layout):
        raise ValueError(f"bank with fields {list(bank.fields)} for records of {list(layout)}")
    table = []
    for name, field in layout.items():
        tensor = bank.fields[name]
        if tensor.shape[1:] != field.shape or tensor.dtype != field.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"bank field {name} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}; records "
                f"need contiguous rows of {field.shape} {field.dtype}"
            )
        address = tensor.data_ptr()
        aligned = (address | field.nbytes) % FIELD_ALIGNMENT == 0
        step = chunk_bytes if aligned else NARROW_CHUNK_BYTES.value
        for start in range(0, field.nbytes, step):
            table.append((field.offset + start, address + start, field.nbytes, min(step, field.nbytes - start)))
    return torch.tensor(table, dtype=torch.int64).view(-1, 4)


class Gather:
    """Loads experts into one bank. Made before graphs are captured; a call only launches."""

    def __init__(
        self,
        layout: RecordLayout,
        bank: WeightBank,
        programs: int = PROGRAMS,
        chunk_bytes: int = CHUNK_BYTES,
        warps: int = WARPS,
        read_cache: str = ".cg",
    ) -> None:
        """Cut the record into chunks.

        Args:
            layout: of the stores to load from.
            bank: where experts go.
            programs: size of the grid.
            chunk_bytes: bytes a program copies at once; a power of two, at least 16 for each thread.
            warps: of a program.
            read_cache: Triton's cache modifier of the reads; past the first-level cache, since a byte is read once.

        Raises:
            ValueError: the bank does not fit the layout, or chunks are too small for 16-byte accesses.
        """
        if chunk_bytes < 16 * 32 * warps or chunk_bytes & (chunk_bytes - 1):
            raise ValueError(f"chunks of {chunk_bytes} bytes: need a power of two from {16 * 32 * warps} on")
        self.bank = bank
        self.record_bytes = layout.record_bytes
        self.programs, self.chunk_bytes, self.warps, self.read_cache = programs, chunk_bytes, warps, read_cache
        device = next(iter(bank.fields.values())).device
        self.chunk_table = chunks_of_a_record(layout, bank, chunk_bytes).to(device)
        self._no_skip = torch.zeros(1, dtype=torch.int32, device=device)

    def __call__(
        self,
        store_address: int,
        experts: torch.Tensor,
        rows: torch.Tensor,
        count: torch.Tensor,
        first: int = 0,
        skip: torch.Tensor | None = None,
    ) -> None:
        """Copy entries ``max(first, skip) .. min(count, first + bank.rows)`` of a list, on the current stream.

        All tensors lie on the bank's device and are read when the kernel runs.

        Args:
            store_address: ``HostStore.device_address`` of a page-locked store.
            experts: int32 [L], experts to load.
            rows: int32 [L], the bank row of each, distinct among the entries copied.
            count: int32 [1], entries of the list that are to be loaded by all calls together.
            first: the first entry this call copies.
            skip: int32 [1], entries at the list's beginning that are there already; None if there are none.
        """
        gather_chunks[(self.programs,)](
            store_address,
            self.record_bytes,
            self.chunk_table,
            len(self.chunk_table),
            self.bank.rows,
            experts,
            rows,
            count,
            self._no_skip if skip is None else skip,
            first,
            CHUNK=self.chunk_bytes,
            READ_CACHE=self.read_cache,
            num_warps=self.warps,
        )
