"""The layer benchmark's measurement in Triton's interpreter: real caches and kernels, a clock that only counts.

One wave only, like test_device_expert_cache.py, whose backend computes the experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import layer_step
import plan_cost
import pytest
import torch
from known_misses import ids_of, known_steps
from test_device_expert_cache import CPU, EXPERTS, HIDDEN, TOP_K, OneMatrix

from vllm_hlwq.bench.moe_shapes import MoeShape
from vllm_hlwq.device_expert_cache import DeviceExpertCache, Staging
from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.marlin_moe import Buffers
from vllm_hlwq.plan_kernel import DeviceSlotTable
from vllm_hlwq.weight_bank import WeightBank

SHAPE = MoeShape(HIDDEN, HIDDEN, EXPERTS, TOP_K, group_size=HIDDEN, activation="none")
LAYOUT = RecordLayout({"w13_weight": ((HIDDEN, HIDDEN), torch.bfloat16), "w2_weight": ((HIDDEN,), torch.bfloat16)})


class Backend(OneMatrix):
    def workspace_shapes(self, tokens: int, hidden: int, top_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (0,), (tokens * top_k, hidden)

    def buffers(self, workspace13: torch.Tensor, workspace2: torch.Tensor, rows: int) -> Buffers:
        return Buffers(workspace13, workspace13, workspace2[:rows])


def make_cache(slots: int) -> DeviceExpertCache:
    store = HostStore(EXPERTS, LAYOUT)
    store.device_address = store.address
    for name in LAYOUT:
        generator = torch.Generator().manual_seed(len(name))
        store.field(name).copy_(torch.randn(store.field(name).shape, generator=generator))
    if slots == EXPERTS:
        bank = WeightBank.resident(store, CPU)
        return DeviceExpertCache(None, bank, None, Backend(), EXPERTS, TOP_K, max_tokens=8)
    bank = WeightBank.allocate(EXPERTS - slots, LAYOUT, CPU)
    staging = Staging((bank,), (Gather(LAYOUT, bank),), stream=None)
    slot_bank = WeightBank.allocate(slots, LAYOUT, CPU)
    return DeviceExpertCache(store, slot_bank, staging, Backend(), EXPERTS, TOP_K, max_tokens=8)


def count_only(call: Callable[[int], Any], calls: int, repeats: int) -> float:
    """Two repetitions; each call is said to take as many microseconds as there are calls."""
    for _ in range(2):
        for number in range(calls):
            call(number)
    return calls * 1e-6


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> layer_step.Layer:
    monkeypatch.setattr(layer_step, "CALLS", {1: 3, 2: 3})
    monkeypatch.setattr(layer_step, "PART_CALLS", 5)
    return layer_step.Layer(SHAPE, 8, make_cache, CPU, count_only)


@pytest.mark.parametrize(("slots", "tokens", "named", "misses"), [(4, 1, 3, 3), (6, 2, 5, 2), (11, 1, 3, 1)])
def test_a_row_holds_the_times_of_a_checked_step(
    layer: layer_step.Layer, slots: int, tokens: int, named: int, misses: int
) -> None:
    cache = make_cache(slots)
    row = layer_step.measure_case(layer, cache, tokens, named, misses, bandwidth=1e9)
    calls = len(known_steps(EXPERTS, slots, named, misses, 3).steps)
    assert (row["step_us"], row["resident_us"]) == (pytest.approx(calls), pytest.approx(calls))
    assert row["link_us"] == pytest.approx(misses * cache.record_bytes / 1e3)
    whole_periods = pytest.approx(calls * -(-5 // calls))
    parts = dict.fromkeys(("plan", "blocks", "gather", "combine"), whole_periods)
    assert row["parts_us"] == parts | {"compute": pytest.approx(calls)}
    assert (row["tokens"], row["slots"], row["distinct"], row["misses"]) == (tokens, slots, named, misses)


def test_a_row_of_the_resident_layer_has_nothing_of_a_cache(layer: layer_step.Layer) -> None:
    row = layer_step.measure_case(layer, layer.resident, 2, 5, 0, bandwidth=1e9)
    assert set(row["parts_us"]) == {"align", "combine", "compute"}
    assert (row["over_us"], row["link_us"]) == (0, 0)


def test_wrong_experts_are_noticed(layer: layer_step.Layer) -> None:
    cache = make_cache(4)
    for name in LAYOUT:
        cache.store.field(name)[:2] = cache.store.field(name)[2:4].clone()
    with pytest.raises(AssertionError, match="1 tokens, 4 slots, 3 misses: the output differs"):
        layer_step.measure_case(layer, cache, 1, 3, 3, bandwidth=1e9)


def test_other_misses_than_known_are_noticed(layer: layer_step.Layer) -> None:
    known = known_steps(EXPERTS, 6, 3, 2, 3)
    ids = ids_of(known, 1, TOP_K)
    layer.known_steps_us(make_cache(6), known, ids)
    with pytest.raises(AssertionError, match="3 of them misses: counted"):
        layer.known_steps_us(make_cache(6), dataclasses.replace(known, misses=3), ids)


def test_the_plan_part_plans_known_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cost, "seconds_per_call", count_only)
    table = DeviceSlotTable(EXPERTS, 4, EXPERTS - 4, 8, TOP_K, "cpu")
    for distinct, misses, tokens in ((3, 0, 1), (3, 2, 1), (4, 4, 2), (12, 8, 8)):
        known = known_steps(EXPERTS, 4, distinct, misses, 4)
        assert plan_cost.plan_us(table, known, tokens) == pytest.approx(len(known.steps))
        with pytest.raises(AssertionError, match="misses: counted"):
            plan_cost.plan_us(table, dataclasses.replace(known, misses=misses + 1), tokens)
