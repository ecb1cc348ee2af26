"""The product with a coded weight on a CPU: chunks of it are decoded, and multiplied by torch on all its threads.

Codes to rotated weights is one pass: unpack, look up, scale, round. As torch operations these are passes over memory of
their own, and took three times as long as the product that follows. A block's levels are multiplied by its norm and
rounded once, in a table; its codes then are look-ups in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch.nn import functional

from ..codec.chunks import for_ranges
from ..codec.scratch import Scratch
from . import avx512
from .coded_weight import norm_values, rotate

if TYPE_CHECKING:
    from .coded_weight import CodeFormat

CHUNK_WEIGHTS = 2**22
"""Weights that a thread decodes at a time: enough to be worth a product on all threads, 8 MiB in BF16."""
CPU = torch.device("cpu")


@cache
def _kernel(bits: int, to_bf16: bool) -> Callable[..., None]:
    """``(packed [rows, row_bytes], norms [rows, blocks], levels, out [rows, columns], block_size)``, compiled."""
    mask = np.uint64((1 << bits) - 1)
    half, sixteen, one, eight = np.uint32(0x7FFF), np.uint32(16), np.uint32(1), np.uint64(8)
    width = np.uint64(bits)

    @njit(nogil=True)
    def decode(packed, norms, levels, out, block_size):  # type: ignore[no-untyped-def]
        scaled = np.empty(len(levels), out.dtype)
        for row in range(norms.shape[0]):
            source, target = packed[row], out[row]
            # Unsigned: negative indices need not be thought of, which takes a tenth of the time.
            read, write = np.uint64(0), np.uint64(0)
            for block in range(norms.shape[1]):
                for code in range(len(levels)):
                    value = np.float32(levels[code] * norms[row, block])
                    if to_bf16:
                        word = value.view(np.uint32)
                        scaled[code] = (word + half + ((word >> sixteen) & one)) >> sixteen
                    else:
                        scaled[code] = value
                for _ in range(block_size // 8):
                    word64 = np.uint64(0)
                    for index in range(bits):
                        word64 = (word64 << eight) | np.uint64(source[read + np.uint64(index)])
                    for code in range(8):
                        target[write + np.uint64(code)] = scaled[(word64 >> np.uint64(bits * (7 - code))) & mask]
                    read, write = read + width, write + eight

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
    by_vector = to_bf16 and avx512.available() and avx512.takes(bits, block_size)
    kernel = avx512.kernel(bits) if by_vector else _kernel(bits, to_bf16)
    kernel(packed.numpy(), norms.numpy(), levels.numpy(), memory, block_size)


class _OwnMemory(threading.local):
    """Memory to decode into. Fresh memory would cost more than decoding: the system clears each of its pages."""

    def __init__(self) -> None:
        self.scratch = Scratch(CPU)


_own = _OwnMemory()


def _decoders() -> int:
    """Threads to decode on. Torch's own spin for a while after each of its operations, in wait of the next, so more
    than half of the cores are not to be had; two threads decode no faster than one beside one that spins."""
    return max(1, torch.get_num_threads() // 2)


@torch.no_grad()
def rotated_linear(
    activation: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat
) -> torch.Tensor:
    """``coded_linear`` for ``[tokens, in_features]`` on the CPU."""
    width, count, dtype = layout.blocks * layout.block_size, len(packed), activation.dtype
    rotated, out = rotate(activation, layout), torch.empty(len(activation), len(packed), dtype=dtype)
    levels, scales = layout.levels(CPU), norm_values(norms).float()
    direct = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    own = max(1, CHUNK_WEIGHTS // width)
    step = own * min(_decoders(), -(-count // own))
    for start in range(0, count, step):
        stop = min(count, start + step)
        weight = _own.scratch.take("weight", (stop - start, width), direct)

        def decode_rows(low: int, high: int, start: int = start, weight: torch.Tensor = weight) -> None:
            rows = slice(start + low, start + high)
            decode_rotated(packed[rows], scales[rows], levels, layout.block_size, weight[low:high])

        for_ranges(decode_rows, stop - start, own, _decoders())
        out[:, start:stop] = functional.linear(rotated, weight.to(dtype))
    return out
