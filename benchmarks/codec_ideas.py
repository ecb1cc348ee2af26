"""Ways to lower the codec's error at the same bits, those that were not kept too, against the least error possible.

    python benchmarks/codec_ideas.py BF16_DIR

For given factor the nearest levels are the best codes, so the best codes of a block are nearest levels for some factor,
and trying every factor at which a code changes finds them: ``every factor`` is the least error that any choice of codes
and factor reaches with a table. Ideas are written plainly here; what was kept is the codec's own. BF16_DIR is what
examples/tiny_moe/train.py wrote. Writes ``benchmarks/results/codec_ideas.json``, rendered into docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from vllm_hlwq.bench import environment
from vllm_hlwq.codec import GAIN, SEARCH, BlockCoder, Refinement, codebook, quantize_matrix
from vllm_hlwq.codec.blocks import STARTS
from vllm_hlwq.codec.codebooks import boundaries
from vllm_hlwq.codec.hadamard import sylvester

RESULT = Path(__file__).resolve().parent / "results/codec_ideas.json"
BITS = (3, 4, 5, 6)
BLOCK_SIZE = 128
BLOCKS = 2048
LLOYD_ITERATIONS = 8
CPU = torch.device("cpu")
Idea = Callable[[torch.Tensor, torch.Tensor], float]
"""Rotated blocks float32 ``[m, 128]`` and a table to the relative mean squared error."""


def levels_at(rotated: torch.Tensor, factor: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The level nearest to each coordinate over its block's factor ``[m]``."""
    return table[torch.bucketize(rotated / factor.unsqueeze(1), boundaries(table).float())]


