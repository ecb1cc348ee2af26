"""What ``gpu_acceptance.py`` holds its measurements against: each promise with its limit, as arithmetic on results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MIB = 2**20
SLACK_MILLISECONDS = 0.5
"""Beside resident step and transfer, in a step with misses."""
COST_MILLISECONDS = 0.3
"""Of a step at work without a miss."""
MEMORY_MIB = 256
"""Beside the banks and what stock vLLM needs besides experts."""

Engines = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Criterion:
    """One promise: its limit and what was measured, as text, and whether it is kept."""

    promise: str
    limit: str
    measured: str
    kept: bool


class Missing(Exception):
    """An engine of this name did not run."""


def judge(engines: Engines, gather: dict[str, Any], link: float) -> list[Criterion]:
    """Hold every promise against the measurements; what could not be measured is not kept.

    Args:
        engines: results of ``engine_run.py`` by name: all, resident, cache (a quarter of the experts), all_but_one and
            half; uva with as much GPU memory as cache, half_uva and half_prefetch with as much as half.
        gather: the gather part of ``moe_layer.py``.
        link: bytes per second of the copy engine.
    """
    found = []
    for promise, check in PROMISES.items():
        try:
            found += [Criterion(promise, *verdict) for verdict in check(engines, gather, link)]
        except Missing as missing:
            found.append(Criterion(promise, "", f"{missing} did not run", False))
    return found


def case(engines: Engines, name: str, batch: int, decoding: bool = True) -> dict[str, Any]:
    """The measurement of an engine at a batch size, the one with decoding or that of a prompt alone."""
    engine = row(engines, name)
    found: dict[str, Any] = next(
        m for m in engine["measurements"] if m["batch"] == batch and bool(m["new_tokens"]) == decoding
    )
    return found


def row(engines: Engines, name: str) -> dict[str, Any]:
    engine = engines.get(name)
    if engine is None or engine["status"] != "ok":
        raise Missing(name)
    return engine


Verdicts = Iterator[tuple[str, str, bool]]


def without_misses(engines: Engines, _: Any, __: float) -> Verdicts:
    stock, cached = case(engines, "resident", 1), case(engines, "all_but_one", 1)
    share = cached["decode_tokens_per_second"] / stock["decode_tokens_per_second"]
    more = cached["step_milliseconds"] - stock["step_milliseconds"]
    copied, misses = cached["decode_bytes_per_step"], cached["timed_misses"]
    yield (
        f">= 97 % of stock, or <= {COST_MILLISECONDS} ms a step more",
        f"{share:.1%}, {more:+.2f} ms of {stock['step_milliseconds']:.2f} ({copied / MIB:.2f} MiB a step copied; "
        f"{misses} misses in all timed requests)",
        (share >= 0.97 or more <= COST_MILLISECONDS) and copied == 0,
    )


def all_resident(engines: Engines, _: Any, __: float) -> Verdicts:
    stock, cached = case(engines, "resident", 1), case(engines, "all", 1)
    share = cached["decode_tokens_per_second"] / stock["decode_tokens_per_second"]
    planned = row(engines, "all")["expert_cache"]["host_bytes"]
    yield (
        ">= 98 % of stock, nothing planned",
        f"{share:.1%}, {planned} bytes of experts in host memory",
        share >= 0.98 and planned == 0,
    )


def with_misses(engines: Engines, _: Any, link: float) -> Verdicts:
    for batch in (1, 32):
        stock, cached = case(engines, "resident", batch), case(engines, "cache", batch)
        transfer = 1e3 * cached["decode_bytes_per_step"] / link
        allowed = stock["step_milliseconds"] + transfer + SLACK_MILLISECONDS
        step = cached["step_milliseconds"]
        yield (
            f"batch {batch}: resident {stock['step_milliseconds']:.3f} + transfer {transfer:.3f} + "
            f"{SLACK_MILLISECONDS} = {allowed:.3f} ms",
            f"{step:.3f} ms at {cached['decode_hit_rate']:.0%} hits",
            step <= allowed,
        )


def gather_rate(_: Engines, gather: dict[str, Any], __: float) -> Verdicts:
    shares = {rate["experts"]: rate["share"] for rate in gather["rates"] if rate["experts"] >= 8}
    experts = min(shares, key=lambda count: shares[count])
    yield ">= 90 % of the copy engine", f"{shares[experts]:.1%} at {experts} experts", shares[experts] >= 0.9


def against_uva(engines: Engines, _: Any, __: float) -> Verdicts:
    ours, theirs = (case(engines, name, 1)["decode_tokens_per_second"] for name in ("cache", "uva"))
    yield ">= 2 x uva", f"{ours / theirs:.2f} x ({ours:.1f} and {theirs:.1f} tok/s)", ours >= 2 * theirs


def long_prompt(engines: Engines, _: Any, link: float) -> Verdicts:
    cached = case(engines, "cache", 1, decoding=False)
    transfer = cached["prefill_bytes"] / link
    compute = case(engines, "resident", 1, decoding=False)["prefill_seconds"]
    share = max(transfer, compute) / cached["prefill_seconds"]
    yield (
        ">= 90 % of max(transfer, resident compute)",
        f"{share:.1%}: {1e3 * cached['prefill_seconds']:.0f} ms; transfer {1e3 * transfer:.0f}, "
        f"compute {1e3 * compute:.0f}",
        share >= 0.9,
    )


def many_requests(engines: Engines, _: Any, __: float) -> Verdicts:
    ours = case(engines, "half", 32)["decode_tokens_per_second"]
    theirs = {name: case(engines, f"half_{name}", 32)["decode_tokens_per_second"] for name in ("uva", "prefetch")}
    best = max(theirs, key=lambda name: theirs[name])
    yield (
        ">= 1.5 x the better of uva and prefetch",
        f"{ours / theirs[best]:.2f} x {best} ({ours:.0f} and {theirs[best]:.0f} tok/s)",
        ours >= 1.5 * theirs[best],
    )


def many_requests_few_slots(engines: Engines, _: Any, __: float) -> Verdicts:
    """A step needs more experts than there are slots: at best each slot hits, which a fixed choice nearly does too."""
    ours, theirs = (case(engines, name, 32)["decode_tokens_per_second"] for name in ("cache", "uva"))
    yield ">= 1 x uva", f"{ours / theirs:.2f} x ({ours:.0f} and {theirs:.0f} tok/s)", ours >= theirs


def gpu_memory(engines: Engines, _: Any, __: float) -> Verdicts:
    stock, cached = row(engines, "resident"), row(engines, "cache")
    sizes = cached["expert_cache"]
    experts = sizes["layers"] * sizes["experts"] * sizes["record_bytes"]
    dense = stock["gpu_memory"]["in_use"] - experts
    over = cached["gpu_memory"]["in_use"] - sizes["slot_bytes"] - sizes["staging_bytes"] - dense
    yield f"<= {MEMORY_MIB} MiB", f"{over / MIB:+.0f} MiB", over <= MEMORY_MIB * MIB


def start_up(engines: Engines, _: Any, __: float) -> Verdicts:
    stock, cached = (row(engines, name)["start_up_seconds"] for name in ("resident", "cache"))
    yield "<= 1.3 x stock", f"{cached / stock:.2f} x ({cached:.1f} and {stock:.1f} s)", cached <= 1.3 * stock


PROMISES: dict[str, Callable[[Engines, dict[str, Any], float], Verdicts]] = {
    "cache at work, no misses, batch 1": without_misses,
    "all experts resident": all_resident,
    "a step with misses": with_misses,
    "gather at 8 or more experts": gather_rate,
    "a quarter resident, batch 1": against_uva,
    "prompt of 8,192 tokens": long_prompt,
    "half resident, batch 32": many_requests,
    "a quarter resident, batch 32": many_requests_few_slots,
    "GPU memory over banks and dense part": gpu_memory,
    "start-up": start_up,
}
