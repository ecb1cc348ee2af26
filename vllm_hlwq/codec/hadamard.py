"""The Walsh-Hadamard matrix that spreads a block's weights evenly before they are coded.

A dense product, not a fast transform: at block size 128 a matrix library's product beats log2(128) passes over memory.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def sylvester(size: int, device: torch.device) -> torch.Tensor:
    """Natural-order Hadamard matrix without its normalisation: float32 ``[size, size]`` of +1 and -1.

    ``H[i, j] = (-1) ** popcount(i & j)``; ``H / sqrt(size)`` is symmetric and its own inverse.
    The result is shared: do not write to it.

    Raises:
        ValueError: ``size`` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"block size {size} is no power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)
