"""The product of rotated activations with a coded weight on a GPU.

A Triton kernel rotates the activations, in one launch: at one token the launches of a few torch operations take as long
as reading the codes. For few tokens another multiplies them with codes that are read at their own width, by 32-bit
words, and never written out. For more, or where rows or blocks are not whole words, a third writes out levels times
norms, the weight in its rotated basis, once rounded to the activation's dtype, for a library's product. All take rows
of codes as the files have them, MSB-first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from torch.nn import functional

if TYPE_CHECKING:
    from .coded_weight import CodeFormat

# What was fastest on an H100: ``benchmarks/hlwq_linear.py --sweep`` prints the values of another GPU.
FEW_TOKENS = 4
"""Most tokens for which codes are read again for each; the second time they come from the GPU's cache. With more, a
decoded weight and a library's product are faster."""
ROWS, GROUPS, AHEAD = 2, 128, 1
"""Of a program of few tokens: output features, groups of codes side by side, and rows read in advance, enough to hide
the memory's latency."""
WORD_CODES = 32
"""Codes of a group that is read by words: as many words as a code has bits. Blocks hold a whole number of groups."""
LAUNCH_EARLY = True
"""Let few tokens' programs start, and read codes, while the rotation runs: from compute capability 9.0 on."""
GROUPS_DECODED, WARPS_DECODED = 1024, 8
"""Of a program that decodes: groups of eight codes, and warps."""
DECODED_AT_ONCE = 2**26
"""Weights that are decoded before they are multiplied: an output layer's need not all be in memory."""
ROTATED_BY_KERNEL = 16
"""Most tokens that the kernel rotates; for more a library's product with H is faster."""


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
    HIGH: tl.constexpr, LOW: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A block of HIGH * LOW columns of a row of x, rotated and scaled.

    H is the Kronecker product of the matrices of HIGH and LOW, so each half of an index is rotated by its own: of 128
    columns 24 products each, not 128. Column ``c`` goes to ``c // GROUP * stride_group + c % GROUP * stride_code``.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    high, low = tl.arange(0, HIGH), tl.arange(0, LOW)
    first = tl.program_id(0) * (HIGH * LOW)
    column = first + high[:, None] * LOW + low[None, :]
    row = tl.program_id(1).to(tl.int64)
    x = tl.load(x_ptr + row * in_features + column, mask=column < in_features, other=0).to(tl.float32)
    half = tl.sum(x[:, :, None] * _sign(low[:, None], low[None, :])[None, :, :], axis=1)
    whole = tl.sum(half[:, None, :] * _sign(high[:, None], high[None, :])[:, :, None], axis=0) * scale
    target = out_ptr + row * width + column // GROUP * stride_group + column % GROUP * stride_code
    tl.store(target, whole.to(out_ptr.dtype.element_ty))


