"""What must hold after ``vllm bench serve`` has loaded a server: counts of three sources agree, tokens are stock's.

Arithmetic only. Counts are differences over the benchmark's run. Tokens of 16-bit engines part at near-ties, so gaps to
the resident server's first choice are held against those of its own tokens; see ``teacher_forcing.py``. How much
rounding can do depends on the model: in one of random weights a single expert that it exchanges moves all that follows,
by nats. So fixed texts are read too: how far log probabilities are from the resident server's is held against how far
its own are from each other, between a text read alone and in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REQUESTS = "vllm:request_success_total length"
GENERATED = "vllm:generation_tokens_total"
PROMPT = "vllm:prompt_tokens_total"
CACHE = "vllm:moe_expert_cache_{}_total"
COUNTED = ("queries", "hits", "evictions", "staged", "waves", "h2d_bytes")
GAP_FLOOR = 0.1
"""Nats. A largest gap below it is never too large, however small the resident server's own is."""
SHIFT_FLOOR, SHIFT_FACTOR = 0.02, 1.5
"""Log probabilities may differ by so many nats on average, or so many times what the resident server's own differ."""
SHARE_MARGIN = 0.02
"""By which the share of first choices may be lower, beside three standard errors of the difference."""


@dataclass(frozen=True)
class Check:
    """A claim, whether it was kept, and the figures that say so."""

    what: str
    kept: bool
    detail: str


def difference(later: Mapping[str, float], earlier: Mapping[str, float]) -> dict[str, float]:
    """By how much each value has grown; what was not there before was 0."""
    return {name: value - earlier.get(name, 0) for name, value in later.items()}


def traffic_checks(
    where: str, bench: Mapping[str, Any], metrics: Mapping[str, float], requests: int, new_tokens: int
) -> list[Check]:
    """Whether the benchmark got what it was to ask for, and whether vLLM's own metrics have counted the same.

    Args:
        where: what the claims are about.
        bench: result of ``vllm bench serve``.
        metrics: of the server, their growth during the run.
        requests: that were to be completed.
        new_tokens: that each of them was to get.
    """
    asked = (requests, 0, requests * new_tokens)
    got = (bench["completed"], bench["failed"], bench["total_output_tokens"])
    said = (bench["completed"], bench["total_output_tokens"], bench["total_input_tokens"])
    counted = tuple(metrics.get(name, 0) for name in (REQUESTS, GENERATED, PROMPT))
    words = "{:.0f} requests, {:.0f} tokens generated, {:.0f} of prompts"
    return [
        Check(
            f"{where}: all requests are answered in full", got == asked,
            f"{got[0]} of {requests} requests, {got[2]} of {asked[2]} tokens, {got[1]} failed",
        ),
        Check(
            f"{where}: vLLM's metrics are what the benchmark saw", counted == said,
            f"/metrics: {words.format(*counted)}; benchmark: {words.format(*said)}",
        ),
    ]  # fmt: skip


def cache_checks(
    where: str, metrics: Mapping[str, float], counters: Mapping[str, float], record_bytes: int, all_resident: bool
) -> list[Check]:
    """Whether the cache's metrics are its worker's counters, and whether those add up.

    Args:
        where: what the claims are about.
        metrics: of the server, their growth during the run.
        counters: of its one worker, their growth during the run.
        record_bytes: of one expert.
        all_resident: whether nothing is to be counted.
    """
    shown = {name: metrics.get(CACHE.format(name)) for name in COUNTED}
    unlike = [f"{name} {shown[name]} and {counters[name]}" for name in COUNTED if shown[name] != counters[name]]
    queries, hits, copied, moved = (int(counters[name]) for name in ("queries", "hits", "copied", "h2d_bytes"))
    misses = int(counters["admitted"] + counters["staged"])
    return [
        Check(
            f"{where}: the cache's metrics are the worker's counters", not unlike,
            "; ".join(unlike) or ", ".join(f"{name} {counters[name]:.0f}" for name in COUNTED),
        ),
        Check(
            f"{where}: queries are hits and misses", queries == hits + misses and (queries == 0) == all_resident,
            f"{queries} queries, {hits} hits, {misses} misses",
        ),
        # Experts that were copied ahead and not needed are bytes, but no misses.
        Check(
            f"{where}: bytes are those of the experts copied", moved == copied * record_bytes and copied >= misses,
            f"{moved} bytes, {copied} copied of {record_bytes}, {misses} misses",
        ),
    ]  # fmt: skip


def cache_figures(counters: Mapping[str, float], generated: int) -> dict[str, float | None]:
    """Hit rate, None where all experts are resident, and bytes moved for each generated token."""
    queries = counters["queries"]
    return {
        "hit_rate": counters["hits"] / queries if queries else None,
        "bytes_per_generated_token": counters["h2d_bytes"] / generated,
        "queries": counters["queries"],
        "hits": counters["hits"],
        "h2d_bytes": counters["h2d_bytes"],
    }


def token_figures(gaps: Sequence[float]) -> dict[str, float]:
    """Of tokens that lie ``gaps`` nats below the resident server's first choice."""
    return {
        "tokens": len(gaps),
        "first_choices": sum(gap == 0 for gap in gaps) / len(gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "largest_gap": max(gaps),
    }


def shift_figures(read: Sequence[float], resident: Sequence[float]) -> dict[str, float]:
    """How far log probabilities lie from the resident server's, in nats."""
    shifts = [abs(value - wanted) for value, wanted in zip(read, resident, strict=True)]
    return {"read_tokens": len(shifts), "mean_shift": sum(shifts) / len(shifts), "largest_shift": max(shifts)}


def token_checks(where: str, found: Mapping[str, float], own: Mapping[str, float]) -> list[Check]:
    """Whether tokens are as near to the resident server's first choices as its own ones are, and what it reads too.

    Args:
        where: what the claims are about.
        found: ``token_figures`` and ``shift_figures`` of a server, against the resident one.
        own: of the resident server: its own tokens, and texts that share a batch against the same texts alone.
    """
    share, control = found["first_choices"], own["first_choices"]
    variance = share * (1 - share) / found["tokens"] + control * (1 - control) / own["tokens"]
    lowest = control - SHARE_MARGIN - 3 * math.sqrt(variance)
    largest = max(GAP_FLOOR, 2 * own["largest_gap"])
    shift = max(SHIFT_FLOOR, SHIFT_FACTOR * own["mean_shift"])
    return [
        Check(
            f"{where}: greedy tokens are the resident server's",
            share >= lowest and found["largest_gap"] <= largest,
            f"{share:.1%} first choices (at least {lowest:.1%}; its own {control:.1%}), largest gap "
            f"{found['largest_gap']:.3f} nats (at most {largest:.3f}; its own {own['largest_gap']:.3f}, and between "
            f"batches its log probabilities move by up to {own['largest_shift']:.3f})",
        ),
        Check(
            f"{where}: log probabilities of fixed texts are the resident server's",
            found["mean_shift"] <= shift,
            f"{found['mean_shift']:.4f} nats from them on average (at most {shift:.4f}; its own move by "
            f"{own['mean_shift']:.4f} between batches), over {found['read_tokens']:,} tokens",
        ),
    ]
