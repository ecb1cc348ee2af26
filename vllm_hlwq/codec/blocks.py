"""Blocks of rotated weights to codes and back: the arithmetic of HLWQ on ``[blocks, block_size]`` at a time.

The nearest level is found through a table of narrow, equal cells, each of which at most one decision threshold
crosses: one look-up gives the code below the threshold, one the threshold, and a comparison the rest. That is exact,
where comparing with every level would need ``levels`` times the memory and a binary search ten times the time.

All there is to work in are four buffers of the size of the blocks: ``blocks``, ``rotated``, ``work`` and ``indices``.
What is done with serves what comes next: codes lie where the coordinates were, packing works where the look-ups did.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch

from .codebooks import boundaries
from .hadamard import sylvester
from .packing import pack, unpack_pairs
from .scratch import Scratch
from .search import LEAST_START, MIN_NORM, HalfFilled, LevelCells, dot

MAX_NORM = 65504.0
"""Largest float16."""
MAX_CELLS = 2**18
CHUNK_BLOCKS = 8192
"""Blocks that a thread codes at a time: 4 MiB of float32. Smaller chunks stay in a core's own cache, but threads then
wait for one another at Python's lock: on two threads 2,048 blocks take 1.4 times as long, 512 three times."""
CUDA_CHUNK_BLOCKS = 2**17


@dataclass(frozen=True)
class Refinement:
    """What is done beyond the plain norm to lower the error; every result decodes by the same published rule.

    gain: store the least-squares factor ``<z, c> / <c, c> * norm`` instead of the norm.
    rounds: how often codes are chosen again for the stored factor, and the factor for the codes.
    starts: multiples of the norm that codes are first chosen for; the best of them goes into the rounds.
    wide: further starts, for blocks whose largest coordinate the table would clip at their norm.
    padding: let the columns that pad a row's last block, which decoding drops, decode to anything.
    """

    gain: bool = True
    rounds: int = 0
    starts: tuple[float, ...] = (1.0,)
    wide: tuple[float, ...] = ()
    padding: bool = False

    def __post_init__(self) -> None:
        if min(self.starts + self.wide, default=0) < LEAST_START:
            raise ValueError(
                f"factors are searched from {LEAST_START} times the norm; {self} has a lower start, or none"
            )

    @property
    def searches(self) -> bool:
        return len(self.starts) > 1 or bool(self.wide)


NORM = Refinement(gain=False)
GAIN = Refinement()
STARTS = tuple(0.7 * (1.2 / 0.7) ** (step / 11) for step in range(12))
"""Equal ratios over where the best factors of 98 in 100 blocks of Gaussian or trained weights lie. At 5 bits they come
within 1 % of the least possible error, at 6 bits within 4 %."""
SEARCH = Refinement(rounds=1, starts=STARTS, wide=(1.3, 1.7, 2.2, 3.0), padding=True)


