"""The three codebooks in circulation, computed from their definitions; and which of them coded a file.

All come from Lloyd's iteration on a standard normal density. A and B stop after exactly 100 iterations from an even
grid, which does not converge from 4 bits up; files that carry no table were coded with one of them. C is the converged
optimum (Max, "Quantizing for minimum distortion", 1960).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, get_args

import torch

CodebookName = Literal["A", "B", "C"]
NAMES: tuple[str, ...] = get_args(CodebookName)
BITS = range(2, 9)
EARLY_STOP = 100
DETECTION_CODES = 10**7
"""Codes needed before their frequencies say which table was used."""
SHARE_TOLERANCE = 0.15
"""Relative. At 5 bits the tables' shares of outermost codes lie 45 % or more apart."""


def _density(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _mass(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Probability of (low, high]; by the complementary function on one side, so that far tails keep their digits."""
    sign = torch.where(low + high > 0, -1.0, 1.0)
    a, b = torch.where(sign < 0, -high, low), torch.where(sign < 0, -low, high)
    mass: torch.Tensor = 0.5 * (torch.special.erfc(-b / math.sqrt(2)) - torch.special.erfc(-a / math.sqrt(2)))
    return mass


def _centroids(boundaries: torch.Tensor) -> torch.Tensor:
    low, high = boundaries[:-1], boundaries[1:]
    return (_density(low) - _density(high)) / _mass(low, high)


def _stopped_early(bits: int, outer: float, dtype: torch.dtype) -> torch.Tensor:
    """Lloyd's iteration from ``linspace(-4, 4)``, boundaries kept in ``dtype``, the outermost held at ``outer``."""
    boundaries = torch.linspace(-4, 4, 2**bits + 1, dtype=torch.float64).to(dtype)
    boundaries[0], boundaries[-1] = -outer, outer
    for _ in range(EARLY_STOP):
        centroids = _centroids(boundaries.double())
        boundaries[1:-1] = ((centroids[:-1] + centroids[1:]) / 2).to(dtype)
    return centroids


def _converged(bits: int) -> torch.Tensor:
    """Newton's method on the boundaries: Lloyd's fixed point without its tens of thousands of iterations.

    ``f(t)_k = 2 t_k - c_k(t) - c_{k+1}(t)`` is zero there; its Jacobian is tridiagonal.
    """
    levels = 2**bits
    # The optimum's point density is proportional to density ** (1/3): a normal of variance 3 (Panter and Dite).
    steps = torch.arange(1, levels, dtype=torch.float64) / levels
    boundaries = math.sqrt(3) * math.sqrt(2) * torch.erfinv(2 * steps - 1)
    infinity = torch.full((1,), math.inf, dtype=torch.float64)
    for _ in range(100):
        padded = torch.cat([-infinity, boundaries, infinity])
        centroids = _centroids(padded)
        mass = _mass(padded[:-1], padded[1:])
        density = _density(boundaries)
        # A centroid moves with its upper boundary t by density * (t - c) / mass, with its lower by the negative.
        own = density * ((boundaries - centroids[:-1]) / mass[:-1] + (centroids[1:] - boundaries) / mass[1:])
        jacobian = torch.diag(2 - own)
        jacobian -= torch.diag(density[:-1] * (centroids[1:-1] - boundaries[:-1]) / mass[1:-1], -1)
        jacobian -= torch.diag(density[1:] * (boundaries[1:] - centroids[1:-1]) / mass[1:-1], 1)
        step = torch.linalg.solve(jacobian, 2 * boundaries - centroids[:-1] - centroids[1:])
        boundaries = boundaries - step
        if step.abs().max() < 1e-13:
            break
    return _centroids(torch.cat([-infinity, boundaries, infinity]))


@cache
def codebook(name: CodebookName, bits: int) -> torch.Tensor:
    """Ascending float32 table ``[2 ** bits]`` of levels for weights of variance 1. Shared: do not write to it.

    Raises:
        ValueError: no such table.
    """
    if bits not in BITS:
        raise ValueError(f"no codebook of {bits} bits; choose {BITS.start} to {BITS.stop - 1}")
    if name == "A":
        table = _stopped_early(bits, math.inf, torch.float64)
    elif name == "B":
        table = _stopped_early(bits, 4.0, torch.float32)
    elif name == "C":
        table = _converged(bits)
    else:
        raise ValueError(f"no codebook {name!r}; choose A, B or C")
    # Exactly antisymmetric, which rounding alone would not give.
    return ((table - table.flip(0)) / 2).float()


def boundaries(table: torch.Tensor) -> torch.Tensor:
    """The float64 decision thresholds ``[levels - 1]`` between neighbouring levels of an ascending table."""
    wide = table.double()
    return (wide[:-1] + wide[1:]) / 2


@cache
def expected_shares(name: CodebookName, bits: int, block_size: int) -> tuple[float, float]:
    """Shares of the two outermost codes, and of the two next to them, among the codes of Gaussian blocks.

    A coordinate of a normalised block is that of a point on a sphere: density proportional to
    ``(1 - z^2 / n) ** ((n - 3) / 2)``, whose tails are lighter than a normal variable's.
    """
    z = torch.linspace(0, math.sqrt(block_size), 200_001, dtype=torch.float64)
    density = (1 - z * z / block_size).clamp(min=0) ** ((block_size - 3) / 2)
    below = torch.cumulative_trapezoid(density, z)
    inner, outer = (int(torch.searchsorted(z, edge)) for edge in boundaries(codebook(name, bits))[-2:])
    beyond = 1 - below / below[-1]
    return beyond[outer].item(), (beyond[inner] - beyond[outer]).item()


def detect(counts: torch.Tensor, block_size: int) -> CodebookName | None:
    """Name the table that a file was coded with, from how often each code occurs.

    Args:
        counts: ``[2 ** bits]`` occurrences of each code; the caller has seen to ``DETECTION_CODES`` in all.
        block_size: weights in a block.

    Returns:
        None if no table fits, or more than one.
    """
    bits = len(counts).bit_length() - 1
    shares = counts.double() / counts.sum()
    seen = ((shares[0] + shares[-1]).item(), (shares[1] + shares[-2]).item())

    def fits(name: CodebookName) -> bool:
        expected = expected_shares(name, bits, block_size)
        return all(abs(s - e) <= SHARE_TOLERANCE * e for s, e in zip(seen, expected, strict=True))

    fitting: list[CodebookName] = [name for name in get_args(CodebookName) if fits(name)]
    return fitting[0] if len(fitting) == 1 else None
