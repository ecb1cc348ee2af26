"""The device planner in Triton's interpreter: every state and outcome is what its CPU mirror makes of the same step."""

import pytest
import torch
from hypothesis import given, settings
from plan_cases import Pair, Step, layers, random_ids, runs

from vllm_hlwq.plan_kernel import _FIRST_BLOCK, _LONG_BLOCK


@given(runs(layers(), long_steps=(70, 300)))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_step_equals_the_mirror(run: tuple[Pair, list[Step]]) -> None:
    pair, steps = run
    for step in steps:
        pair.step(step)


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "staging_rows", "tokens", "top_k"),
    [
        (1023, 1, 1022, 40, 32),
        (1023, 1022, 1, 40, 32),
        (1023, 512, 100, 1, 32),
        (2, 1, 1, 3, 1),
        (128, 32, 96, 1, 8),
        (128, 32, 96, 32, 8),
        (128, 4, 62, 8192, 8),
    ],
)
def test_extreme_sizes(num_experts: int, num_slots: int, staging_rows: int, tokens: int, top_k: int) -> None:
    pair = Pair(num_experts, num_slots, staging_rows, tokens, top_k)
    for seed in range(2):
        pair.step(Step(random_ids(tokens, top_k, 0, num_experts - 1, seed)))
        pair.step(Step(random_ids(1, top_k, 0, num_experts - 1, seed + 10)))
    assert pair.table.counts()["queries"] > 0


def test_misses_that_are_first_mentioned_late_are_ranked_by_mention() -> None:
    """Ids beyond the kernel's first blocks decide, and atomics on known experts are skipped before."""
    pair = Pair(num_experts=64, num_slots=8, staging_rows=56, max_tokens=1500, top_k=4)
    ids = random_ids(1500, 4, 0, 3, seed=0)
    ids[70, 2] = 40
    ids[1200, 1], ids[1200, 3], ids[1400, 0] = 60, 30, 20
    pair.step(Step(ids))
    assert pair.table.load_experts[4:8].tolist() == [40, 60, 30, 20]


@pytest.mark.parametrize("tokens", [_FIRST_BLOCK, _FIRST_BLOCK + 1, _FIRST_BLOCK + _LONG_BLOCK + 1])
def test_the_last_id_of_a_step_counts(tokens: int) -> None:
    """Where the kernel's blocks end, and one id past their ends."""
    pair = Pair(num_experts=64, num_slots=8, staging_rows=56, max_tokens=tokens, top_k=1)
    ids = random_ids(tokens, 1, 0, 3, seed=0)
    ids[-1] = 40
    pair.step(Step(ids))
    assert pair.table.load_experts[4].item() == 40


def test_only_padding_changes_nothing() -> None:
    pair = Pair(num_experts=16, num_slots=4, staging_rows=12, max_tokens=6, top_k=4)
    pair.step(Step(random_ids(6, 4, 0, 15, seed=0)))
    before = pair.table.counts()
    pair.step(Step(random_ids(6, 4, 0, 15, seed=1), torch.ones(6, dtype=torch.bool)))
    assert pair.table.counts() == before
    assert pair.table.load_count.item() == pair.table.staged_count.item() == 0
    assert set(pair.table.wave_rows.flatten().tolist()) == {-1}


def test_a_streaming_step_fills_empty_slots_and_stages_the_rest_in_order() -> None:
    pair = Pair(num_experts=8, num_slots=3, staging_rows=3, max_tokens=8, top_k=4)
    pair.step(Step(torch.tensor([[5, 5, 5, 5]])))
    pair.step(Step(torch.tensor([[7, 3, 6, 5], [4, 0, 2, 1]] * 4)))
    assert pair.table.expert_of_slot.tolist() == [5, 7, 3]
    assert pair.table.staged_experts[:5].tolist() == [0, 1, 2, 4, 6]
    assert pair.table.slot_by_age.tolist() == [0, 1, 2]
    assert pair.table.wave_rows.tolist() == [
        [-1, -1, -1, 2, -1, 0, -1, 1],
        [0, 1, 2, -1, -1, -1, -1, -1],
        [-1, -1, -1, -1, 0, -1, 1, -1],
    ]


def test_reset_starts_again() -> None:
    pair = Pair(num_experts=16, num_slots=4, staging_rows=12, max_tokens=6, top_k=4)
    for seed in range(3):
        pair.step(Step(random_ids(1, 4, 0, 15, seed)))
    pair.table.reset()
    pair.mirror.reset()
    pair.step(Step(random_ids(1, 4, 0, 15, seed=9)))
    assert pair.table.counts()["steps"] == 1


def test_a_step_is_streaming_from_four_mentions_an_expert_on() -> None:
    pair = Pair(num_experts=8, num_slots=1, staging_rows=7, max_tokens=8, top_k=4)
    pair.step(Step(torch.tensor([[0, 0, 0, 0]])))
    pair.step(Step(torch.tensor([[7, 5, 2, 3]] * 7)))
    assert pair.table.expert_of_slot.tolist() == [7]
    assert pair.table.staged_experts[:3].tolist() == [5, 2, 3]
    pair.step(Step(torch.tensor([[0, 5, 2, 3]] * 8)))
    assert pair.table.expert_of_slot.tolist() == [7]
    assert pair.table.staged_experts[:4].tolist() == [0, 2, 3, 5]


def test_prefetched_experts_have_the_first_places() -> None:
    pair = Pair(num_experts=8, num_slots=2, staging_rows=3, max_tokens=8, top_k=4)
    pair.step(Step(torch.tensor([[4, 1, 4, 1]])))
    pair.step(Step(torch.tensor([[5, 0, 3, 7]] * 8), prefetched=True))
    assert (int(pair.table.staged_skip), int(pair.table.staged_count)) == (3, 5)
    assert pair.table.wave_rows.tolist() == [
        [-1] * 8,
        [0, -1, -1, 2, -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, 0, -1, 1],
    ]