class BlockCoder:
    """Codes blocks with one table on one device.

    Args:
        table: ascending float32 levels ``[2 ** bits]``.
        block_size: weights in a block, a power of two.
        device: where blocks are coded.

    Raises:
        ValueError: the table is not ascending, not finite, or its length is no power of two from 4 to 256.
    """

    def __init__(self, table: torch.Tensor, block_size: int, device: torch.device) -> None:
        self.bits = len(table).bit_length() - 1
        if len(table) != 1 << self.bits or not 2 <= self.bits <= 8:
            raise ValueError(f"a codebook has 4 to 256 levels, a power of two; this one has {len(table)}")
        table = table.float().cpu()
        if not table.isfinite().all() or not (table.diff() > 0).all():
            raise ValueError("a codebook's levels must be finite and ascending; these are not")
        self.block_size = block_size
        self.device = device
        self.table = table.to(device)
        self.hadamard = sylvester(block_size, device)
        self.scratch = Scratch(device)
        self._twins: list[BlockCoder] = []
        self._prepare_cells(table)
        # Decoding's factor of 1 / block_size is in the table; a pair of levels is one 8-byte look-up.
        scaled = table / block_size
        pairs = torch.stack([scaled.repeat_interleave(len(table)), scaled.repeat(len(table))], dim=1).contiguous()
        self._scaled = scaled.to(device)
        self._pairs = pairs.view(torch.float64).view(-1).to(device)

    def twins(self, count: int) -> list[BlockCoder]:
        """This coder and ``count - 1`` more that share its tables, each with working memory of its own."""
        while len(self._twins) < count - 1:
            twin = copy(self)
            twin.scratch = Scratch(self.device)
            self._twins.append(twin)
        return [self, *self._twins[: count - 1]]

    def _prepare_cells(self, table: torch.Tensor) -> None:
        thresholds = boundaries(table)
        # The largest float32 that is not above the threshold: z > threshold exactly when z > that.
        below = thresholds.float()
        below = torch.where(below.double() > thresholds, torch.nextafter(below, torch.tensor(-math.inf)), below)
        # No coordinate of a block exceeds its norm times the root, so at its norm nothing need be clamped.
        self._limit = max(float(table.abs().max()), math.sqrt(self.block_size)) + 1
        self._resolution = 16
        while True:
            self._zero = torch.tensor(float(math.ceil(self._limit * self._resolution) + 1))
            cells = self._cell_of(below)
            if bool((cells.diff() > 0).all()):
                break
            self._resolution *= 2
            if self._limit * self._resolution > MAX_CELLS:
                raise ValueError("two levels of the codebook are too close to tell apart")
        index = torch.arange(2 * int(self._zero) + 1)
        lower = torch.searchsorted(cells.long(), index)  # thresholds in lower cells
        threshold = torch.full((len(index),), math.inf)
        threshold[cells.long()] = below
        self._lower_code = lower.to(torch.uint8).to(self.device)
        self._threshold = threshold.to(self.device)
        self._zero = self._zero.to(self.device)

    def _cell_of(
        self, z: torch.Tensor, work: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cell of each coordinate, int32. The sum is rounded, but never to another order, so the table stays exact."""
        position = torch.add(self._zero, z, alpha=self._resolution, out=work)
        return position.to(torch.int32) if out is None else out.copy_(position)

    def _nearest(self, z: torch.Tensor, clamp: bool = True) -> torch.Tensor:
        """Code of the level nearest to each coordinate of ``z``, ties to the lower; ``z``'s memory holds them then.

        Without ``clamp`` coordinates must be within the limit; it is a pass over memory that outgrows a core's cache.
        """
        flat = (z.clamp_(-self._limit, self._limit) if clamp else z).view(-1)
        work = self.scratch.take("work", flat.shape, torch.float32)
        cells = self._cell_of(flat, work, self.scratch.take("indices", flat.shape, torch.int32))
        torch.index_select(self._threshold, 0, cells, out=work)
        # Above the threshold the difference is negative and its sign, spread over the word, -1: half a comparison's
        # time. Equal numbers differ by +0.
        work.sub_(flat)
        signs = self.scratch.take("work", flat.shape, torch.int32).bitwise_right_shift_(31)
        codes = flat.view(torch.uint8)[: len(flat)]
        torch.index_select(self._lower_code, 0, cells, out=codes)
        codes.view(torch.int8).sub_(self.scratch.take("indices", flat.shape, torch.int8).copy_(signs))
        return codes.view(z.shape)

    def _levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Level of each code, in working memory."""
        index = self.scratch.take("indices", codes.shape, torch.int32).copy_(codes)
        levels = self.scratch.take("work", codes.shape, torch.float32)
        torch.index_select(self.table, 0, index.view(-1), out=levels.view(-1))
        return levels

    def _choose(
        self, rotated: torch.Tensor, norms: torch.Tensor, scale: torch.Tensor, refinement: Refinement
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, in scratch memory, where the blocks may have been, and factor [m], starting from ``scale`` [m]."""
        z = self.scratch.take("blocks", rotated.shape, torch.float32)
        for _ in range(refinement.rounds + 1):
            codes = self._nearest(torch.div(rotated, scale.unsqueeze(1), out=z), clamp=scale is not norms)
            if not refinement.gain:
                break
            levels = self._levels(codes)
            along = dot(rotated, levels, self.scratch)
            scale = (along / dot(levels, levels, self.scratch)).clamp_(min=MIN_NORM)
        return codes, scale

    def encode(
        self,
        blocks: torch.Tensor,
        refinement: Refinement,
        packed: torch.Tensor,
        measure: bool = False,
        row_blocks: int = 1,
        padding: int = 0,
    ) -> tuple[torch.Tensor, float]:
        """Code blocks.

        Args:
            blocks: float32 ``[m, block_size]``, contiguous.
            refinement: how much is done to lower the error.
            packed: uint8 ``[m * block_size * bits / 8]`` to write the codes to, MSB-first.
            measure: whether the error is wanted; else it is 0.
            row_blocks: blocks in a row of the matrix.
            padding: zeros at the end of each row's last block that are no weights.

        Returns:
            The factors as stored, float16 ``[m]``, and the sum of the weights' squared errors, before rounding to BF16.

        Raises:
            ValueError: a weight is not finite, or a factor exceeds float16.
        """
        norms = torch.linalg.vector_norm(blocks, dim=1).clamp_(min=MIN_NORM)
        if not bool(norms.isfinite().all()):
            raise ValueError("holds NaN, inf, or weights whose squares exceed float32")
        rotated = self.scratch.take("rotated", blocks.shape, torch.float32)
        torch.mm(blocks, self.hadamard, out=rotated)
        scale = self._search(rotated, norms, refinement) if refinement.searches else norms
        codes, factors = self._choose(rotated, norms, scale, refinement)
        last = slice(row_blocks - 1, None, row_blocks)
        half = self.block_size // 2
        if refinement.padding and padding >= half:
            codes[last], factors[last] = self._half_filled.choose(
                rotated[last, :half].contiguous(), norms[last], refinement.starts, self.scratch
            )
        largest = float(factors.max()) if len(factors) else 0.0
        if largest > MAX_NORM:
            raise ValueError(f"has a block of norm {largest:.6g}, beyond float16's {MAX_NORM:g}")
        stored = factors.half()
        error = 0.0
        if measure:
            rest = rotated.sub_(self._levels(codes).mul_(stored.float().unsqueeze(1)))
            if padding:
                rest[last] = torch.mm(rest[last], self.hadamard).div_(math.sqrt(self.block_size))
                rest[last, self.block_size - padding :] = 0
            error = float(torch.linalg.vector_norm(rest).square().double()) / self.block_size
        pack(codes, self.bits, out=packed, scratch=self.scratch)
        return stored, error

    @cached_property
    def _cells(self) -> LevelCells:
        return LevelCells(self.table.cpu(), self.block_size, self.device)

    @cached_property
    def _half_filled(self) -> HalfFilled:
        return HalfFilled(self.table.cpu(), self.block_size // 2, self.device)

    def _search(self, rotated: torch.Tensor, norms: torch.Tensor, refinement: Refinement) -> torch.Tensor:
        """The best factor [m] that the starts lead to; wider ones are tried for blocks with clipped coordinates."""
        factor, fitted = self._cells.best(rotated, norms, refinement.starts, self.scratch)
        if not refinement.wide:
            return factor
        peak = rotated.abs().amax(dim=1) / norms
        clipped = torch.nonzero(peak > self.table[-1] + (self.table[-1] - self.table[-2]) / 2).view(-1)
        if len(clipped):
            wide, energy = self._cells.best(rotated[clipped], norms[clipped], refinement.wide, self.scratch)
            factor[clipped] = torch.where(energy > fitted[clipped], wide, factor[clipped])
        return factor

    def decode(self, packed: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Weights float32 ``[m, block_size]`` of packed codes and norms [m]; in scratch memory until the next call."""
        count = len(norms) * self.block_size
        levels = self.scratch.take("rotated", (len(norms), self.block_size), torch.float32)
        if self.bits == 8:
            index = self.scratch.take("indices", (count,), torch.int32).copy_(packed)
            torch.index_select(self._scaled, 0, index, out=levels.view(-1))
        else:
            pairs = unpack_pairs(packed, count, self.bits, self.scratch)
            torch.index_select(self._pairs, 0, pairs, out=levels.view(-1).view(torch.float64))
        return self._unrotate(levels, norms)

    def decode_codes(self, codes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """As ``decode``, from codes uint8 ``[m, block_size]``."""
        index = self.scratch.take("indices", codes.shape, torch.int32).copy_(codes)
        levels = self.scratch.take("rotated", codes.shape, torch.float32)
        torch.index_select(self._scaled, 0, index.view(-1), out=levels.view(-1))
        return self._unrotate(levels, norms)

    def _unrotate(self, levels: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        weights = self.scratch.take("blocks", levels.shape, torch.float32)
        torch.mm(levels, self.hadamard, out=weights)
        return weights.mul_(norms.float().unsqueeze(1))
