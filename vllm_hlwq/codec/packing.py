"""Codes of 2 to 8 bits to bytes and back: most significant bit first, least significant first, nibbles by halves.

Eight codes are merged within a 64-bit word by three rounds over all words at once; the ``bits`` low bytes of each word
are the stream. No loop over rows and no table, and the same code runs on CUDA.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch

from .scratch import Scratch

if sys.byteorder != "little":
    raise ImportError("codes are packed through 64-bit words of little-endian machines; this machine is big-endian")

BitOrder = Literal["msb", "lsb"]
_LANES = {8: torch.int16, 16: torch.int32, 32: torch.int64}
"""Bits of a lane, and the integer that holds it and its neighbour; no code is so wide that it reaches the sign."""
_WORDS, _OTHER = "work", "indices"
"""Where the words are in working memory, and what is beside them."""


def _pairs(count: int, lane: int, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` words as pairs of lanes, and as much memory beside them."""
    shape = (count * 32 // lane,)
    return scratch.take(_WORDS, shape, _LANES[lane]), scratch.take(_OTHER, shape, _LANES[lane])


def _merge(count: int, bits: int, order: BitOrder, scratch: Scratch) -> None:
    """Eight codes, one a byte, to one number of ``8 * bits`` bits; the first code highest under ``msb``."""
    for lane in (8, 16, 32):
        pairs, second = _pairs(count, lane, scratch)
        torch.bitwise_right_shift(pairs, lane, out=second)
        pairs.bitwise_and_((1 << lane) - 1)
        (pairs if order == "msb" else second).bitwise_left_shift_(bits * lane // 8)
        pairs.bitwise_or_(second)


def _spread(count: int, bits: int, order: BitOrder, lane_bits: int, scratch: Scratch) -> None:
    """Undo the rounds of ``_merge`` down to lanes of ``lane_bits`` with ``lane_bits // 8`` codes each."""
    for lane in (32, 16, 8):
        if lane < lane_bits:
            break
        pairs, high = _pairs(count, lane, scratch)
        width = bits * lane // 8
        torch.bitwise_right_shift(pairs, width, out=high)
        pairs.bitwise_and_((1 << width) - 1)
        (pairs if order == "msb" else high).bitwise_left_shift_(lane)
        pairs.bitwise_or_(high)


def _copy_bytes(source: torch.Tensor, target: torch.Tensor, count: int, order: BitOrder) -> None:
    """The first ``count`` bytes of each row, reversed under ``msb``: column by column, twice as fast as ``flip``."""
    columns = source.unbind(1)[:count]
    for column, values in zip(target.unbind(1), reversed(columns) if order == "msb" else columns, strict=False):
        column.copy_(values)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take; the last byte is filled with zeros."""
    return (count * bits + 7) // 8


def pack(
    codes: torch.Tensor,
    bits: int,
    order: BitOrder = "msb",
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, contiguous, any shape, values below ``2 ** bits``; read in row-major order.
        bits: width of a code, 2 to 8.
        order: ``msb``: the stream read as one big-endian number; ``lsb``: as a little-endian one.
        out: uint8 ``[packed_size]`` on the codes' device to write to.
        scratch: memory to work in, for callers with many chunks.

    Returns:
        uint8 ``[packed_size(codes.numel(), bits)]``.
    """
    flat = codes.reshape(-1)
    size = packed_size(len(flat), bits)
    scratch = scratch or Scratch(flat.device)
    if out is None:
        out = torch.empty(size, dtype=torch.uint8, device=flat.device)
    if bits == 8:
        return out.copy_(flat)
    count = (len(flat) + 7) // 8
    if len(flat) % 8:
        scratch.take(_WORDS, (count,), torch.int64)[-1:] = 0  # codes that fill up the last eight
    scratch.take(_WORDS, (len(flat),), torch.uint8).copy_(flat)
    _merge(count, bits, order, scratch)
    stream = out if size % bits == 0 else torch.empty(count * bits, dtype=torch.uint8, device=out.device)
    _copy_bytes(scratch.take(_WORDS, (count, 8), torch.uint8), stream.view(-1, bits), bits, order)
    return out if stream is out else out.copy_(stream[:size])


def _lanes(
    packed: torch.Tensor, count: int, bits: int, order: BitOrder, lane_bits: int, scratch: Scratch
) -> torch.Tensor:
    """int64 words whose lanes hold one code (8) or two codes (16) each, of at least ``count`` codes."""
    if len(packed) != packed_size(count, bits):
        raise ValueError(
            f"{len(packed)} bytes cannot hold {count} codes of {bits} bits; {packed_size(count, bits)} would"
        )
    if len(packed) % bits:
        packed = torch.nn.functional.pad(packed, (0, -len(packed) % bits))
    stream = packed.view(-1, bits)
    words = scratch.take(_WORDS, (len(stream),), torch.int64).zero_()
    _copy_bytes(stream, scratch.take(_WORDS, (len(stream), 8), torch.uint8), bits, order)
    _spread(len(stream), bits, order, lane_bits, scratch)
    return words


def unpack(packed: torch.Tensor, count: int, bits: int, order: BitOrder = "msb") -> torch.Tensor:
    """Inverse of ``pack``: uint8 ``[count]``.

    Raises:
        ValueError: ``packed`` is not exactly as long as ``count`` codes are.
    """
    if bits == 8 and len(packed) == count:
        return packed.clone()
    return _lanes(packed, count, bits, order, 8, Scratch(packed.device)).view(torch.uint8)[:count]


def unpack_pairs(packed: torch.Tensor, count: int, bits: int, scratch: Scratch | None = None) -> torch.Tensor:
    """MSB-first codes two at a time: int32 ``[count / 2]`` of ``first << bits | second``, to index a table of pairs.

    The result is in ``scratch`` if one is given, and so lives until its next use.

    Raises:
        ValueError: ``count`` is odd, ``bits`` is 8, or ``packed`` is not as long as ``count`` codes are.
    """
    if count % 2 or bits == 8:
        raise ValueError(f"{count} codes of {bits} bits do not make pairs of at most 15 bits")
    scratch = scratch or Scratch(packed.device)
    _lanes(packed, count, bits, "msb", 16, scratch)
    pairs = scratch.take(_WORDS, (count // 2,), torch.int16)
    return scratch.take(_OTHER, (count // 2,), torch.int32).copy_(pairs)


def unpack_half_block_nibbles(packed: torch.Tensor, block_size: int) -> torch.Tensor:
    """Four-bit codes of the older files: byte i of a block holds code ``i`` low and code ``block_size / 2 + i`` high.

    Args:
        packed: uint8 ``[..., block_size / 2]`` per block, contiguous.
        block_size: codes in a block.

    Returns:
        uint8 ``[blocks, block_size]``.
    """
    halves = packed.reshape(-1, block_size // 2)
    return torch.cat([halves & 0xF, halves >> 4], dim=1)


def pack_half_block_nibbles(codes: torch.Tensor, block_size: int) -> torch.Tensor:
    """Inverse of ``unpack_half_block_nibbles``: uint8 ``[blocks, block_size / 2]``."""
    blocks = codes.reshape(-1, block_size)
    return blocks[:, : block_size // 2] | (blocks[:, block_size // 2 :] << 4)
