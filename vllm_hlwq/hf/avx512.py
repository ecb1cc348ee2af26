"""Codes to weights with AVX-512: 32 codes are unpacked, looked up and stored in five instructions.

A block's table of at most 32 levels, times its norm and rounded to BF16, is one register, and ``vpermw`` reads all 32
lanes out of it at once. Of the same loop in Python LLVM makes one look-up after another, which takes four times as
long; and machines with AVX-512 are those whose BF16 products are so fast that a step waits for decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

CODES = 32
"""16-bit lanes of a register, and so the codes of a look-up and the most levels of a table."""
PERMUTE = "llvm.x86.avx512.permvar.hi.512"
FLOAT, INDEX = ir.FloatType(), ir.IntType(32)
BYTES, SHORTS = ir.VectorType(ir.IntType(8), 2 * CODES), ir.VectorType(ir.IntType(16), CODES)
FLOATS, WORDS = ir.VectorType(FLOAT, CODES), ir.VectorType(ir.IntType(32), CODES)


@cache
def available() -> bool:
    """Does the processor have the instructions, and is numba free to use all that it has?"""
    restricted = numba.config.CPU_NAME or numba.config.CPU_FEATURES
    return not restricted and bool(llvmlite.binding.get_host_cpu_features().get("avx512bw"))


def takes(bits: int, block_size: int) -> bool:
    """Whether blocks are whole look-ups in a table of one register."""
    return 1 << bits <= CODES and block_size % CODES == 0


def _constant(vector: ir.VectorType, values: list[int]) -> ir.Constant:
    return ir.Constant(vector, [ir.Constant(vector.element, value) for value in values])


def _all(vector: ir.VectorType, value: int) -> ir.Constant:
    return _constant(vector, [value] * vector.count)


def _table(builder: Any, levels: Any, norm: Any) -> Any:
    """BF16 ``levels * norm``, to the nearest and ties to even."""
    single = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), norm, ir.Constant(INDEX, 0))
    norms = builder.shuffle_vector(single, ir.Constant(FLOATS, ir.Undefined), _all(WORDS, 0))
    bits = builder.bitcast(builder.fmul(levels, norms), WORDS)
    odd = builder.and_(builder.lshr(bits, _all(WORDS, 16)), _all(WORDS, 1))
    rounded = builder.add(builder.add(bits, _all(WORDS, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _all(WORDS, 16)), SHORTS)


def _unpacked(builder: Any, packed: Any, bits: int) -> Any:
    """Codes in 16-bit lanes: each gets the two bytes that hold its code, and shifts them."""
    last = packed.type.count - 1
    firsts, offsets = zip(*(divmod(code * bits, 8) for code in range(CODES)), strict=True)
    # Little-endian lanes of a big-endian stream. Only codes that end in their first byte would have one after the last.
    order = [byte for first in firsts for byte in (min(first + 1, last), first)]
    index = _constant(ir.VectorType(INDEX, BYTES.count), order)
    pairs = builder.bitcast(builder.shuffle_vector(packed, ir.Constant(packed.type, ir.Undefined), index), SHORTS)
    lanes = builder.lshr(pairs, _constant(SHORTS, [16 - bits - offset for offset in offsets]))
    return builder.and_(lanes, _all(SHORTS, (1 << bits) - 1))


def _decode_block(bits: int) -> Any:
    """``(source, read, levels, norm, target, write, count)`` for compiled code: ``count`` times 32 codes of a block.

    Arrays are contiguous: codes uint8 from ``source[read]`` on, levels float32 ``[32]``, results uint16 from
    ``target[write]`` on. Positions are uint64; nothing is checked.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def decode_block(
        typing: Any, source: Any, read: Any, levels: Any, norm: Any, target: Any, write: Any, count: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def memory(argument: int, position: Any, vector: Any) -> Any:
                array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
                return builder.bitcast(builder.gep(array.data, [position]), vector.as_pointer())

            position = arguments[1].type
            size = ir.Constant(position, CODES * bits // 8)
            first = memory(2, ir.Constant(position, 0), FLOATS)
            table = _table(builder, builder.load(first, align=4), arguments[3])
            permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(SHORTS, [SHORTS, SHORTS]), PERMUTE)
            with cgutils.for_range(builder, arguments[6], intp=position) as loop:
                at = builder.add(arguments[1], builder.mul(loop.index, size))
                packed = builder.load(memory(0, at, ir.VectorType(BYTES.element, size.constant)), align=1)
                found = builder.call(permute, [table, _unpacked(builder, packed, bits)])
                at = builder.add(arguments[5], builder.mul(loop.index, ir.Constant(position, CODES)))
                builder.store(found, memory(4, at, SHORTS), align=2)
            return context.get_dummy_value()

        return types.void(source, read, levels, norm, target, write, count), generate

    return decode_block


@cache
def kernel(bits: int) -> Callable[..., None]:
    """``(packed [rows, row_bytes], norms [rows, blocks], levels, out [rows, columns], block_size)``, compiled.

    What it writes to ``out`` are the bits of BF16 numbers, uint16.
    """
    decode_block = _decode_block(bits)

    @njit(nogil=True)
    def decode(packed, norms, levels, out, block_size):  # type: ignore[no-untyped-def]
        table = np.zeros(CODES, np.float32)
        table[: len(levels)] = levels
        lookups, block_bytes = np.uint64(block_size // CODES), np.uint64(block_size * bits // 8)
        for row in range(norms.shape[0]):
            read, write = np.uint64(0), np.uint64(0)
            for block in range(norms.shape[1]):
                decode_block(packed[row], read, table, norms[row, block], out[row], write, lookups)
                read, write = read + block_bytes, write + np.uint64(block_size)

    return decode  # type: ignore[no-any-return]
