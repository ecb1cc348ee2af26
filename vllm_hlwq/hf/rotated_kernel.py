"""The product of rotated activations with a coded weight on a GPU: codes are read once, at their own width.

A Triton kernel rotates the activations, in one launch: at one token the launches of a few torch operations take as long
as reading the codes. Another multiplies: one token on the ordinary cores, several on the tensor cores, by tiles of
decoded levels. Both take rows of codes as the files have them, MSB-first. One token's kernel reads them by 32-bit words
where blocks are whole words, else by bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .coded_weight import CodeFormat

ROWS_ONE_TOKEN, GROUPS = 4, 128
"""Of a program: output features, and groups of codes in flight, enough to hide the memory's latency."""
WORD_CODES = 32
"""Codes of a group that is read by words: as many words as a code has bits. Blocks hold a whole number of groups."""
ROWS, MOST_TOKENS = 16, 64
"""Of a tile; 16 is the least that the tensor cores take."""


@triton.jit
def _sign(a, b):  # type: ignore[no-untyped-def]
    """Sylvester's entry for indices below 256: ``(-1) ** popcount(a & b)``, float32."""
    both = a & b
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, in_features, width, stride_group, stride_code, scale,
    HIGH: tl.constexpr, LOW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A block of HIGH * LOW columns of a row of x, rotated and scaled.

    H is the Kronecker product of the matrices of HIGH and LOW, so each half of an index is rotated by its own: of 128
    columns 24 products each, not 128. Column ``c`` goes to ``c // GROUP * stride_group + c % GROUP * stride_code``.
    """
    high, low = tl.arange(0, HIGH), tl.arange(0, LOW)
    first = tl.program_id(0) * (HIGH * LOW)
    column = first + high[:, None] * LOW + low[None, :]
    row = tl.program_id(1).to(tl.int64)
    x = tl.load(x_ptr + row * in_features + column, mask=column < in_features, other=0).to(tl.float32)
    half = tl.sum(x[:, :, None] * _sign(low[:, None], low[None, :])[None, :, :], axis=1)
    whole = tl.sum(half[:, None, :] * _sign(high[:, None], high[None, :])[:, :, None], axis=0) * scale
    target = out_ptr + row * width + column // GROUP * stride_group + column % GROUP * stride_code
    tl.store(target, whole.to(out_ptr.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _one_token_by_words(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, norms_ptr, levels_ptr, out_ptr, rows,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One row of x, float32 ``[32, groups]``: neighbouring elements read neighbours. Codes are int32 words.

    Each element takes the 32 codes of a group, which are BITS words; a code's last bit says in which word it ends. The
    width is a constant: where each code's x lies is then known at compile time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    groups: tl.constexpr = BLOCKS * (BLOCK_SIZE // 32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        there = group < groups
        inside = (row < rows)[:, None] & there[None, :]
        source = packed_ptr + (row[:, None].to(tl.int64) * groups + group[None, :]) * BITS
        dot = tl.zeros((ROWS, GROUPS), tl.float32)
        pair = tl.zeros((ROWS, GROUPS), tl.uint64)
        for index in tl.static_range(BITS):
            # The stream is big-endian, the machine is not.
            word = tl.load(source + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
            word = (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)
            pair = (pair << 32) | word.to(tl.uint64)
            for code in tl.static_range(32):
                if (code * BITS + BITS - 1) // 32 == index:
                    which = (pair >> (32 * index + 32 - code * BITS - BITS)).to(tl.uint32) & ((1 << BITS) - 1)
                    x = tl.load(x_ptr + code * groups + group, mask=there, other=0)
                    dot += tl.load(levels_ptr + which) * x[None, :]
        place = row[:, None].to(tl.int64) * BLOCKS + group[None, :] // (BLOCK_SIZE // 32)
        total += tl.load(norms_ptr + place, mask=inside, other=0).to(tl.float32) * dot
    tl.store(out_ptr + row, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), mask=row < rows)


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


def rotate(activation: torch.Tensor, layout: CodeFormat, by_words: bool = False) -> torch.Tensor:
    """``x H`` by blocks, the last one padded with zeros.

    Args:
        activation: ``[tokens, in_features]``, contiguous, on a GPU.
        layout: of the weight that it will meet.
        by_words: arranged for the kernel of one token that reads words.

    Returns:
        ``[tokens, blocks * block_size]`` of the activation's dtype; by words float32 ``[tokens, 32, groups]``.
    """
    tokens, width = len(activation), layout.blocks * layout.block_size
    groups = width // WORD_CODES
    shape = (tokens, WORD_CODES, groups) if by_words else (tokens, width)
    out = torch.empty(shape, dtype=torch.float32 if by_words else activation.dtype, device=activation.device)
    low = 1 << (layout.block_size.bit_length() // 2)
    strides = (1, groups) if by_words else (WORD_CODES, 1)
    _rotate[(layout.blocks, tokens)](
        activation, out, layout.in_features, width, *strides, layout.block_size**-0.5,
        HIGH=layout.block_size // low, LOW=low, GROUP=WORD_CODES, num_warps=4,
    )  # fmt: skip
    return out


def rotated_linear(
    activation: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat
) -> torch.Tensor:
    """The product with a coded weight's transpose.

    Args:
        activation: ``[tokens, in_features]``, on a GPU.
        packed: uint8 ``[out_features, row_bytes]`` there, contiguous.
        norms: int16 ``[out_features, blocks]``, the bits of float16 numbers, contiguous.
        layout: of the codes; blocks of 16 weights at least.

    Returns:
        ``[tokens, out_features]`` of the activation's dtype.
    """
    tokens, rows = len(activation), len(packed)
    out = torch.empty(tokens, rows, dtype=activation.dtype, device=activation.device)
    if tokens == 0:
        return out
    shared = (norms.view(torch.float16), layout.levels(activation.device), out)
    constants = {"BITS": layout.bits, "BLOCK_SIZE": layout.block_size}
    by_words = tokens == 1 and layout.block_size % WORD_CODES == 0 and packed.storage_offset() % 4 == 0
    with torch.cuda.device_of(activation):  # type: ignore[no-untyped-call]
        rotated = rotate(activation.contiguous(), layout, by_words)
        if by_words:
            groups = min(GROUPS, max(32, triton.next_power_of_2(layout.blocks * layout.block_size // WORD_CODES)))
            _one_token_by_words[(triton.cdiv(rows, ROWS_ONE_TOKEN),)](
                rotated, packed.view(torch.int32), *shared, rows, BLOCKS=layout.blocks, **constants,
                ROWS=ROWS_ONE_TOKEN, GROUPS=groups, num_warps=groups // 32,
            )  # fmt: skip
        elif tokens == 1:
            _one_token[(triton.cdiv(rows, ROWS_ONE_TOKEN),)](
                rotated, packed, *shared, rows, layout.blocks, layout.row_bytes, **constants,
                ROWS=ROWS_ONE_TOKEN, GROUPS=GROUPS, num_warps=4,
            )  # fmt: skip
        else:
            tile = min(MOST_TOKENS, max(16, triton.next_power_of_2(tokens)))
            grid = (triton.cdiv(rows, ROWS), triton.cdiv(tokens, tile))
            _several_tokens[grid](
                rotated, packed, *shared, tokens, rows, layout.blocks, layout.row_bytes, **constants,
                ROWS=ROWS, TOKENS=tile, num_warps=4,
            )  # fmt: skip
    return out
