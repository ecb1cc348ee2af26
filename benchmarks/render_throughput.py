"""Renders a result of ``throughput.py``: decoding by batch size and prompts, the cache beside stock vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MIB = 2**20
OFFLOADING = ("uva:marlin", "prefetch:marlin")
RESIDENT = "resident:marlin"


def throughput(result: dict[str, Any]) -> str:
    """Tables of a GPU's result, without a word on the machine; rows that failed are named below them."""
    ran = [row for row in result["rows"] if row["status"] == "ok"]
    batches = sorted({found["batch"] for row in ran for found in row["measurements"] if found["new_tokens"]})
    prompts = sorted(
        {found["prompt_tokens"] for row in ran for found in row["measurements"] if not found["new_tokens"]}
    )
    parts = [decoding(ran, batch) for batch in batches]
    if prompts:
        parts.append(reading(ran, prompts))
    parts += [
        f"`{row['configuration']}`{at_size(row)}: {row['reason']}.\n" for row in result["rows"] if "reason" in row
    ]
    return "\n".join(parts)


def decoding(rows: list[dict[str, Any]], batch: int) -> str:
    """One batch size: a line for each number of slots, and one for stock vLLM with all experts."""
    stock = measured(rows, RESIDENT, None, batch)
    text = (
        f"Decoding, {batch} {'request' if batch == 1 else 'requests'}, tokens per second:\n\n"
        "| slots | cache | uva | prefetch | cache / better | of resident | hits | MiB/token | ms a step "
        "| roofline, ms |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for size in sizes(rows):
        found = measured(rows, "cache", size, batch)
        if found is None:
            continue
        others = [measured(rows, name, size, batch) for name in OFFLOADING]
        speeds = [None if other is None else other["decode_tokens_per_second"] for other in others]
        speed, hits = found["decode_tokens_per_second"], found["decode_hit_rate"]
        best = max(filter(None, speeds), default=None)
        cells = (
            f"{speed:,.1f}",
            *(number(other, ",.1f") for other in speeds),
            "" if best is None else f"{speed / best:.2f}",
            "" if stock is None else f"{speed / stock['decode_tokens_per_second']:.0%}",
            "" if hits is None else f"{hits:.0%}",
            f"{found['decode_bytes_per_token'] / MIB:,.1f}",
            f"{found['step_milliseconds']:.2f}",
            number(found.get("predicted_step_milliseconds"), ".2f"),
        )
        text += f"| {size} | {' | '.join(cells)} |\n"
    if stock is not None:
        speed, step = stock["decode_tokens_per_second"], stock["step_milliseconds"]
        text += f"| all, stock vLLM | {speed:,.1f} | | | | | | | {step:.2f} | |\n"
    return text


def reading(rows: list[dict[str, Any]], prompts: list[int]) -> str:
    """Prompts alone: milliseconds by length, and how much more than with all experts."""
    text = (
        "Prompts alone, milliseconds (times stock vLLM's with all experts):\n\n"
        f"| | slots | {' | '.join(f'{tokens:,} tokens' for tokens in prompts)} |\n|---|---|{'---|' * len(prompts)}\n"
    )
    for row in rows:
        cells = []
        for tokens in prompts:
            found, stock = (prompt_of(each, tokens) for each in (row, of(rows, RESIDENT, None)))
            times = "" if found is None or stock is None else f" ({found / stock:.2f})"
            cells.append("" if found is None else f"{1e3 * found:,.0f}{times}")
        text += f"| {row['configuration']} | {row['cache_size'] or 'all'} | {' | '.join(cells)} |\n"
    return text


def sizes(rows: list[dict[str, Any]]) -> Iterator[int]:
    return (row["cache_size"] for row in rows if row["configuration"] == "cache")


def of(rows: list[dict[str, Any]], name: str, size: int | None) -> dict[str, Any] | None:
    return next((row for row in rows if (row["configuration"], row["cache_size"]) == (name, size)), None)


def measured(rows: list[dict[str, Any]], name: str, size: int | None, batch: int) -> dict[str, Any] | None:
    """The decoding measurement of a configuration, None if there is none."""
    row = of(rows, name, size)
    found = [] if row is None else row["measurements"]
    return next((each for each in found if each["batch"] == batch and each["new_tokens"]), None)


def prompt_of(row: dict[str, Any] | None, tokens: int) -> float | None:
    """Seconds of a prompt alone."""
    found = [] if row is None else row["measurements"]
    return next((m["prefill_seconds"] for m in found if not m["new_tokens"] and m["prompt_tokens"] == tokens), None)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def at_size(row: dict[str, Any]) -> str:
    return "" if row["cache_size"] is None else f" at {row['cache_size']}"


def over_roofline(result: dict[str, Any], one_layer: dict[str, Any]) -> str:
    """How much of what steps take beyond the roofline one layer alone takes too, with as many misses.

    Args:
        result: of ``throughput.py``, a GPU's.
        one_layer: of ``moe_layer.py``, the part ``layer``, of the same shape.
    """
    ran = [row for row in result["rows"] if row["status"] == "ok"]
    overheads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in one_layer["rows"]:
        overheads.setdefault((row["tokens"], row["slots"]), []).append((row["misses"], row["overhead_us"]))
    lines = ""
    for (batch, slots), points in sorted(overheads.items()):
        row, found = of(ran, "cache", slots), measured(ran, "cache", slots, batch)
        if row is None or found is None or found["decode_hit_rate"] is None:
            continue
        layers = row["expert_cache"]["layers"]
        misses = found["decode_bytes_per_step"] / row["expert_cache"]["record_bytes"] / layers
        over = found["step_milliseconds"] - found["predicted_step_milliseconds"]
        explained = layers * float(np.interp(misses, *zip(*sorted(points), strict=True))) / 1e3
        lines += f"| {batch} | {slots} | {misses:.1f} | {over:.2f} | {explained:.2f} | {explained / over:.0%} |\n"
    return (
        "Milliseconds of a step beyond the roofline, and beyond resident layer and link in all layers, if each takes "
        "what one takes alone with as many misses.\n\n"
        "| requests | slots | misses a layer | over, ms | one layer says, ms | share |\n"
        f"|---|---|---|---|---|---|\n{lines}\n"
    )
