"""The planner against an oracle that keeps its state in dictionaries and decides one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.expert_cache import COUNTERS, EMPTY, SlotTable


class Oracle:
    """The rules of the planner's module docstring, written as loops."""

    def __init__(self, num_experts: int, num_slots: int, staging_rows: int) -> None:
        self.num_experts, self.num_slots, self.staging_rows = num_experts, num_slots, staging_rows
        self.held: dict[int, int] = {}
        self.stamps = [-1] * num_slots
        self.clock = 0
        self.ahead: list[int] = []
        self.totals = dict.fromkeys(COUNTERS, 0)

    def prefetch(self) -> list[int]:
        experts = [e for e in range(self.num_experts) if e not in self.held.values()]
        self.ahead = experts[: self.staging_rows] if len(self.held) == self.num_slots else []
        self.totals["copied"] += len(self.ahead)
        return self.ahead

    def step(self, ids: list[int]) -> tuple[list[tuple[int, int]], list[int], dict[int, int]]:
        """Loads as (expert, slot), experts computed in slots, and each staged expert's place."""
        ahead, self.ahead = self.ahead, []
        needed = list(dict.fromkeys(i for i in ids if 0 <= i < self.num_experts))
        if not needed:
            return [], [], {}
        self.clock += 1
        streaming = len(needed) > self.num_slots and len(ids) >= 4 * self.num_experts
        slot_of = {expert: slot for slot, expert in self.held.items()}
        hits = [expert for expert in needed if expert in slot_of]
        loads, staged, evictions = [], [], 0
        for expert in needed:
            if expert in slot_of:
                continue
            taken = {slot for _, slot in loads}
            choices = [
                (self.stamps[slot], slot)
                for slot in range(self.num_slots)
                if slot not in taken and (slot not in self.held or (not streaming and self.held[slot] not in needed))
            ]
            if choices:
                loads.append((expert, min(choices)[1]))
            else:
                staged.append(expert)
        if streaming:
            staged.sort()
        else:
            ahead = []
        rest = [expert for expert in staged if expert not in ahead]
        places = {expert: (ahead + rest).index(expert) for expert in staged}
        for expert, slot in loads:
            evictions += slot in self.held
            self.held[slot] = expert
        for slot, expert in self.held.items():
            if (slot in {s for _, s in loads}) if streaming else (expert in needed):
                self.stamps[slot] = self.clock
        resident = sorted(expert for expert in self.held.values() if expert in needed)
        waves = (len(resident) > 0) + (max(places.values()) // self.staging_rows + 1 if places else 0)
        copied = len(loads) + len(rest)
        for name, amount in zip(
            COUNTERS, (1, len(needed), len(hits), len(loads), evictions, len(staged), waves, copied), strict=True
        ):
            self.totals[name] += amount
        return loads, resident, places


Run = tuple[tuple[int, int, int], list[tuple[torch.Tensor, bool]]]


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, int]:
    num_experts = draw(st.integers(1, 40))
    return num_experts, draw(st.integers(1, num_experts)), draw(st.integers(1, num_experts))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Steps of up to nine tokens, or of as many as a prompt has, and whether experts are prefetched before each."""
    layer = draw(layers())
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        top_k = draw(st.integers(1, 8))
        tokens = draw(st.one_of(st.integers(0, 9), st.just(-(-4 * layer[0] // top_k))))
        # A narrow range makes hits, a wide one brings ids of no expert: padding (-1) and other ranks'.
        low = draw(st.integers(-2, layer[0]))
        ids = st.integers(low, draw(st.integers(low, layer[0] + 2)))
        flat = draw(st.lists(ids, min_size=tokens * top_k, max_size=tokens * top_k))
        steps.append((torch.tensor(flat, dtype=torch.int32).view(tokens, top_k), draw(st.booleans())))
    return layer, steps


@given(runs())
@settings(max_examples=300, deadline=None)
def test_every_step_equals_the_oracle(run: Run) -> None:
    layer, steps = run
    table, oracle = SlotTable(*layer), Oracle(*layer)
    for ids, ahead in steps:
        prefetched = table.prefetch().tolist() if ahead else []
        assert prefetched == (oracle.prefetch() if ahead else [])
        plan = table.plan_step(ids, len(prefetched))
        loads, resident, places = oracle.step(ids.flatten().tolist())
        assert list(zip(plan.load_experts.tolist(), plan.load_slots.tolist(), strict=True)) == loads
        assert plan.resident.tolist() == resident
        assert list(zip(plan.staged.tolist(), plan.staged_places.tolist(), strict=True)) == list(places.items())
        assert {s: e for s, e in enumerate(table.expert_of_slot.tolist()) if e != EMPTY} == oracle.held
        assert table.stamp_of_slot.tolist() == oracle.stamps
        assert table.counts() == oracle.totals


@given(runs())
@settings(max_examples=300, deadline=None)
def test_what_must_hold_after_every_step(run: Run) -> None:
    (num_experts, num_slots, staging), steps = run
    table = SlotTable(num_experts, num_slots, staging)
    before = table.slot_of_expert.tolist()
    for ids, ahead in steps:
        prefetched = table.prefetch().tolist() if ahead else []
        plan = table.plan_step(ids, len(prefetched))
        needed = {i for i in ids.flatten().tolist() if 0 <= i < num_experts}
        resident, staged = plan.resident.tolist(), plan.staged.tolist()
        # The waves partition what is needed, and every resident expert has a slot.
        assert sorted(resident + staged) == sorted(needed)
        assert all(plan.slot_of_expert[expert] >= 0 for expert in resident)
        # What the number of waves in a captured graph relies on.
        assert max(plan.staged_places.tolist(), default=-1) < num_experts - num_slots
        assert len(plan.staged_places.unique()) == len(staged)
        # Table and slots are inverses of each other: slots are unique.
        held = {int(e): s for s, e in enumerate(table.expert_of_slot) if e != EMPTY}
        assert held == {e: s for e, s in enumerate(table.slot_of_expert.tolist()) if s != EMPTY}
        # A needed expert that was in a slot is still in the same one.
        assert all(before[e] == plan.slot_of_expert[e] for e in needed if before[e] != EMPTY)
        counts = table.counts()
        assert counts["queries"] == counts["hits"] + counts["admitted"] + counts["staged"]
        assert counts["evictions"] <= counts["admitted"]
        assert counts["admitted"] <= counts["copied"]
        before = table.slot_of_expert.tolist()


@given(runs())
@settings(max_examples=50, deadline=None)
def test_equal_histories_give_equal_tables(run: Run) -> None:
    layer, steps = run
    first, second = SlotTable(*layer), SlotTable(*layer)
    for ids, _ in steps:
        first.plan_step(ids)
        second.plan_step(ids.long())
    for name in ("slot_of_expert", "expert_of_slot", "stamp_of_slot", "clock", "counters"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_the_least_recently_needed_expert_leaves() -> None:
    table = SlotTable(num_experts=16, num_slots=3, staging_rows=4)
    for expert in (5, 6, 7, 5):
        table.plan_step(ids([expert]))
    plan = table.plan_step(ids([9]))
    assert plan.load_slots.tolist() == [1]
    assert table.expert_of_slot.tolist() == [5, 9, 7]


def test_fewer_slots_than_top_k_keeps_the_experts_named_first() -> None:
    table = SlotTable(num_experts=16, num_slots=2, staging_rows=4)
    plan = table.plan_step(ids([11, 3, 8, 2]))
    assert plan.load_experts.tolist() == [11, 3]
    assert plan.staged.tolist() == [8, 2]
    assert table.counts()["waves"] == 2


def test_a_streaming_step_leaves_residents_and_their_order_alone() -> None:
    table = SlotTable(num_experts=8, num_slots=2, staging_rows=3)
    table.plan_step(ids([4]))
    table.plan_step(ids([1]))
    plan = table.plan_step(ids(*[[0, 1, 2, 3], [4, 5, 6, 7]] * 4))
    assert plan.resident.tolist() == [1, 4]
    assert plan.staged.tolist() == [0, 2, 3, 5, 6, 7]
    assert table.expert_of_slot.tolist() == [4, 1]
    # The prompt used both, yet expert 4 is still the older one.
    assert table.plan_step(ids([7])).load_slots.tolist() == [0]


def test_a_streaming_step_fills_empty_slots_by_mention_and_stages_by_number() -> None:
    table = SlotTable(num_experts=8, num_slots=2, staging_rows=3)
    table.plan_step(ids([4]))
    plan = table.plan_step(ids(*[[7, 5, 4, 2], [0, 6, 3, 1]] * 4))
    assert plan.load_experts.tolist() == [7]
    assert plan.staged.tolist() == [0, 1, 2, 3, 5, 6]


def test_a_batch_that_decodes_is_not_streaming_though_it_needs_all_experts() -> None:
    table = SlotTable(num_experts=8, num_slots=1, staging_rows=3)
    table.plan_step(ids([0]))
    plan = table.plan_step(ids([7, 5, 2, 3], [1, 4, 6, 7]))
    assert plan.load_experts.tolist() == [7]
    assert plan.staged.tolist() == [5, 2, 3, 1, 4, 6]


def test_a_rank_with_a_part_of_the_experts_counts_mentions_of_all() -> None:
    """Of 16 experts 8 are here: 8 tokens of 4 are 2 mentions for each, as if all 16 had been here."""
    steps = ids([0]), ids(*[[7, 5, -1, -1], [1, -1, 4, -1]] * 4)
    here, part = SlotTable(8, 2, 3), SlotTable(8, 2, 3, global_experts=16)
    for step in steps:
        here.plan_step(step)
        part.plan_step(step)
    assert here.expert_of_slot.tolist() == [0, 7], "taken for a prompt: what is resident stays"
    assert part.expert_of_slot.tolist() == [5, 7] or part.expert_of_slot.tolist() == [7, 5]


def test_prefetched_experts_have_the_first_places() -> None:
    table = SlotTable(num_experts=8, num_slots=2, staging_rows=3)
    assert table.prefetch().tolist() == [], "a slot is empty"
    table.plan_step(ids([4, 1]))
    assert table.prefetch().tolist() == [0, 2, 3]
    plan = table.plan_step(ids(*[[5, 0, 3, 7]] * 8), prefetched=3)
    assert plan.staged.tolist() == [0, 3, 5, 7]
    assert plan.staged_places.tolist() == [0, 2, 3, 4]
    counts = table.counts()
    assert (counts["staged"], counts["copied"]) == (4, 2 + 3 + 2)


def test_all_tokens_to_one_expert_is_one_query() -> None:
    table = SlotTable(num_experts=8, num_slots=1, staging_rows=1)
    plan = table.plan_step(torch.full((300, 4), 6))
    assert plan.load_experts.tolist() == [6]
    assert table.counts() == {
        "steps": 1, "queries": 1, "hits": 0, "admitted": 1, "evictions": 0, "staged": 0, "waves": 1,
        "copied": 1,
    }  # fmt: skip


def test_a_plan_stays_as_it_is_when_the_next_step_moves_the_table() -> None:
    table = SlotTable(num_experts=4, num_slots=1, staging_rows=3)
    plan = table.plan_step(ids([2]))
    table.plan_step(ids([3]))
    assert plan.slot_of_expert.tolist() == [EMPTY, EMPTY, 0, EMPTY]
    assert table.slot_of_expert.tolist() == [EMPTY, EMPTY, EMPTY, 0]


def test_as_many_slots_as_experts_need_no_staging() -> None:
    table = SlotTable(num_experts=4, num_slots=4, staging_rows=0)
    plan = table.plan_step(ids([3, 0], [1, 2]))
    assert plan.resident.tolist() == [0, 1, 2, 3]
    assert table.counts()["waves"] == 1


def test_reset_forgets_everything() -> None:
    table = SlotTable(num_experts=8, num_slots=2, staging_rows=1)
    table.plan_step(ids([1, 2, 3]))
    table.reset()
    assert table.expert_of_slot.tolist() == [EMPTY, EMPTY]
    assert table.slot_of_expert.tolist() == [EMPTY] * 8
    assert table.counts() == dict.fromkeys(COUNTERS, 0)
    assert int(table.clock) == 0


@pytest.mark.parametrize(("slots", "staging"), [(0, 1), (9, 1), (4, 0)])
def test_impossible_sizes_are_refused(slots: int, staging: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        SlotTable(num_experts=8, num_slots=slots, staging_rows=staging)
