"""Searching the factor of a block, and coding half-filled blocks: what lowers the error beyond the plain norm.

A block's squared error at its best factor is a rugged function of the factor its codes were chosen for, with a local
minimum every few per cent, so the neighbourhood of many starting factors is tried. Trying needs no exact nearest level:
any codes are valid, and those that are kept are chosen again exactly.
"""

from __future__ import annotations

import math

import torch

from .scratch import Scratch

MIN_NORM = 1e-10
CELLS_PER_GAP = 8
"""Cells between two levels, on average; twice as many lower the error at 5 bits by less than 0.1 %."""
MAX_CELLS = 2**18
LEAST_START = 0.5
"""Least multiple of a block's norm that is tried: it bounds the cells."""


def dot(a: torch.Tensor, b: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Inner products ``[m]`` of blocks; ``vecdot`` would take new memory for their elements' products."""
    return torch.mul(a, b, out=scratch.take("indices", a.shape, torch.float32)).sum(1)


class LevelCells:
    """A table of equal cells that gives a coordinate's level with one look-up.

    It is the nearest level, but for coordinates in the same cell as a threshold, where it may be the neighbour.

    Args:
        levels: ascending float32 on the CPU.
        width: coordinates that are rotated together.
        device: where blocks are coded.
    """

    def __init__(self, levels: torch.Tensor, width: int, device: torch.device) -> None:
        reach = math.sqrt(width) / LEAST_START  # no rotated coordinate exceeds its block's norm times the root
        span = float(levels[-1] - levels[0])
        self._resolution = min(CELLS_PER_GAP * len(levels) / span, MAX_CELLS / (2 * reach + 2))
        self._zero = math.ceil((reach + 1) * self._resolution)
        centres = (torch.arange(2 * self._zero) - self._zero + 0.5) / self._resolution
        self.index = torch.bucketize(centres, (levels[1:] + levels[:-1]) / 2)
        """Index of each cell's level, on the CPU."""
        self._levels = levels[self.index].to(device)
        self._offset = torch.tensor(float(self._zero), device=device)

    def cells(self, rotated: torch.Tensor, scale: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Cell int32 ``[m, n]`` of each coordinate ``[m, n]`` divided by the scale ``[m]``, in scratch memory."""
        work = scratch.take("work", rotated.shape, torch.float32)
        per_unit = (self._resolution / scale).unsqueeze(1)
        torch.addcmul(self._offset, rotated, per_unit, out=work)
        return scratch.take("indices", rotated.shape, torch.int32).copy_(work)  # above zero, so this is the floor

    def fit(self, rotated: torch.Tensor, scale: torch.Tensor, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """Least-squares factor ``<r, c> / <c, c>`` and fitted energy ``<r, c> ** 2 / <c, c>`` for codes at a scale.

        Args:
            rotated: float32 ``[m, n]``.
            scale: ``[m]``, what ``rotated`` is divided by.
            scratch: memory to work in.

        Returns:
            Both ``[m]``. A block's squared error is its energy less the fitted energy.
        """
        cells = self.cells(rotated, scale, scratch)
        levels = scratch.take("work", rotated.shape, torch.float32)
        torch.index_select(self._levels, 0, cells.view(-1), out=levels.view(-1))
        along = dot(rotated, levels, scratch)
        # Means of two levels have a zero among them, so a block of zeros has no energy at all.
        energy = dot(levels, levels, scratch).clamp_(min=torch.finfo(torch.float32).tiny)
        return (along / energy).clamp_(min=MIN_NORM), along * along / energy

    def best(
        self, rotated: torch.Tensor, norms: torch.Tensor, starts: tuple[float, ...], scratch: Scratch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``fit``, for the best of several multiples of the norms ``[m]``."""
        factor, fitted = self.fit(rotated, norms * starts[0], scratch)
        for start in starts[1:]:
            tried, energy = self.fit(rotated, norms * start, scratch)
            factor = torch.where(energy > fitted, tried, factor)
            fitted = torch.maximum(energy, fitted)
        return factor, fitted


class HalfFilled:
    """Codes blocks of which at most the first half are weights, with two codes for each.

    The decoder drops the padded columns, so they need not be zero. With Sylvester's matrix
    ``H = [[h, h], [h, -h]]`` the first half decodes to ``h (a + b)`` times the factor, a and b the levels of the two
    halves: each rotated coordinate is fitted by a mean of two levels, of which 5 bits have 528.
    """

    def __init__(self, table: torch.Tensor, width: int, device: torch.device) -> None:
        first, second = torch.triu_indices(len(table), len(table))
        means, order = ((table[first] + table[second]) / 2).sort()
        self._means = LevelCells(means, width, device)
        self._codes = [half[order][self._means.index].to(torch.uint8).to(device) for half in (first, second)]

    def choose(
        self, rotated: torch.Tensor, norms: torch.Tensor, starts: tuple[float, ...], scratch: Scratch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 ``[m, block_size]`` and factors ``[m]``.

        Args:
            rotated: float32 ``[m, block_size / 2]``, the first half of the rotated blocks; the second is the same.
            norms: ``[m]``.
            starts: multiples of the norms that are tried.
            scratch: memory to work in.
        """
        scale, _ = self._means.best(rotated, norms, starts, scratch)
        factor, _ = self._means.fit(rotated, scale, scratch)
        cells = self._means.cells(rotated, scale, scratch)
        return torch.cat([table[cells] for table in self._codes], dim=1), factor
