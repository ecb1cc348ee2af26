"""Sequences of steps whose misses are known: for a least-recently-used cache, the same number in every step, for ever.

A benchmark of misses has to repeat its steps, and a cache that has seen them would hit. What holds instead: experts
come back either so soon that they are still there, or so late that they are gone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

MOST_CALLS = 256
"""Longest period: each call of it is captured."""
MISS_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class KnownSteps:
    """A period of steps that can be repeated as a whole, and what each of them finds.

    first: experts that a step before all others makes resident; empty if the period takes care of itself.
    steps: the experts of each step, hits before misses.
    misses: experts of every step that have no slot, once the period has run once.
    """

    first: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    misses: int

    @property
    def distinct(self) -> int:
        return len(self.steps[0])


def known_steps(
    experts: int, slots: int, distinct: int, misses: int, calls: int = 1, prompt: bool = False
) -> KnownSteps:
    """Steps of ``distinct`` experts of which ``misses`` have no slot.

    Args:
        experts: of the layer.
        slots: of the layer, all experts at most.
        distinct: experts that a step names.
        misses: of them without a slot.
        calls: steps of the period, or more.
        prompt: whether the planner takes the steps for a prompt (``expert_cache.is_prompt``).

    Raises:
        ValueError: no such sequence is known.
    """
    found = _arrangement(experts, slots, distinct, misses, calls, prompt)
    if found is None:
        raise ValueError(
            f"no steps are known that name {distinct} of {experts} experts and keep missing {misses} with {slots} slots"
        )
    first, kept, periods = found
    order = random.Random(experts).sample(range(experts), experts)
    steps = tuple(
        (*_block(order[:kept], step % periods[0], distinct - misses), *_block(order[kept:], step % periods[1], misses))
        for step in range(max(periods))
    )
    return KnownSteps(tuple(order[:first]), steps * -(-calls // len(steps)), misses)


def _arrangement(
    experts: int, slots: int, distinct: int, misses: int, calls: int, prompt: bool
) -> tuple[int, int, tuple[int, int]] | None:
    """How many experts to make resident before, how many are the pool of hits, and the periods of hits and misses."""
    hits = distinct - misses
    if not 1 <= distinct <= experts or not 0 <= misses <= min(distinct, experts - slots) or hits > slots:
        return None
    if distinct <= slots:
        periods = _periods(experts, slots, hits, misses)
        return None if periods is None else (0, periods[0] * hits, periods)
    if prompt:  # streaming: slots stay as they are
        return slots, slots, (calls, calls)
    # All slots but those of the hits change hands in every step, so the next step's misses must be other experts.
    blocks = (experts - hits) // misses
    return None if hits < slots and blocks < 2 else (hits, hits, (1, min(blocks, max(calls, 2))))


def _block(pool: list[int], number: int, size: int) -> list[int]:
    """Block ``number`` of neighbours in the pool, which has no end."""
    return [pool[(number * size + i) % len(pool)] for i in range(size)]


def _periods(experts: int, slots: int, hits: int, misses: int) -> tuple[int, int] | None:
    """After how many steps blocks of hits and blocks of misses come back, where a step fits the slots.

    Hits are still there if what has been named since fits the slots with them; where the period of the misses ends,
    that is a little longer ago than usual. Misses are gone if all slots hold what was named later. As many hits as
    possible rotate, so that the GPU's second-level cache does not hold them.
    """
    if misses == 0:
        return slots // hits, 1
    for kept in range(slots // (hits + misses) if hits else 1, 0, -1):
        # Twice or more, so that also the hits of the misses' own step are named again before those come back.
        for cold in range(2 * kept, min(MOST_CALLS, (experts - kept * hits) // misses) + 1):
            gone = (cold - 1) * misses + kept * hits >= slots
            if gone and kept * hits + (kept + cold % kept) * misses <= slots:
                return kept, cold
    return None


def is_known(experts: int, slots: int, distinct: int, misses: int, prompt: bool = False) -> bool:
    """Whether ``known_steps`` has such steps."""
    return _arrangement(experts, slots, distinct, misses, 1, prompt) is not None


def miss_counts(experts: int, slots: int, distinct: int, prompt: bool = False) -> list[int]:
    """Numbers of misses to measure: the fewest and the most that steps can keep up, and powers of two between."""
    fewest, most = max(0, distinct - slots), min(distinct, experts - slots)
    wanted = {fewest, most, *(count for count in MISS_COUNTS if fewest <= count <= most)}
    return [count for count in sorted(wanted) if is_known(experts, slots, distinct, count, prompt)]


def ids_of(known: KnownSteps, tokens: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """int32 ``[steps, tokens, k]``: each step's experts, all of them, each token's distinct.

    Raises:
        ValueError: a step has fewer experts than a token, or more than the tokens can name.
    """
    distinct = known.distinct
    if not top_k <= distinct <= tokens * top_k:
        raise ValueError(f"{tokens} tokens of {top_k} experts cannot name {distinct} in all")
    all_named = -(-distinct // top_k)
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(distinct, (tokens - all_named,), generator=generator)
    start = torch.cat([torch.arange(all_named) * top_k, others])
    position = (start.unsqueeze(1) + torch.arange(top_k)) % distinct
    return torch.tensor(known.steps, dtype=torch.int32)[:, position]


def first_ids(known: KnownSteps, top_k: int) -> torch.Tensor:
    """int32 ``[tokens, k]`` that name the experts of ``first``, some of them twice where they do not come out even."""
    rows = -(-len(known.first) // top_k)
    named = torch.tensor(known.first, dtype=torch.int32).repeat(top_k)
    return named[: rows * top_k].view(rows, top_k)


def check_outcome(known: KnownSteps, before: dict[str, int], after: dict[str, int]) -> None:
    """Compare a cache's counters before and after whole periods with what was promised.

    Raises:
        AssertionError: they differ.
    """
    steps, hits, admitted, staged = (after[name] - before[name] for name in ("steps", "hits", "admitted", "staged"))
    expected = (steps * (known.distinct - known.misses), steps * known.misses)
    if steps == 0 or (hits, admitted + staged) != expected:
        raise AssertionError(
            f"{steps} steps of {known.distinct} experts, {known.misses} of them misses: counted {hits} hits, "
            f"{admitted} admitted, {staged} staged, not {expected[0]} hits and {expected[1]} misses"
        )