def best_factor(rotated: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return (rotated * levels).sum(1) / levels.square().sum(1)


def error_of(rotated: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Squared errors ``[m]`` at the least-squares factors."""
    return (rotated - best_factor(rotated, levels).unsqueeze(1) * levels).square().sum(1)


def searched(rotated: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Levels that the best of the codec's starts leads to, after one more round."""
    factor = norms = rotated.norm(dim=1) / math.sqrt(rotated.shape[1])
    least = torch.full_like(norms, math.inf)
    for start in STARTS:
        levels = levels_at(rotated, norms * start, table)
        error = error_of(rotated, levels)
        factor = torch.where(error < least, best_factor(rotated, levels), factor)
        least = torch.minimum(error, least)
    factor = best_factor(rotated, levels_at(rotated, factor, table))
    return levels_at(rotated, factor, table)


def relative(rotated: torch.Tensor, errors: torch.Tensor) -> float:
    return (errors.double().sum() / rotated.double().square().sum()).item()


def by_codec(refinement: Refinement) -> Idea:
    def measure(rotated: torch.Tensor, table: torch.Tensor) -> float:
        weight = rotated @ sylvester(BLOCK_SIZE, CPU) / math.sqrt(BLOCK_SIZE)
        coded = quantize_matrix(weight, BlockCoder(table, BLOCK_SIZE, CPU), refinement, measure=True)
        return coded.squared_error / weight.double().square().sum().item()

    return measure


def single_changes(rotated: torch.Tensor, table: torch.Tensor) -> float:
    """After the search, change the one code of a block that helps most at its own best factor, until none does."""
    levels = searched(rotated, table)
    codes = torch.searchsorted(table, levels)
    while True:
        along, energy = (rotated * levels).sum(1, keepdim=True), levels.square().sum(1, keepdim=True)
        best, where, step = along.square().squeeze(1) / energy.squeeze(1) * (1 + 1e-6), None, None
        for change in (-1, 1):
            other = table[(codes + change).clamp(0, len(table) - 1)]
            fitted = (along + rotated * (other - levels)).square() / (energy + other.square() - levels.square())
            value, index = fitted.max(1)
            where = index if where is None else torch.where(value > best, index, where)
            step = torch.where(value > best, change, 0 if step is None else step)
            best = torch.maximum(value, best)
        if not bool(step.any()):
            return relative(rotated, error_of(rotated, levels))
        codes.scatter_add_(1, where.unsqueeze(1), step.unsqueeze(1))
        levels = table[codes.clamp_(0, len(table) - 1)]


def unrounded(rotated: torch.Tensor, table: torch.Tensor) -> float:
    """With factors in float32: more than choosing codes for the rounded factor could save."""
    return relative(rotated, error_of(rotated, searched(rotated, table)))


def fitted_table(rotated: torch.Tensor, table: torch.Tensor) -> float:
    """A table of the weights' own; each half of the blocks is judged with the table of the other."""
    halves = rotated[::2], rotated[1::2]
    errors = [error_of(b, searched(b, lloyd(a, table))) for a, b in (halves, halves[::-1])]
    return relative(rotated, torch.cat(errors))


def lloyd(rotated: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Lloyd's iteration with the search of factors inside; the table stays antisymmetric."""
    half = len(table) // 2
    for _ in range(LLOYD_ITERATIONS):
        levels = searched(rotated, table)
        factor = best_factor(rotated, levels).double().unsqueeze(1).expand_as(rotated)
        code = torch.searchsorted(table, levels)
        magnitude = torch.where(code >= half, code - half, half - 1 - code).flatten()
        target = (rotated.double() * torch.where(code >= half, 1, -1) * factor).flatten()
        weight = torch.zeros(half, dtype=torch.double).scatter_add_(0, magnitude, factor.square().flatten())
        positive = torch.zeros(half, dtype=torch.double).scatter_add_(0, magnitude, target) / weight
        table = torch.cat([-positive.flip(0), positive]).float()
    return table


def every_factor(rotated: torch.Tensor, table: torch.Tensor) -> float:
    """The least error of all: one pass over the factors, falling, at which a coordinate moves to the next level."""
    positive = table[len(table) // 2 :].double()
    thresholds, rises = (positive[1:] + positive[:-1]) / 2, positive.diff()
    errors = []
    for part in rotated.double().split(256):
        size = part.abs()
        order = (size.unsqueeze(-1) / thresholds).flatten(1).argsort(1, descending=True)
        along = (size.unsqueeze(-1) * rises).flatten(1).gather(1, order).cumsum(1)
        energy = positive.square().diff().expand(*part.shape, -1).flatten(1).gather(1, order).cumsum(1)
        along += positive[0] * size.sum(1, keepdim=True)
        energy += positive[0].square() * part.shape[1]
        errors.append(part.square().sum(1) - (along.square() / energy).amax(1))
    return relative(rotated, torch.cat(errors))


def half_filled(refinement: Refinement) -> Idea:
    """The error of rows' last 64 weights, which fill half a block."""

    def measure(rotated: torch.Tensor, table: torch.Tensor) -> float:
        weight = (rotated @ sylvester(BLOCK_SIZE, CPU))[:, : BLOCK_SIZE // 2].contiguous() / math.sqrt(BLOCK_SIZE)
        coded = quantize_matrix(weight, BlockCoder(table, BLOCK_SIZE, CPU), refinement, measure=True)
        return coded.squared_error / weight.double().square().sum().item()

    return measure


IDEAS: dict[str, tuple[bool, Idea]] = {
    "least-squares factor": (True, by_codec(GAIN)),
    "codes chosen again four times": (False, by_codec(Refinement(rounds=4))),
    "twelve starts, one more round": (True, by_codec(Refinement(rounds=1, starts=STARTS))),
    "and a second round": (False, by_codec(Refinement(rounds=2, starts=STARTS))),
    "and changes of single codes": (False, single_changes),
    "and factors not rounded to float16": (False, unrounded),
    "and a table fitted to the weights": (False, fitted_table),
    "every factor: the least there is": (False, every_factor),
    "64 weights in a block, padding coded as zeros": (False, half_filled(Refinement(rounds=1, starts=STARTS))),
    "64 weights in a block, padding free": (True, half_filled(SEARCH)),
}
"""Whether each is in the codec, and how it is measured."""


def samples(model: Path) -> dict[str, torch.Tensor]:
    """Rotated blocks: Gaussian, and drawn from all whole blocks of the tiny model's matrices."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    chosen = [
        weight.float().reshape(-1, BLOCK_SIZE)
        for name, weight in weights.items()
        if weight.ndim > 1 and weight.shape[-1] % BLOCK_SIZE == 0 and "router" not in name
    ]
    blocks = torch.cat(chosen)
    blocks = blocks[torch.randperm(len(blocks), generator=generator)[:BLOCKS]]
    matrix = sylvester(BLOCK_SIZE, CPU) / math.sqrt(BLOCK_SIZE)
    normal = torch.randn(BLOCKS, BLOCK_SIZE, generator=generator)
    return {"normal": normal @ matrix, "tiny model": blocks @ matrix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder written by train.py")
    source: Path = parser.parse_args().source
    rows: list[dict[str, Any]] = []
    for name, (kept, measure) in tqdm(IDEAS.items()):
        errors = {
            weights: {str(bits): measure(rotated, codebook("C", bits)) for bits in BITS}
            for weights, rotated in samples(source).items()
        }
        rows.append({"idea": name, "kept": kept, "relative_mse": errors})
        tqdm.write(f"{name}: " + ", ".join(f"{w} {e['5']:.6f}" for w, e in errors.items()))
    weights_sha256 = json.loads((source / "training.json").read_text())["weights_sha256"]
    result = {"environment": environment.describe(), "weights_sha256": weights_sha256, "blocks": BLOCKS, "ideas": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
