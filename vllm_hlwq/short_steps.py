"""Blocks of a step of few rows, made in one launch and straight over bank rows.

``wave_blocks.py`` starts from vLLM's alignment over expert ids, which takes a launch of its own. When one or a few
sequences are decoded, launches are most of what the cache costs, and so few rows can be compared each with each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .wave_blocks import Alignment

MOST_PAIRS = 64
"""Of T * k in a short step."""
FEWEST_LANES = 16
NUM_WARPS = 4


@triton.jit(do_not_specialize=["pairs", "block_size"])  # type: ignore[untyped-decorator]
def short_blocks_kernel(  # type: ignore[no-untyped-def]
    ids, bank_rows, sorted_rows, block_rows, padded_rows, pairs, block_size, LANES: tl.constexpr
):
    """One program: place of each (token, k) = the blocks of smaller experts + those of its own that come before it."""
    lane = tl.arange(0, LANES)
    expert = tl.load(ids + lane, mask=lane < pairs, other=-1)
    named = expert >= 0
    row = tl.load(bank_rows + expert, mask=named, other=-1)
    same = (expert[:, None] == expert[None, :]) & named[:, None]
    before = lane[None, :] < lane[:, None]
    rank = tl.sum((same & before).to(tl.int32), 1)
    # Along the other axis, because each pair now looks at all others.
    is_first = (tl.sum((same & (lane[:, None] < lane[None, :])).to(tl.int32), 0) == 0) & named
    blocks = tl.where(is_first, (tl.sum(same.to(tl.int32), 0) + block_size - 1) // block_size, 0)
    smaller = expert[None, :] < expert[:, None]
    block = tl.sum(tl.where(smaller, blocks[None, :], 0), 1) + rank // block_size
    places = tl.sum(blocks, 0) * block_size
    tl.store(padded_rows, places)
    for start in range(0, places, 8 * LANES):
        place = start + tl.arange(0, 8 * LANES)
        tl.store(sorted_rows + place, tl.zeros([8 * LANES], tl.int32) + pairs, mask=place < places)
    tl.debug_barrier()  # the places of rows are written over
    tl.store(sorted_rows + block * block_size + rank % block_size, lane, mask=named)
    tl.store(block_rows + block, row, mask=named & (rank % block_size == 0))


def lanes(pairs: int) -> int:
    """Lanes of the kernel for ``pairs`` = T * k up to ``MOST_PAIRS``; one compilation for each number of them."""
    return max(FEWEST_LANES, int(triton.next_power_of_2(pairs)))


def blocks_of_short_step(ids: torch.Tensor, bank_rows: torch.Tensor, block_size: int) -> Alignment:
    """Sort a step's rows into blocks in the order of their experts. Only enqueues.

    Args:
        ids: int32 ``[T, k]``, contiguous, T * k up to ``MOST_PAIRS``; local expert ids, those below 0 get no place.
        bank_rows: int32 ``[E]``, contiguous: the bank row of each expert that is named.
        block_size: places of a block.
    """
    pairs = ids.numel()
    sorted_rows = ids.new_empty(pairs * block_size)
    block_rows, padded_rows = ids.new_empty(pairs), ids.new_empty(1)
    launch: Any = short_blocks_kernel[(1,)]
    launch(
        ids, bank_rows, sorted_rows, block_rows, padded_rows, pairs, block_size,
        LANES=lanes(pairs), num_warps=NUM_WARPS,
    )  # fmt: skip
    return Alignment(sorted_rows, block_rows, padded_rows, block_size)
