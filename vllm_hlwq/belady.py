"""The most hits that any choice of resident experts could have had, knowing the future.

A step needs a set of experts. Between steps any of those just used or already resident may stay, up to the slots; so
each use of an expert after its first is a hit exactly if the expert stayed since the use before. Those stays are
intervals of which at most as many as there are slots may overlap, and dropping the one that ends last whenever they are
too many keeps the most of them (L. A. Belady, 1966, for one request at a time; the same greedy choice for intervals: U.
Faigle and W. M. Nawijn, 1995).
"""

from __future__ import annotations

from collections.abc import Sequence


def optimal_hits(steps: Sequence[Sequence[int]], num_slots: int) -> list[int]:
    """Hits of each step under the best choice.

    Args:
        steps: the distinct experts that each step needs.
        num_slots: experts that can stay from one step to the next, 1 or more.
    """
    never = len(steps)
    next_uses: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for number in range(len(steps) - 1, -1, -1):
        next_uses.append({expert: upcoming.get(expert, never) for expert in steps[number]})
        upcoming.update(dict.fromkeys(steps[number], number))
    next_uses.reverse()

    resident: dict[int, int] = {}  # expert: step of its next use
    hits = []
    for following in next_uses:
        hits.append(len(resident.keys() & following.keys()))
        resident.update(following)
        resident = dict(sorted(resident.items(), key=lambda item: item[1])[:num_slots])
    return hits
