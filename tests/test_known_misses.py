"""Steps whose misses are known: the planner's mirror finds what was promised, in every step of every repetition."""

from __future__ import annotations

import dataclasses

import layer_step
import plan_cost
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_misses import KnownSteps, check_outcome, first_ids, ids_of, is_known, known_steps, miss_counts

from vllm_hlwq.bench.moe_shapes import SHAPES
from vllm_hlwq.bench.routing import locality_trace
from vllm_hlwq.expert_cache import SlotTable, is_prompt


def follow(known: KnownSteps, experts: int, slots: int, tokens: int, top_k: int) -> None:
    """Lead the mirror through the period three times; from the second on each step must find what was promised."""
    table = SlotTable(experts, slots, max(1, experts - slots))
    if known.first:
        table.plan_step(first_ids(known, top_k))
        assert set(table.expert_of_slot[table.expert_of_slot >= 0].tolist()) == set(known.first)
    ids = ids_of(known, tokens, top_k)
    for round_number in range(3):
        for step, named in zip(ids, known.steps, strict=True):
            before = table.counts()
            table.plan_step(step)
            after = table.counts()
            if round_number:
                assert after["queries"] - before["queries"] == known.distinct == len(set(named))
                assert after["hits"] - before["hits"] == known.distinct - known.misses
                check_outcome(known, before, after)
                assert after["evictions"] - before["evictions"] == after["admitted"] - before["admitted"]


@pytest.mark.parametrize("slots", [4, 32, 64, 127])
def test_every_step_of_the_layer_part_misses_as_stated(slots: int) -> None:
    shape = SHAPES["gemma-4-26b-a4b"]
    for tokens, named, misses in layer_step.cases(shape, slots, quick=False):
        calls = layer_step.CALLS.get(tokens, layer_step.PREFILL_CALLS)
        known = known_steps(128, slots, named, misses, calls, is_prompt(tokens * shape.top_k, 128))
        assert (known.distinct, known.misses) == (named, misses)
        follow(known, 128, slots, tokens, shape.top_k)


@pytest.mark.parametrize(("experts", "top_k"), plan_cost.LAYERS)
def test_every_step_of_the_plan_part_misses_as_stated(experts: int, top_k: int) -> None:
    for slots in (experts // 4, experts - 1):
        for tokens in (1, 8, 32, 512):
            distinct = min(tokens * top_k, slots)
            cases = plan_cost.miss_cases(experts, slots, distinct)
            assert cases[0] == 0
            assert cases[-1] == (1 if slots == experts - 1 else distinct), "all can miss where slots are few"
            for misses in cases:
                follow(known_steps(experts, slots, distinct, misses, 2), experts, slots, tokens, top_k)
        follow(known_steps(experts, slots, experts, experts - slots, 2, True), experts, slots, 512, top_k)


@given(st.data())
@settings(max_examples=300)
def test_whatever_is_promised_holds(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 40))
    slots = data.draw(st.integers(1, experts - 1))
    distinct = data.draw(st.integers(1, experts))
    top_k = data.draw(st.integers(1, distinct))
    tokens = -(-distinct // top_k) + data.draw(st.sampled_from([0, 1, 2, 4, 4 * experts]))
    prompt = is_prompt(tokens * top_k, experts)
    misses = data.draw(st.sampled_from(miss_counts(experts, slots, distinct, prompt) or [None]))
    if misses is None:
        return
    known = known_steps(experts, slots, distinct, misses, data.draw(st.integers(1, 9)), prompt)
    follow(known, experts, slots, tokens, top_k)


def test_the_numbers_of_misses_are_those_that_can_last() -> None:
    assert miss_counts(128, 128, 8) == [0]
    assert miss_counts(128, 127, 8) == miss_counts(128, 127, 80) == [0, 1]
    assert miss_counts(128, 64, 8) == miss_counts(128, 32, 8) == [0, 1, 2, 4, 8]
    assert miss_counts(128, 4, 8) == [4, 8]
    assert miss_counts(128, 64, 48) == [0, 1, 2, 4, 8, 16, 32]
    assert miss_counts(128, 32, 48) == [16, 32, 48]
    assert miss_counts(128, 4, 48) == [44, 48]
    assert miss_counts(128, 64, 101) == [37]
    assert miss_counts(128, 64, 101, prompt=True) == [37, 64]
    assert miss_counts(128, 32, 101, prompt=True) == [69, 96]


@pytest.mark.parametrize(
    "sizes",
    [
        (128, 127, 8, 2),  # one expert at most is without a slot
        (128, 4, 8, 3),  # eight experts cannot all but three sit in four slots
        (128, 64, 48, 48),  # what misses now has no room to be gone by the next time
        (128, 32, 129, 97),
    ],
)
def test_what_cannot_last_is_refused(sizes: tuple[int, int, int, int]) -> None:
    assert not is_known(*sizes)
    with pytest.raises(ValueError, match=f"name {sizes[2]} of 128 experts and keep missing {sizes[3]} with {sizes[1]}"):
        known_steps(*sizes)


def test_ids_name_all_experts_and_no_token_names_one_twice() -> None:
    known = known_steps(128, 64, 48, 8, calls=5)
    ids = ids_of(known, 32, 8)
    assert ids.dtype == torch.int32
    assert ids.shape == (len(known.steps), 32, 8)
    for step, named in zip(ids, known.steps, strict=True):
        assert set(step.flatten().tolist()) == set(named)
        assert all(len(set(token)) == 8 for token in step.tolist())
    with pytest.raises(ValueError, match="5 tokens of 8 experts cannot name 48"):
        ids_of(known, 5, 8)


def test_hits_of_small_steps_rotate_over_more_than_a_gpu_caches() -> None:
    record, second_level = SHAPES["gemma-4-26b-a4b"].marlin_layout().record_bytes, 50 * 2**20
    for slots in (32, 64, 127, 128):
        for misses in miss_counts(128, slots, 8):
            named = {expert for step in known_steps(128, slots, 8, misses).steps for expert in step}
            assert len(named) * record > 1.9 * second_level


def test_other_outcomes_are_reported() -> None:
    known = known_steps(128, 32, 8, 2)
    before = {"steps": 5, "hits": 10, "admitted": 4, "staged": 0}
    check_outcome(known, before, {"steps": 7, "hits": 22, "admitted": 7, "staged": 1})
    for change in ({"hits": 21}, {"admitted": 8}, {"staged": 0}):
        with pytest.raises(AssertionError, match="2 steps of 8 experts, 2 of them misses"):
            check_outcome(known, before, {"steps": 7, "hits": 22, "admitted": 7, "staged": 1} | change)
    with pytest.raises(AssertionError, match="0 steps"):
        check_outcome(known, before, before)
    with pytest.raises(AssertionError, match="not 10 hits and 6 misses"):
        check_outcome(dataclasses.replace(known, misses=3), before, before | {"steps": 7, "hits": 22, "admitted": 8})


def test_batches_name_as_many_experts_as_with_the_measured_locality() -> None:
    trace = locality_trace(128, 8, steps=64)[20:]
    for tokens, named in layer_step.DECODE_EXPERTS.items():
        counts = [len(step[row : row + tokens].unique()) for step in trace for row in range(0, 256 - tokens + 1, 32)]
        assert named == pytest.approx(sum(counts) / len(counts), rel=0.05)
