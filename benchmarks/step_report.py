"""What limits a layer's step: arithmetic on the times of ``layer_step.py``, and its table."""

from __future__ import annotations

from collections import Counter
from typing import Any

SMALL_KERNELS = ("align", "blocks", "gather", "combine")


def judged(step_us: float, resident_us: float, link_us: float, parts: dict[str, float]) -> dict[str, Any]:
    """What a step costs over the resident layer, what of it the link does not explain, and what limits it.

    Args:
        step_us: microseconds of the step.
        resident_us: of the resident layer, on the same ids.
        link_us: the prediction: bytes missed at the copy engine's rate.
        parts: microseconds of the step's parts alone. ``plan``, ``blocks`` and ``gather``, without loads, are not in
            resident steps, whose ``align`` a cache has in its ``blocks``.

    Returns:
        The times; ``over_us`` above resident; ``overhead_us`` of it beyond the prediction, negative where loads hide
        behind compute; ``gaps_us`` that no part accounts for, negative likewise; and the largest of ``shares``.
    """
    gaps_us = step_us - link_us - sum(parts.values())
    shares = {
        "link": link_us,
        "plan": parts.get("plan", 0.0),
        "launches": sum(parts.get(name, 0.0) for name in SMALL_KERNELS) + max(gaps_us, 0.0),
        "compute": parts["compute"],
    }
    return {
        "step_us": step_us,
        "resident_us": resident_us,
        "over_us": step_us - resident_us,
        "link_us": link_us,
        "overhead_us": step_us - resident_us - link_us,
        "parts_us": parts,
        "gaps_us": gaps_us,
        "limit": max(shares, key=lambda name: shares[name]),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    limits = Counter(row["limit"] for row in result["rows"])
    parts = ("plan", "align", "blocks", "gather", "compute", "combine")
    lines = [
        f"one layer's step, microseconds; records of {result['record_bytes']:,} bytes, copy engine "
        f"{result['copy_gb_per_s']:.1f} GB/s; limits: {', '.join(f'{name} {n}' for name, n in limits.most_common())}",
        f"{'tokens':>7} {'slots':>6} {'distinct':>9} {'misses':>7} {'step':>8} {'resident':>9} {'over':>8} {'link':>8} "
        f"{'overhead':>9} {' '.join(f'{name:>8}' for name in parts)} {'gaps':>8}  limit",
    ]
    for row in result["rows"]:
        times = " ".join(f"{row['parts_us'].get(name, 0.0):>8.1f}" for name in parts)
        lines.append(
            f"{row['tokens']:>7} {row['slots']:>6} {row['distinct']:>9} {row['misses']:>7} {row['step_us']:>8.1f} "
            f"{row['resident_us']:>9.1f} {row['over_us']:>8.1f} {row['link_us']:>8.1f} {row['overhead_us']:>9.1f} "
            f"{times} {row['gaps_us']:>8.1f}  {row['limit']}"
        )
    return "\n".join(lines)
