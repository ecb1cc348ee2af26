"""The product of rotated activations with a coded weight on a GPU: codes are read once, at their own width.

Two Triton kernels: one token on the ordinary cores, where the codes' bytes are all that is read from memory; several on
the tensor cores, by tiles of decoded levels. Both take rows of codes as the files have them, MSB-first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .coded_weight import CodeFormat

ROWS_ONE_TOKEN, GROUPS = 4, 128
"""Of a program: output features, and groups of eight codes in flight, enough to hide the memory's latency."""
ROWS, MOST_TOKENS = 16, 64
"""Of a tile; 16 is the least that the tensor cores take."""


@triton.jit  # type: ignore[untyped-decorator]
def _one_token(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, norms_ptr, levels_ptr, out_ptr, rows, blocks, row_bytes,
    BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One row of x ``[blocks * BLOCK_SIZE]``. Each element takes eight codes, which are BITS whole bytes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    groups = blocks * (BLOCK_SIZE // 8)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        there = group < groups
        inside = (row < rows)[:, None] & there[None, :]
        source = packed_ptr + row[:, None].to(tl.int64) * row_bytes + group[None, :] * BITS
        word = tl.zeros((ROWS, GROUPS), tl.uint64)
        for index in tl.static_range(BITS):
            word = (word << 8) | tl.load(source + index, mask=inside, other=0).to(tl.uint64)
        dot = tl.zeros((ROWS, GROUPS), tl.float32)
        for code in tl.static_range(8):
            which = ((word >> (BITS * (7 - code))) & ((1 << BITS) - 1)).to(tl.int32)
            x = tl.load(x_ptr + group * 8 + code, mask=there, other=0).to(tl.float32)
            dot += tl.load(levels_ptr + which) * x[None, :]
        place = row[:, None].to(tl.int64) * blocks + group[None, :] // (BLOCK_SIZE // 8)
        total += tl.load(norms_ptr + place, mask=inside, other=0).to(tl.float32) * dot
    tl.store(out_ptr + row, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _several_tokens(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, norms_ptr, levels_ptr, out_ptr, tokens, rows, blocks, row_bytes,
    BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """x ``[tokens, blocks * BLOCK_SIZE]`` times a tile of rows, whose levels are scaled and rounded to x's dtype."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside, asked = row < rows, token < tokens
    column = tl.arange(0, BLOCK_SIZE)
    # A code lies within two bytes; of the last code's the second may be beyond the row, and is not needed then.
    bit = column * BITS
    first, shift = bit // 8, 16 - BITS - bit % 8
    spans = (bit % 8) + BITS > 8
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for block in range(0, blocks):
        start = packed_ptr + row[None, :].to(tl.int64) * row_bytes + block * (BLOCK_SIZE // 8 * BITS) + first[:, None]
        high = tl.load(start, mask=inside[None, :], other=0).to(tl.int32)
        low = tl.load(start + 1, mask=inside[None, :] & spans[:, None], other=0).to(tl.int32)
        which = (((high << 8) | low) >> shift[:, None]) & ((1 << BITS) - 1)
        norm = tl.load(norms_ptr + row.to(tl.int64) * blocks + block, mask=inside, other=0).to(tl.float32)
        weight = tl.load(levels_ptr + which) * norm[None, :]
        offsets = token[:, None].to(tl.int64) * (blocks * BLOCK_SIZE) + block * BLOCK_SIZE + column[None, :]
        x = tl.load(x_ptr + offsets, mask=asked[:, None], other=0)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    target = out_ptr + token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=asked[:, None] & inside[None, :])


def rotated_linear(
    rotated: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat
) -> torch.Tensor:
    """The product with a coded weight's transpose.

    Args:
        rotated: ``[tokens, blocks * block_size]``, as ``rotate`` gives it, contiguous, on a GPU.
        packed: uint8 ``[out_features, row_bytes]`` there, contiguous.
        norms: int16 ``[out_features, blocks]``, the bits of float16 numbers, contiguous.
        layout: of the codes; blocks of 16 weights at least.

    Returns:
        ``[tokens, out_features]`` of the activation's dtype.
    """
    tokens, rows = len(rotated), len(packed)
    out = torch.empty(tokens, rows, dtype=rotated.dtype, device=rotated.device)
    if tokens == 0:
        return out
    levels = layout.levels(rotated.device)
    shared = (packed, norms.view(torch.float16), levels, out)
    sizes = (rows, layout.blocks, layout.row_bytes)
    constants = {"BITS": layout.bits, "BLOCK_SIZE": layout.block_size}
    with torch.cuda.device_of(rotated):  # type: ignore[no-untyped-call]
        if tokens == 1:
            _one_token[(triton.cdiv(rows, ROWS_ONE_TOKEN),)](
                rotated, *shared, *sizes, **constants, ROWS=ROWS_ONE_TOKEN, GROUPS=GROUPS, num_warps=4
            )
        else:
            tile = min(MOST_TOKENS, max(16, triton.next_power_of_2(tokens)))
            grid = (triton.cdiv(rows, ROWS), triton.cdiv(tokens, tile))
            _several_tokens[grid](rotated, *shared, tokens, *sizes, **constants, ROWS=ROWS, TOKENS=tile, num_warps=4)
    return out
