"""Belady's optimum against a search through every choice of resident experts."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from vllm_hlwq.belady import optimal_hits

steps_of_few = st.lists(st.lists(st.integers(0, 4), unique=True, max_size=4), max_size=7)


def most_hits(steps: list[list[int]], slots: int) -> int:
    """The most hits over every sequence of resident sets that takes in only what a step has used."""
    reached = {frozenset[int](): 0}
    for needed in steps:
        best: dict[frozenset[int], int] = {}
        for resident, hits in reached.items():
            now = hits + len(resident & set(needed))
            at_hand = sorted(resident | set(needed))
            for size in range(min(slots, len(at_hand)) + 1):
                for kept in map(frozenset, combinations(at_hand, size)):
                    best[kept] = max(best.get(kept, 0), now)
        reached = best
    return max(reached.values())


@given(steps_of_few, st.integers(1, 4))
def test_no_choice_has_more_hits(steps: list[list[int]], slots: int) -> None:
    assert sum(optimal_hits(steps, slots)) == most_hits(steps, slots)


def test_hits_are_told_by_step() -> None:
    # With two slots, 1 and 2 stay through the step that needs 3, 4 and 5.
    assert optimal_hits([[1, 2], [3, 4, 5], [1, 2], [], [2]], 2) == [0, 0, 2, 0, 1]
    assert optimal_hits([], 2) == []
