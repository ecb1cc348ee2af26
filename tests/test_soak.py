"""The soak test's short form on real servers, and that its checks find what they look for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from soak import soak
from soak_checks import GROWTH_BYTES, faults_of_counters, faults_of_ends, faults_of_memory, unlike
from soak_faults import Fault, more_than_stock
from soak_load import BURST, Heard, Prompt
from soak_processes import Leftovers, summary


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_three_minutes(tiny_bf16: Path) -> None:
    result = soak(tiny_bf16, minutes=0.5, seed=1, names=("SIGTERM", "worker killed"))
    assert result["problems"] == []
    assert set(result["requests"]) == {"stream", "long prompt", "disconnect", "cancel", "abort", "burst"}
    assert set(result["ends"]) == {"length", "left", "abort"}
    assert result["ends"]["length"] >= BURST
    assert result["audits"] >= 3
    assert result["counters"]["hits"] > 0
    assert result["tokens"]["judged"]["tokens"] >= 16 * 32 + 4 * 12 + 100
    for fault in result["faults"]:
        assert sum(fault["ours"]["ends"].values()) == 8
        assert "length" not in fault["ours"]["ends"]  # it came in mid-stream


PROMPT = Prompt((2, 100, 5), 4)
HEARD = [
    Heard(PROMPT, (7, 8, 9, 10), "length"),
    Heard(PROMPT, (7, 8), "left"),
    Heard(PROMPT, (), "left"),
    Heard(PROMPT, (7,), "abort"),
]
SIZES = {"layers": 2, "slots": 3, "record_bytes": 100}
COUNTERS = {
    "queries": 50, "hits": 20, "admitted": 10, "evictions": 5, "staged": 20, "waves": 12, "copied": 30,
    "h2d_bytes": 3000,
}  # fmt: skip
METRICS = {
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "vllm:generation_tokens_total": 9.0,
    "vllm:request_success_total length": 1.0,
    "vllm:request_success_total abort": 2.0,
    **{f"vllm:moe_expert_cache_{name}_total": float(value) for name, value in COUNTERS.items()},
}


def test_what_adds_up() -> None:
    assert faults_of_counters(METRICS, COUNTERS, SIZES, HEARD) == []
    # Who left was answered in full; who left without an answer may never have come.
    in_full = {"vllm:request_success_total length": 2.0, "vllm:request_success_total abort": 1.0}
    assert faults_of_counters(METRICS | in_full, COUNTERS, SIZES, HEARD) == []


@pytest.mark.parametrize(
    ("metrics", "counters", "claim"),
    [
        ({}, {"hits": 21}, "50 queries = 51 hits, admitted and staged"),
        ({}, {"evictions": 3}, "7 experts in 6 slots"),
        ({}, {"copied": 29}, "3000 bytes = 2900 of what was copied"),
        ({"vllm:num_requests_waiting": 1.0}, {}, "1 requests under way = 0"),
        ({"vllm:kv_cache_usage_perc": 0.25}, {}, "KV cache in use 0.25 = 0"),
        ({"vllm:request_success_total length": 0.0}, {}, "1 answers <= 0 requests in full"),
        ({"vllm:request_success_total length": 4.0}, {}, "4 requests in full <= 1 answers and 2 who left"),
        ({"vllm:request_success_total abort": 4.0}, {}, "5 requests ended <= 4 begun"),
        ({"vllm:generation_tokens_total": 6.0}, {}, "7 tokens heard <= 6 generated"),
        ({"vllm:moe_expert_cache_waves_total": 11.0}, {}, "waves 11 on /metrics = 12 in the engine"),
    ],
)
def test_what_does_not_add_up(metrics: dict[str, float], counters: dict[str, int], claim: str) -> None:
    assert f"does not hold: {claim}" in faults_of_counters(METRICS | metrics, COUNTERS | counters, SIZES, HEARD)


def test_what_the_transcript_does_not_begin_with() -> None:
    reference = {PROMPT: (7, 8, 9, 10)}
    assert unlike(HEARD, reference) == set()
    assert unlike([*HEARD, Heard(PROMPT, (7, 9), "left")], reference) == {(PROMPT, (7, 9))}
    assert unlike([Heard(PROMPT, (7, 8, 9, 10, 11), "left")], reference) == {(PROMPT, (7, 8, 9, 10, 11))}


def test_requests_that_end_as_they_should_not() -> None:
    assert faults_of_ends(HEARD) == []
    assert faults_of_ends([Heard(PROMPT, (7, 8), "length")]) == ["1 requests ended early"]
    assert faults_of_ends([Heard(PROMPT, (7,), "error: engine dead")]) == ["a request ended with error: engine dead"]


def test_memory_that_grows() -> None:
    steady = summary([100, 500, 501, 502, 500, 501, 502, 503, 504, 505])
    assert (steady["first"], steady["last"]) == (100, 505)
    assert (steady["middle_third"], steady["last_third"]) == (501, 504)
    assert steady["course"] == [100, 500, 501, 502, 500, 501, 502, 503, 504, 505]
    growing = summary([number * GROWTH_BYTES // 2 for number in range(9)])
    found = faults_of_memory({"Worker": growing, "EngineCore": steady}, minutes=30)
    assert found == [f"Worker: {3 * GROWTH_BYTES // 2} bytes more"]
    assert faults_of_memory({"Worker": growing}, minutes=0.5) == []


def left(**changes: Any) -> Leftovers:
    return Leftovers(**{"processes": [], "shared_memory": ["psm_"], "temporary": []} | changes)


def test_what_is_worse_than_stock() -> None:
    stock = Fault("worker killed", 0, 1.0, 10, {"error": 8}, left())
    assert more_than_stock(replace(stock, seconds=9.0, left=left(shared_memory=[])), stock) == []
    for worse, said in (
        (replace(stock, exit_code=None), "worker killed: exit code None, stock vLLM's 0"),
        (replace(stock, exit_code=1), "worker killed: exit code 1, stock vLLM's 0"),
        (replace(stock, reported=0), "worker killed: nothing in the log"),
        (
            replace(stock, left=left(shared_memory=["psm_", "psm_"])),
            f"worker killed: left behind {dict(Counter(['psm_']))} (shared memory)",
        ),
        (replace(stock, left=left(processes=["Worker"])), "worker killed: left behind {'Worker': 1} (processes)"),
    ):
        assert more_than_stock(worse, stock) == [said]
