"""Attention's two products with packed codes, on a CPU: nothing is decoded to memory, and nothing is rotated back.

Levels are computed, not looked up: an odd polynomial through a table's levels vectorises, a look-up does not. Eight
codes are one number of ``8 * bits`` bits, so one shift and mask yields the same one of the eight of every group.
numba, which vLLM requires too, compiles both products at their first use, in about a second for each width of code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from ..codec import codebook

GROUP = 8
TILE = 4
"""Tokens whose values are added in one pass over the sums."""
TOKENS_PER_THREAD = 256
"""Fewer are done sooner than another thread is awake."""
FLAGS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "boundscheck": False}


class Kernels(NamedTuple):
    """Compiled functions of codes ``[tokens, heads * head bytes]`` and norms ``[tokens, heads]`` from start to stop.

    Queries and results list a head's coordinates as ``[8, groups]``: coordinate ``8 * group + place``.

    scores: codes, norms, queries ``[heads, rows, 8, groups]``, out ``[heads, rows, tokens or more]``, start, stop.
    mix: codes, norms, weights ``[heads, rows, tokens or more]``, sums ``[heads, rows, 8, groups]`` to add to, start,
        stop.
    """

    scores: Callable[..., None]
    mix: Callable[..., None]


def odd_polynomial(levels: torch.Tensor) -> tuple[np.float32, ...]:
    """Coefficients, lowest first, of ``x * (a + b x^2 + ...)`` that gives level ``c`` at ``(c + 0.5) / half - 1``."""
    half = len(levels) // 2
    x = (np.arange(half) + 0.5) / half
    powers = np.stack([x ** (2 * power + 1) for power in range(half)], axis=1)
    return tuple(np.float32(value) for value in np.linalg.solve(powers, levels[half:].double().numpy()))


@cache
def kernels(bits: int) -> Kernels:
    """The two products for codes of ``bits`` bits."""
    coefficients = odd_polynomial(codebook("C", bits))
    last = len(coefficients) - 1
    centre, per_code = np.float32(last + 0.5), np.float32(1 / (last + 1))
    top, mask = (GROUP - 1) * bits, (1 << bits) - 1
    zero = np.float32(0)

    def levels(row: Any, words: Any, out: Any) -> None:
        for i in range(words.shape[0]):
            word = np.int32(0)
            for byte in range(bits):
                word = (word << 8) | np.int32(row[bits * i + byte])
            words[i] = word
        for j in range(GROUP):
            shift = top - bits * j
            for i in range(words.shape[0]):
                x = (np.float32((words[i] >> shift) & mask) - centre) * per_code
                square = x * x
                value = coefficients[last]
                for term in range(last):
                    value = value * square + coefficients[last - 1 - term]
                out[j, i] = x * value

    levels_of = numba.njit(**FLAGS)(levels)

    def scores(codes: Any, norms: Any, queries: Any, out: Any, start: int, stop: int) -> None:
        heads, rows, _, groups = queries.shape
        words = np.empty(heads * groups, np.int32)
        level = np.empty((GROUP, heads * groups), np.float32)
        for t in range(start, stop):
            levels_of(codes[t], words, level)
            for h in range(heads):
                o = h * groups
                for k in range(rows):
                    q = queries[h, k]
                    total = zero
                    for i in range(groups):
                        # Written out: one sum over a head's coordinates, where a loop would make eight.
                        total += (
                            (q[0, i] * level[0, o + i] + q[1, i] * level[1, o + i])
                            + (q[2, i] * level[2, o + i] + q[3, i] * level[3, o + i])
                            + (q[4, i] * level[4, o + i] + q[5, i] * level[5, o + i])
                            + (q[6, i] * level[6, o + i] + q[7, i] * level[7, o + i])
                        )
                    out[h, k, t] = total * norms[t, h]

    def mix(codes: Any, norms: Any, weights: Any, sums: Any, start: int, stop: int) -> None:
        heads, rows, _, groups = sums.shape
        words = np.empty(heads * groups, np.int32)
        level = np.empty((TILE, GROUP, heads * groups), np.float32)
        whole = start + (stop - start) // TILE * TILE
        for t in range(start, whole, TILE):
            for u in range(TILE):
                levels_of(codes[t + u], words, level[u])
            for h in range(heads):
                o = h * groups
                for k in range(rows):
                    a, b = weights[h, k, t] * norms[t, h], weights[h, k, t + 1] * norms[t + 1, h]
                    c, d = weights[h, k, t + 2] * norms[t + 2, h], weights[h, k, t + 3] * norms[t + 3, h]
                    for j in range(GROUP):
                        for i in range(groups):
                            sums[h, k, j, i] += (a * level[0, j, o + i] + b * level[1, j, o + i]) + (
                                c * level[2, j, o + i] + d * level[3, j, o + i]
                            )
        for t in range(whole, stop):
            levels_of(codes[t], words, level[0])
            for h in range(heads):
                for k in range(rows):
                    a = weights[h, k, t] * norms[t, h]
                    for j in range(GROUP):
                        for i in range(groups):
                            sums[h, k, j, i] += a * level[0, j, h * groups + i]

    return Kernels(numba.njit(**FLAGS)(scores), numba.njit(**FLAGS)(mix))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "kv-cache")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def shares(tokens: int) -> list[tuple[int, int]]:
    """Ranges of tokens, one for each of torch's threads, in whole tiles but for the last."""
    threads = max(1, min(torch.get_num_threads(), tokens // TOKENS_PER_THREAD))
    size = -(-tokens // (threads * TILE)) * TILE
    return [(start, min(tokens, start + size)) for start in range(0, tokens, size)]


def run_shares(work: Callable[[int, int, int], None], tokens: int) -> None:
    """Call ``work(share, start, stop)`` for all shares, the first on this thread and each other on one of its own."""
    ranges = shares(tokens)
    others: list[Future[None]] = []
    if len(ranges) > 1:
        pool = _pool(torch.get_num_threads() - 1)
        others = [pool.submit(work, share, *ranges[share]) for share in range(1, len(ranges))]
    work(0, *ranges[0])
    for other in others:
        other.result()
