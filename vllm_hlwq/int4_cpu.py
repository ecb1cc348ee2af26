"""The search of INT4 scales and the packing of codes on a CPU, compiled: a group stays in registers for all scales.

As torch operations each of some fourteen scales is six passes over memory, and the search of a model's experts takes
far longer than decoding them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit

PER_WORD = 8


def _compiled(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """numba's ``njit``; machine code is kept for other processes where a folder for it can be written."""

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        try:
            found: Callable[..., None] = njit(cache=True, **options)(function)
        except RuntimeError:  # "no locator available"
            found = njit(**options)(function)
        return found

    return compiled


# Division by zero gives inf, and sums are in any order: only so are loops vectors.
@_compiled(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})
def _search(groups, candidates, best):  # type: ignore[no-untyped-def]
    for group in range(groups.shape[0]):
        weights, least = groups[group], np.float32(np.inf)
        for number in range(candidates.shape[1]):
            scale, error = candidates[group, number], np.float32(0)
            for index in range(weights.shape[0]):
                level = np.rint(weights[index] / scale)
                level = np.float32(-8) if level < np.float32(-8) else level
                level = np.float32(7) if level > np.float32(7) else level
                rest = level * scale - weights[index]
                error += rest * rest
            if error < least:
                least, best[group] = error, number


@_compiled(nogil=True, error_model="numpy")
def _pack(groups, scales, packed):  # type: ignore[no-untyped-def]
    levels = np.empty(groups.shape[1], np.uint32)
    for group in range(groups.shape[0]):
        for index in range(groups.shape[1]):
            level = np.rint(groups[group, index] / scales[group])
            level = np.float32(-8) if level < np.float32(-8) else level
            level = np.float32(7) if level > np.float32(7) else level
            levels[index] = np.uint32(np.int32(level) + np.int32(8))
        for word in range(packed.shape[1]):
            value = np.uint32(0)
            for code in range(8):
                value |= levels[8 * word + code] << np.uint32(4 * code)
            packed[group, word] = value


def search_scale(groups: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Index int64 ``[m]`` of each group's scale of least squared error, the first of equals.

    Args:
        groups: weights float32 ``[m, group_size]``, contiguous.
        candidates: scales float32 ``[m, candidates]``, positive.
    """
    best = torch.zeros(len(groups), dtype=torch.int64)
    _search(groups.numpy(), candidates.numpy(), best.numpy())
    return best


def pack_codes(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest codes, eight in a word and the first lowest: int32 ``[m, group_size / 8]``, each code plus 8.

    Args:
        groups: weights float32 ``[m, group_size]``, contiguous; the group size is divisible by 8.
        scales: float32 ``[m]``, positive.
    """
    packed = torch.empty(len(groups), groups.shape[1] // PER_WORD, dtype=torch.int32)
    _pack(groups.numpy(), scales.numpy(), packed.numpy().view(np.uint32))
    return packed
