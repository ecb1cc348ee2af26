"""Codes to rotated weights on a CPU, in one pass: unpack, look up, scale, round.

As torch operations these are passes over memory of their own, and took three times as long as the product that follows.
A block's levels are multiplied by its norm and rounded once, in a table; its codes then are look-ups in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import njit


@cache
def _kernel(bits: int, to_bf16: bool) -> Callable[..., None]:
    """``(packed [rows, row_bytes], norms [rows, blocks], levels, out [rows, columns], block_size)``, compiled."""
    mask = np.uint64((1 << bits) - 1)
    half, sixteen, one, byte = np.uint32(0x7FFF), np.uint32(16), np.uint32(1), np.uint64(8)

    @njit(nogil=True)  # type: ignore[untyped-decorator]
    def decode(packed, norms, levels, out, block_size):  # type: ignore[no-untyped-def]
        scaled = np.empty(len(levels), out.dtype)
        for row in range(norms.shape[0]):
            for block in range(norms.shape[1]):
                for code in range(len(levels)):
                    value = np.float32(levels[code] * norms[row, block])
                    if to_bf16:
                        word = value.view(np.uint32)
                        scaled[code] = (word + half + ((word >> sixteen) & one)) >> sixteen
                    else:
                        scaled[code] = value
                for group in range(block * block_size // 8, (block + 1) * block_size // 8):
                    word64 = np.uint64(0)
                    for index in range(bits):
                        word64 = (word64 << byte) | np.uint64(packed[row, group * bits + index])
                    for code in range(8):
                        out[row, group * 8 + code] = scaled[(word64 >> np.uint64(bits * (7 - code))) & mask]

    return decode  # type: ignore[no-any-return]


def decode_rotated(
    packed: torch.Tensor, norms: torch.Tensor, levels: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Levels times norms, rounded once, from float32: weights whose rotation has not been undone.

    Args:
        packed: uint8 ``[rows, row_bytes]``, codes MSB-first, contiguous, on the CPU.
        norms: float32 ``[rows, blocks]``, not negative and finite.
        levels: float32 ``[2 ** bits]``.
        block_size: weights that share a norm, a multiple of 8.
        out: ``[rows, blocks * block_size]`` to write to, BF16 or float32.
    """
    bits = len(levels).bit_length() - 1
    to_bf16 = out.dtype == torch.bfloat16
    memory = out.view(torch.int16).numpy().view(np.uint16) if to_bf16 else out.numpy()
    _kernel(bits, to_bf16)(packed.numpy(), norms.numpy(), levels.numpy(), memory, block_size)
