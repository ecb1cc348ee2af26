"""Which blocks of a step's alignment each wave computes, and from which bank rows.

Marlin computes every block up to the count that it is given and takes its expert id for a bank row as it is: an id of
-1 reads before the bank and writes to its rows all the same; vLLM's Triton kernel writes zeros to the rows of such a
block, which other waves have computed. So each wave gets a list of its own blocks and no others, in the order of the
alignment. With one wave the list is the alignment itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

BLOCKS_A_PROGRAM = 64
COLUMNS_AT_ONCE = tl.constexpr(64)
NUM_WARPS = 4
ROW_ALIGNMENT = 4
"""int32 values; the lists of each wave start at a multiple of 16 bytes like fresh tensors, so that a Triton kernel that
reads them is not compiled again for lists that start elsewhere."""


@dataclass(frozen=True)
class Alignment:
    """Rows of (token, k) sorted into blocks of one expert each.

    sorted_rows: int32 ``[places]``, the row for each place of each block; ``T * k`` marks a place without one.
    block_rows: int32 ``[blocks]``, row of the weight bank that each block is computed from.
    padded_rows: int32 ``[1]``, places in use: the first ``padded_rows / block_size`` blocks are computed.
    block_size: places of a block.
    """

    sorted_rows: torch.Tensor
    block_rows: torch.Tensor
    padded_rows: torch.Tensor
    block_size: int


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_blocks", "num_places", "block_size", "blocks_stride", "places_stride", "padded_stride"]
)
def wave_blocks_kernel(  # type: ignore[no-untyped-def]
    sorted_rows, block_experts, wave_rows, wave_sorted_rows, wave_block_rows, wave_padded_rows,
    num_blocks, num_places, block_size, blocks_stride, places_stride, padded_stride,
    E: tl.constexpr, ONE_WAVE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (c, w): the blocks of stretch c that belong to wave w."""
    chunk, wave = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, CHUNK)
    before = 0
    if not ONE_WAVE:
        for start in range(0, chunk * CHUNK, CHUNK):
            expert = tl.load(block_experts + start + lane)
            known = (expert >= 0) & (expert < E)
            row = tl.load(wave_rows + wave * E + expert, mask=known, other=-1)
            before += tl.sum((row >= 0).to(tl.int32))
    block = chunk * CHUNK + lane
    expert = tl.load(block_experts + block, mask=block < num_blocks, other=-1)
    row = tl.load(wave_rows + wave * E + expert, mask=(expert >= 0) & (expert < E), other=-1)
    mine = row >= 0
    if ONE_WAVE:
        tl.store(wave_block_rows + block, row, mask=block < num_blocks)
    else:
        place = before + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(wave_block_rows + wave * blocks_stride + place, row, mask=mine)
        for first_column in range(0, block_size, COLUMNS_AT_ONCE):
            column = first_column + tl.arange(0, COLUMNS_AT_ONCE)
            source = block[:, None] * block_size + column[None, :]
            inside = mine[:, None] & (column < block_size)[None, :] & (source < num_places)
            rows = tl.load(sorted_rows + source, mask=inside, other=0)
            target = place[:, None] * block_size + column[None, :]
            tl.store(wave_sorted_rows + wave * places_stride + target, rows, mask=inside)
        if (chunk + 1) * CHUNK >= num_blocks:
            tl.store(wave_padded_rows + wave * padded_stride, (before + tl.sum(mine.to(tl.int32))) * block_size)


def blocks_of_waves(alignment: Alignment, wave_rows: torch.Tensor) -> list[Alignment]:
    """Deal a step's blocks to its waves. Only enqueues.

    Args:
        alignment: over expert ids, so that ``block_rows`` holds the expert of each block, -1 past the last.
        wave_rows: int32 ``[waves, E]``, contiguous: the bank row of each expert that a wave computes, else -1; with
            one wave it must compute every expert that the alignment has.

    Returns:
        One alignment a wave.
    """
    waves, num_experts = wave_rows.shape
    num_blocks, num_places = len(alignment.block_rows), len(alignment.sorted_rows)
    one = waves == 1

    def lists(length: int) -> torch.Tensor:
        return wave_rows.new_empty(waves, triton.cdiv(length, ROW_ALIGNMENT) * ROW_ALIGNMENT)[:, :length]

    block_rows = lists(num_blocks)
    sorted_rows = alignment.sorted_rows.unsqueeze(0) if one else lists(num_places)
    padded_rows = alignment.padded_rows.unsqueeze(0) if one else lists(1)
    launch: Any = wave_blocks_kernel[(triton.cdiv(num_blocks, BLOCKS_A_PROGRAM), waves)]
    launch(
        alignment.sorted_rows, alignment.block_rows, wave_rows, sorted_rows, block_rows, padded_rows,
        num_blocks, num_places, alignment.block_size,
        block_rows.stride(0), sorted_rows.stride(0), padded_rows.stride(0),
        E=num_experts, ONE_WAVE=one, CHUNK=BLOCKS_A_PROGRAM, num_warps=NUM_WARPS,
    )  # fmt: skip
    return [
        Alignment(sorted_rows[wave], block_rows[wave], padded_rows[wave], alignment.block_size) for wave in range(waves)
    ]
