"""The product with a coded weight on a CPU: chunks of it are decoded and multiplied while they are in a core's cache.

Codes to rotated weights is one pass: unpack, look up, scale, round. As torch operations these are passes over memory of
their own, and took three times as long as the product that follows. A block's levels are multiplied by its norm and
rounded once, in a table; its codes then are look-ups in it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch.nn import functional

from ..codec.chunks import single_threaded
from ..codec.scratch import Scratch
from .coded_weight import norm_values, rotate

if TYPE_CHECKING:
    from .coded_weight import CodeFormat

CHUNK_WEIGHTS = 2**20
"""Weights that a thread decodes and multiplies at a time: few enough for a core's cache, enough to be worth a call."""
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
    _kernel(bits, to_bf16)(packed.numpy(), norms.numpy(), levels.numpy(), memory, block_size)


class _OwnMemory(threading.local):
    """Memory to decode into. Fresh memory would cost more than decoding: the system clears each of its pages."""

    def __init__(self) -> None:
        self.scratch = Scratch(CPU)


_own = _OwnMemory()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: torch's own would spin in wait of work for a while, on the cores that these need."""
    return ThreadPoolExecutor(threads, "hlwq", single_threaded)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def _for_ranges(work: Callable[[int, int], None], count: int, step: int) -> None:
    """``work(start, stop)`` for ranges that cover ``count``, on as many threads as torch has."""
    threads = torch.get_num_threads()
    ranges = [(start, min(count, start + step)) for start in range(0, count, step)]
    if threads == 1 or len(ranges) == 1:
        for start, stop in ranges:
            work(start, stop)
    else:
        list(_pool(threads).map(work, *zip(*ranges, strict=True)))


@torch.no_grad()
def rotated_linear(
    activation: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat
) -> torch.Tensor:
    """``coded_linear`` for ``[tokens, in_features]`` on the CPU."""
    width, tokens = layout.blocks * layout.block_size, len(activation)
    dtype = activation.dtype
    rotated, out = torch.empty(tokens, width, dtype=dtype), torch.empty(tokens, len(packed), dtype=dtype)
    levels, scales = layout.levels(CPU), norm_values(norms).float()
    direct = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    layout.coder(CPU)  # made here, not on several threads

    def rotate_tokens(start: int, stop: int) -> None:
        rotated[start:stop] = rotate(activation[start:stop], layout)

    def multiply_rows(start: int, stop: int) -> None:
        weight = _own.scratch.take("weight", (stop - start, width), direct)
        decode_rotated(packed[start:stop], scales[start:stop], levels, layout.block_size, weight)
        out[:, start:stop] = functional.linear(rotated, weight.to(dtype))

    _for_ranges(rotate_tokens, tokens, max(16, -(-tokens // torch.get_num_threads())))
    _for_ranges(multiply_rows, len(packed), max(1, CHUNK_WEIGHTS // width))
    return out