@triton.jit
@no_type_check
def _row(
    packed_ptr, norms_ptr, row, last, groups, group, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """A row's norms at groups of 32 codes, and their BITS words, in one tuple; of rows from ``last`` on nothing."""
    at = row.to(tl.int64) * groups + group
    there = group < tl.where(row < last, groups, 0)
    loaded = (tl.load(norms_ptr + at // (BLOCK_SIZE // 32), mask=there, other=0),)
    for index in tl.static_range(BITS):
        loaded = loaded + (tl.load(packed_ptr + at * BITS + index, mask=there, other=0),)  # noqa: RUF005
    return loaded


@triton.jit
@no_type_check  # the tuples grow, which is how Triton has them
def _few_tokens(
    x_ptr, packed_ptr, norms_ptr, levels_ptr, out_ptr, rows,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some rows times one token of x, float32 ``[tokens, 32, groups]``: neighbouring elements read neighbours.

    Each element takes the 32 codes of a group, which are BITS words, int32; a code's last bit says in which word it
    ends. A token's x stays in registers while one row follows another, and AHEAD rows of codes are on their way from
    memory. Everything is one element a thread: Triton then need not move values between threads, which in a tile of
    rows it does for every x, with two barriers.
    """
    first, token = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    last = tl.minimum(first + ROWS, rows)
    row_of = first + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    groups: tl.constexpr = BLOCKS * (BLOCK_SIZE // 32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        there = group < groups
        queue = ()
        for index in tl.static_range(AHEAD):
            queue = queue + (_row(packed_ptr, norms_ptr, first + index, last, groups, group, BITS, BLOCK_SIZE),)  # noqa: RUF005
        if EARLY:
            tl.extra.cuda.gdc_wait()  # for x
        x = ()
        for code in tl.static_range(32):
            x = x + (tl.load(x_ptr + (token * 32 + code) * groups + group, mask=there, other=0),)  # noqa: RUF005
        for index in range(ROWS):
            row = first + index
            queue = queue + (_row(packed_ptr, norms_ptr, row + AHEAD, last, groups, group, BITS, BLOCK_SIZE),)  # noqa: RUF005
            dot = tl.zeros((GROUPS,), tl.float32)
            pair = tl.zeros((GROUPS,), tl.uint64)
            for part in tl.static_range(BITS):
                # The stream is big-endian, the machine is not.
                word = queue[0][part + 1].to(tl.uint32, bitcast=True)
                word = (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)
                pair = (pair << 32) | word.to(tl.uint64)
                for code in tl.static_range(32):
                    if (code * BITS + BITS - 1) // 32 == part:
                        which = (pair >> (32 * part + 32 - code * BITS - BITS)).to(tl.uint32) & ((1 << BITS) - 1)
                        dot += tl.load(levels_ptr + which) * x[code]
            dot *= queue[0][0].to(tl.float32)
            total += tl.where((row_of == row)[:, None], dot[None, :], 0.0)
            queue = queue[1:]
    tl.store(out_ptr + token * rows + row_of, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), mask=row_of < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    packed_ptr, norms_ptr, levels_ptr, out_ptr, count,
    BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Levels times norms of ``count`` groups of eight codes, which are BITS whole bytes: a weight that is rotated."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    word = tl.zeros((GROUPS,), tl.uint64)
    for index in tl.static_range(BITS):
        word = (word << 8) | tl.load(packed_ptr + group * BITS + index, mask=inside, other=0).to(tl.uint64)
    norm = tl.load(norms_ptr + group // (BLOCK_SIZE // 8), mask=inside, other=0).to(tl.float32)
    code = tl.arange(0, 8)
    shift = (BITS * (7 - code)).to(tl.uint64)
    which = (word[:, None] >> shift[None, :]).to(tl.uint32) & ((1 << BITS) - 1)
    weight = tl.load(levels_ptr + which) * norm[:, None]
    target = out_ptr + group[:, None] * 8 + code[None, :]
    tl.store(target, weight.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def launches_early(device: torch.device) -> bool:
    """Whether few tokens' programs are launched before the rotation has ended: where the GPU can, unless forbidden.

    Not in what torch.compile traces, which knows no such launches.
    """
    able = device.type == "cuda" and not torch.compiler.is_compiling()
    return LAUNCH_EARLY and able and torch.cuda.get_device_capability(device) >= (9, 0)


def rotate(activation: torch.Tensor, layout: CodeFormat, by_words: bool = False) -> torch.Tensor:
    """``x H`` by blocks, the last one padded with zeros.

    Args:
        activation: ``[tokens, in_features]``, contiguous, on a GPU.
        layout: of the weight that it will meet.
        by_words: arranged for the kernel of few tokens.

    Returns:
        ``[tokens, blocks * block_size]`` of the activation's dtype; by words float32 ``[tokens, 32, groups]``.
    """
    tokens, width = len(activation), layout.blocks * layout.block_size
    if tokens > ROTATED_BY_KERNEL and not by_words:
        hadamard = layout.hadamard(activation.device, activation.dtype)
        blocks = functional.pad(activation, (0, width - layout.in_features)).view(-1, layout.block_size)
        # With beta 0 the first argument counts for nothing.
        return torch.addmm(hadamard[:1], blocks, hadamard, beta=0, alpha=layout.block_size**-0.5).view(tokens, width)
    groups = width // WORD_CODES
    shape = (tokens, WORD_CODES, groups) if by_words else (tokens, width)
    out = torch.empty(shape, dtype=torch.float32 if by_words else activation.dtype, device=activation.device)
    low = 1 << (layout.block_size.bit_length() // 2)
    strides = (1, groups) if by_words else (WORD_CODES, 1)
    _rotate[(layout.blocks, tokens)](
        activation, out, layout.in_features, width, *strides, layout.block_size**-0.5,
        HIGH=layout.block_size // low, LOW=low, GROUP=WORD_CODES, EARLY=by_words and launches_early(activation.device),
        num_warps=4,
    )  # fmt: skip
    return out


def decode_rotated(packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat, dtype: torch.dtype) -> torch.Tensor:
    """The rotated weight ``[out_features, blocks * block_size]``: what a rotated activation is multiplied with.

    Args:
        packed: uint8 ``[out_features, row_bytes]``, contiguous, on a GPU.
        norms: int16 ``[out_features, blocks]``, the bits of float16 numbers, contiguous.
        layout: of the codes; blocks of 8 weights at least.
        dtype: of the result, which is rounded once.
    """
    width = layout.blocks * layout.block_size
    out = torch.empty(len(packed), width, dtype=dtype, device=packed.device)
    count = len(packed) * width // 8
    _decode[(triton.cdiv(count, GROUPS_DECODED),)](
        packed, norms.view(torch.float16), layout.levels(packed.device), out, count,
        BITS=layout.bits, BLOCK_SIZE=layout.block_size, GROUPS=GROUPS_DECODED, num_warps=WARPS_DECODED,
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
    out = activation.new_empty(tokens, rows)
    if tokens == 0:
        return out
    activation = activation.contiguous()
    step = max(1, DECODED_AT_ONCE // (layout.blocks * layout.block_size))
    aligned = layout.block_size % WORD_CODES == 0 and packed.storage_offset() % 4 == 0
    with torch.cuda.device_of(activation):  # type: ignore[no-untyped-call]
        if tokens > FEW_TOKENS or not aligned:
            rotated = rotate(activation, layout)
            for chunk in (slice(start, start + step) for start in range(0, rows, step)):
                weight = decode_rotated(packed[chunk], norms[chunk], layout, activation.dtype)
                torch.mm(rotated, weight.T, out=out[:, chunk])
            return out
        groups = min(GROUPS, max(32, triton.next_power_of_2(layout.blocks * layout.block_size // WORD_CODES)))
        early = launches_early(activation.device)
        _few_tokens[(triton.cdiv(rows, ROWS), tokens)](
            rotate(activation, layout, by_words=True), packed.view(torch.int32), norms.view(torch.float16),
            layout.levels(activation.device), out, rows, BLOCKS=layout.blocks, BITS=layout.bits,
            BLOCK_SIZE=layout.block_size, ROWS=ROWS, GROUPS=groups, AHEAD=AHEAD, EARLY=early,
            num_warps=groups // 32, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
