"""What must hold after a load: tokens against a reference, counters against each other, memory against itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soak_load import Heard, Prompt, body

from vllm_hlwq.bench.server import Server
from vllm_hlwq.bench.teacher_forcing import NEAR_TIE, gaps

GROWTH_BYTES = 64 * 2**20
"""More than that between the medians of a load's middle and last third counts as a leak of a process."""
WARMING_MINUTES, WARMING_BYTES = 10, 2**30
"""Shorter loads are over before torch has kept what it keeps for each shape; growth beyond that is a leak even so."""
SETTLE_SECONDS = 10


def transcript(server: Server, prompts: Iterable[Prompt]) -> dict[Prompt, tuple[int, ...]]:
    """Greedy continuation of each prompt, one request at a time."""
    return {
        prompt: tuple(server.post("/v1/completions", body(prompt, stream=False))["choices"][0]["token_ids"])
        for prompt in prompts
    }


Spoken = tuple[Prompt, tuple[int, ...]]


@dataclass
class Verdict:
    """Of sequences that a judge was given.

    Attributes:
        sequences, tokens: that were judged.
        first_choices: tokens that are the judge's first choice.
        near_ties: tokens below it by less than ``NEAR_TIE``.
        wrong: tokens below it by more.
        worst_gap: nats.
    """

    sequences: int = 0
    tokens: int = 0
    first_choices: int = 0
    near_ties: int = 0
    wrong: int = 0
    worst_gap: float = 0.0


def judge(sequences: Iterable[Spoken], server: Server) -> Verdict:
    """Put each token of each sequence to a server."""
    verdict = Verdict()
    for prompt, tokens in sequences:
        found = gaps(server, prompt.ids, tokens)
        verdict.sequences += 1
        verdict.tokens += len(found)
        verdict.first_choices += found.count(0)
        verdict.near_ties += sum(0 < gap < NEAR_TIE for gap in found)
        verdict.worst_gap = max([verdict.worst_gap, *found])
        verdict.wrong += sum(gap >= NEAR_TIE for gap in found)
    return verdict


def unlike(heard: Iterable[Heard], reference: Mapping[Prompt, tuple[int, ...]]) -> set[Spoken]:
    """What clients heard that the transcript does not begin with."""
    return {(h.prompt, h.tokens) for h in heard if reference[h.prompt][: len(h.tokens)] != h.tokens}


def faults_of_ends(heard: Sequence[Heard]) -> list[str]:
    """Requests that ended in a way that a load does not bring about, or with too few tokens."""
    wrong = {one.end for one in heard} - {"length", "left", "abort"}
    short = sum(one.end == "length" and len(one.tokens) != one.prompt.new_tokens for one in heard)
    found = [f"a request ended with {end}" for end in sorted(wrong)]
    return found + ([f"{short} requests ended early"] if short else [])


def faults_of_memory(memory: Mapping[str, Mapping[str, Any]], minutes: float) -> list[str]:
    """Processes that have grown too much in a load of so many minutes."""
    bound = GROWTH_BYTES if minutes >= WARMING_MINUTES else WARMING_BYTES
    grown = {role: summary["last_third"] - summary["middle_third"] for role, summary in memory.items()}
    return [f"{role}: {growth} bytes more" for role, growth in grown.items() if growth > bound]


def settled(server: Server) -> dict[str, float]:
    """vLLM's and our metrics by name, summed over labels, once no request is under way and ours have been published."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        time.sleep(1)
        found: dict[str, float] = {}
        for (name, labels), value in server.metrics().items():
            reason = dict(labels).get("finished_reason")
            key = f"{name} {reason}" if reason else name
            found[key] = found.get(key, 0.0) + value
        if not found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]:
            return found
        if time.monotonic() > deadline:
            return found


def faults_of_counters(
    metrics: Mapping[str, float], counters: Mapping[str, int], sizes: Mapping[str, Any], heard: Sequence[Heard]
) -> list[str]:
    """What does not add up, one line each.

    Args:
        metrics: of ``settled``.
        counters: of the engine, read after the metrics.
        sizes: of its caches.
        heard: all requests of the server's life that clients began.
    """
    answered = counters["hits"] + counters["admitted"] + counters["staged"]
    in_slots, slots = counters["admitted"] - counters["evictions"], sizes["layers"] * sizes["slots"]
    copies = counters["copied"] * sizes["record_bytes"]
    under_way = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
    usage, generated = metrics["vllm:kv_cache_usage_perc"], metrics["vllm:generation_tokens_total"]
    length, abort = (metrics.get(f"vllm:request_success_total {reason}", 0.0) for reason in ("length", "abort"))
    ends = Counter(one.end for one in heard)
    # Who leaves can have been answered in full before the server notices. What was aborted vLLM does not count at all.
    tokens = sum(len(one.tokens) for one in heard)
    claims = [
        (f"{counters['queries']} queries = {answered} hits, admitted and staged", counters["queries"] == answered > 0),
        (f"{in_slots} experts in {slots} slots", 0 < in_slots <= slots),
        (f"{counters['h2d_bytes']} bytes = {copies} of what was copied", counters["h2d_bytes"] == copies),
        (f"{under_way:.0f} requests under way = 0", under_way == 0),
        (f"KV cache in use {usage} = 0", usage == 0),
        (f"{ends['length']} answers <= {length:.0f} requests in full", ends["length"] <= length),
        (f"{length:.0f} requests in full <= {ends['length']} answers and {ends['left']} who left",
         length <= ends["length"] + ends["left"]),
        (f"{length + abort:.0f} requests ended <= {len(heard)} begun", length + abort <= len(heard)),
        (f"{tokens} tokens heard <= {generated:.0f} generated", tokens <= generated),
    ]  # fmt: skip
    for name in ("queries", "hits", "evictions", "staged", "waves", "h2d_bytes"):
        shown = metrics[f"vllm:moe_expert_cache_{name}_total"]
        claims.append((f"{name} {shown:.0f} on /metrics = {counters[name]} in the engine", shown == counters[name]))
    return [f"does not hold: {claim}" for claim, holds in claims if not holds]
