"""The benchmarks' routing: its statistics, its determinism, and its way into vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.bench import routing
from vllm_hlwq.bench.routing import (
    DECODE_ROWS,
    MEASURED_LOCALITY,
    REPEAT,
    REUSE_WITHIN_8,
    STEPS,
    STRATEGIES,
    LocalityTable,
    locality_trace,
)
from vllm_hlwq.expert_cache import SlotTable
from vllm_hlwq.plugin import ROUTING_VARIABLE

PROJECT = Path(__file__).parent.parent
EXPERTS, TOP_K = 128, 8


@pytest.fixture(scope="module")
def trace() -> torch.Tensor:
    return locality_trace(EXPERTS, TOP_K, steps=160)


@pytest.fixture(scope="module")
def table() -> LocalityTable:
    return LocalityTable.on(torch.device("cpu"), 16, 4)


@pytest.fixture(scope="module")
def used(trace: torch.Tensor) -> torch.Tensor:
    """Whether an expert is used, bool [steps, rows, experts]."""
    return torch.zeros(*trace.shape[:2], EXPERTS, dtype=torch.bool).scatter_(2, trace.long(), True)


def test_an_expert_repeats_at_the_next_token_as_measured(used: torch.Tensor) -> None:
    repeated = (used[1:] & used[:-1]).sum() / used[:-1].sum()
    assert float(repeated) == pytest.approx(REPEAT, abs=0.01)


def test_an_expert_is_reused_within_eight_tokens_as_measured(used: torch.Tensor) -> None:
    again = torch.stack([used[ahead : len(used) - 8 + ahead] for ahead in range(1, 9)]).any(0)
    reused = (again & used[:-8]).sum() / used[:-8].sum()
    assert float(reused) == pytest.approx(REUSE_WITHIN_8, abs=0.015)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (2, 15), (4, 27), (8, 43), (16, 59)])
def test_a_batch_names_as_many_experts_as_measured(used: torch.Tensor, tokens: int, experts: int) -> None:
    late = used[40::10].float().unflatten(1, (-1, tokens)).amax(2)
    assert float(late.sum(2).mean()) == pytest.approx(experts, rel=0.05)


@pytest.mark.parametrize(("slots", "hit_rate"), [(64, 0.96), (32, 0.85), (16, 0.59)])
def test_a_cache_hits_as_often_as_locality_lets_it(trace: torch.Tensor, slots: int, hit_rate: float) -> None:
    hits = queries = 0
    for row in range(6):
        table = SlotTable(EXPERTS, slots, TOP_K)
        for step, ids in enumerate(trace[:, row]):
            if step == 40:  # the cache is warm
                before = table.counts()
            table.plan_step(ids)
        after = table.counts()
        hits, queries = hits + after["hits"] - before["hits"], queries + after["queries"] - before["queries"]
    assert hits / queries == pytest.approx(hit_rate, abs=0.04)


def test_popularity_has_a_heavy_tail(used: torch.Tensor) -> None:
    share = used.float().mean((0, 1)).sort(descending=True).values / TOP_K
    assert 0.15 < float(share[:8].sum()) < 0.30  # uniform: 0.06
    assert 0.02 < float(share[-32:].sum()) < 0.16  # uniform: 0.25, yet no expert is dead
    assert float(share[-1]) > 0


def test_a_prompt_switch_forgets_the_recent_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PROMPT_TOKENS", 4)
    trace = locality_trace(EXPERTS, TOP_K, steps=30)
    used = torch.zeros(*trace.shape[:2], EXPERTS, dtype=torch.bool).scatter_(2, trace.long(), True)
    repeated = float((used[1:] & used[:-1]).sum() / used[:-1].sum())
    # A new prompt draws popular experts again, as often as two prompts that know nothing of each other share one.
    by_chance = float((used[:, 1:] & used[:, :-1]).sum() / used[:, 1:].sum())
    assert by_chance < 0.4
    assert repeated == pytest.approx(REPEAT * 3 / 4 + by_chance / 4, abs=0.02)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_a_tokens_experts_are_distinct_and_exist(experts: int, top_k: int, seed: int) -> None:
    top_k = min(experts, top_k)
    ids = locality_trace(experts, top_k, seed, steps=6)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < experts
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()


def test_the_seed_decides_the_trace() -> None:
    first, again = locality_trace(32, 4, seed=3, steps=20), locality_trace(32, 4, seed=3, steps=20)
    assert torch.equal(first, again)
    assert not torch.equal(first, locality_trace(32, 4, seed=4, steps=20))


def test_decode_rows_go_on_with_their_own_sequence_in_any_batch(table: LocalityTable) -> None:
    table.step.zero_()
    for step, tokens in enumerate((3, 3, 1, DECODE_ROWS), start=1):
        first, second = table.route(tokens, 0), table.route(tokens, 1)
        assert torch.equal(first, table.decode[step, :tokens])
        assert first.shape == second.shape == (tokens, 4)
        assert not torch.equal(first, second)


def test_a_prompt_is_consecutive_tokens_and_the_table_wraps(table: LocalityTable) -> None:
    table.step.fill_(STEPS - 1)
    assert torch.equal(table.route(DECODE_ROWS + 44, 0), table.prompt[: DECODE_ROWS + 44])
    table.step.fill_(STEPS - 2)
    start = (STEPS - 1) * DECODE_ROWS
    ids = table.route(DECODE_ROWS * 2, 0)
    assert torch.equal(ids, torch.cat([table.prompt[start:], table.prompt[:DECODE_ROWS]]))


REGISTERING = f"""
import os, sys
from vllm_hlwq.expert_cache import SlotTable
from vllm_hlwq.plugin import register
os.environ.pop({ROUTING_VARIABLE!r}, None)
register()
print("vllm_hlwq.bench.routing" in sys.modules)
os.environ[{ROUTING_VARIABLE!r}] = {MEASURED_LOCALITY!r}
register()
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulator
print({set(STRATEGIES)!r} <= set(RoutingSimulator.get_available_strategies()))
"""


def test_the_strategy_is_registered_only_where_the_variable_names_it() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTERING], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    off, on = done.stdout.splitlines()[-2:]
    assert off == "False"
    assert on == "True"
