"""Runs of steps for the device planner, and the check of one step against its CPU mirror, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from vllm_hlwq.expert_cache import EMPTY, SlotTable
from vllm_hlwq.plan_kernel import DeviceSlotTable, plan, prefetch

STATE = ("slot_of_expert", "expert_of_slot", "stamp_of_slot", "clock", "counters")

# Ways to hold the same ids in memory: as they come, transposed, every second column, and off any 16-byte boundary.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda ids: ids,
    "transposed": lambda ids: ids.t().contiguous().t(),
    "columns": lambda ids: ids.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda ids: torch.cat([ids.new_zeros(1), ids.flatten()])[1:].view(ids.shape),
}


@dataclass(frozen=True)
class Step:
    """What one step brings: ids [T, k], where there is padding bool [T], how the ids lie in device memory, and whether
    experts were prefetched for it."""

    ids: torch.Tensor
    is_padding: torch.Tensor | None = None
    layout: str = "contiguous"
    prefetched: bool = False


@dataclass
class Pair:
    """A device table and its mirror, led through the same steps."""

    num_experts: int
    num_slots: int
    staging_rows: int
    max_tokens: int
    top_k: int
    device: str = "cpu"
    expert_map: torch.Tensor | None = None
    table: DeviceSlotTable = field(init=False)
    mirror: SlotTable = field(init=False)

    def __post_init__(self) -> None:
        sizes = (self.num_experts, self.num_slots, self.staging_rows)
        everywhere = None if self.expert_map is None else len(self.expert_map)
        self.table = DeviceSlotTable(*sizes, self.max_tokens, self.top_k, self.device, everywhere)
        self.mirror = SlotTable(*sizes, global_experts=everywhere)

    def step(self, step: Step) -> None:
        """Plan a step on the device, then check it."""
        untouched = self.table.ids[len(step.ids) :].clone()
        ids = LAYOUTS[step.layout](step.ids.to(self.device))
        others = (step.is_padding, self.expert_map)
        others = tuple(None if t is None else LAYOUTS["offset"](t.to(self.device)) for t in others)
        if step.prefetched:
            prefetch(self.table)
        plan(self.table, ids, *others, prefetched=step.prefetched)
        self.check(step)
        assert torch.equal(self.table.ids[len(step.ids) :], untouched)

    def check(self, step: Step) -> None:
        """Move the mirror by a step that the device has planned, and compare all that both know."""
        table, ids = self.table, self.local_ids(step)
        ahead = 0
        if step.prefetched:
            wanted = self.mirror.prefetch().tolist()
            ahead = int(table.prefetch_count)
            assert table.prefetch_experts[:ahead].tolist() == wanted
        expected = self.mirror.plan_step(ids, ahead)
        assert torch.equal(table.ids[: len(ids)].cpu(), ids)
        for name in STATE:
            assert torch.equal(getattr(table, name).cpu(), getattr(self.mirror, name)), name
        assert table.slot_by_age.tolist() == self.mirror.stamp_of_slot.argsort(stable=True).tolist()

        loads, skip, staged = int(table.load_count), int(table.staged_skip), int(table.staged_count)
        assert table.load_experts[:loads].tolist() == expected.load_experts.tolist()
        assert table.load_slots[:loads].tolist() == expected.load_slots.tolist()
        places = dict(zip(expected.staged_places.tolist(), expected.staged.tolist(), strict=True))
        assert {place: int(table.staged_experts[place]) for place in places} == places
        assert {place for place in places if place >= skip} == set(range(skip, staged))

        wave_rows = torch.full((table.num_waves, self.num_experts), EMPTY, dtype=torch.int32)
        for expert in expected.resident.tolist():
            wave_rows[0, expert] = expected.slot_of_expert[expert]
        for place, expert in places.items():
            wave_rows[1 + place // self.staging_rows, expert] = place % self.staging_rows
            if place < skip:
                assert int(table.prefetch_experts[place]) == expert
        assert torch.equal(table.wave_rows.cpu(), wave_rows)

    def local_ids(self, step: Step) -> torch.Tensor:
        """int32 [T, k]: the ids that name an expert of this rank in a row that is no padding, -1 elsewhere."""
        ids = step.ids.long()
        if self.expert_map is not None:
            inside = (ids >= 0) & (ids < len(self.expert_map))
            ids = torch.where(inside, self.expert_map[ids.clamp(0, len(self.expert_map) - 1)].long(), EMPTY)
        named = (ids >= 0) & (ids < self.num_experts)
        if step.is_padding is not None:
            named &= ~step.is_padding[:, None]
        return torch.where(named, ids, EMPTY).int()


def random_ids(tokens: int, top_k: int, low: int, high: int, seed: int) -> torch.Tensor:
    """int64 [tokens, top_k] uniform in low..high, a token may name an expert twice."""
    return torch.randint(low, high + 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))


@st.composite
def steps(draw: st.DrawFn, top_k: int, num_ids: int, long_steps: tuple[int, ...]) -> Step:
    tokens = draw(st.one_of(st.integers(0, 9), st.sampled_from(long_steps)))
    # A narrow range makes hits, a wide one streams and brings ids of no expert.
    low = draw(st.integers(-2, num_ids - 1))
    high = draw(st.integers(low, num_ids + 2))
    ids = random_ids(tokens, top_k, low, high, draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    if tokens and draw(st.booleans()):
        # Far out of range; the int64 ones would be experts 0 and 3 if cut to 32 bits.
        extreme = (-(2**31), 2**31 - 1) if dtype == torch.int32 else (-(2**32), 2**40 + 3)
        ids[:: 1 + tokens // 3, draw(st.integers(0, top_k - 1))] = draw(st.sampled_from(extreme))
    is_padding = None
    if draw(st.booleans()):
        is_padding = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens)) < draw(st.floats(0, 1))
    return Step(ids.to(dtype), is_padding, draw(st.sampled_from(sorted(LAYOUTS))), draw(st.booleans()))


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Experts, slots, staging rows and top-k of a small layer."""
    num_experts = draw(st.integers(2, 40))
    num_slots = draw(st.integers(1, num_experts - 1))
    staging_rows = draw(st.one_of(st.integers(1, num_experts - num_slots), st.just(num_experts)))
    return num_experts, num_slots, staging_rows, draw(st.integers(1, 9))


@st.composite
def runs(
    draw: st.DrawFn,
    layer: st.SearchStrategy[tuple[int, int, int, int]],
    long_steps: tuple[int, ...],
    device: str = "cpu",
) -> tuple[Pair, list[Step]]:
    """A new pair of tables for a layer, with or without expert parallelism, and steps for it.

    Steps have up to 9 tokens, or one of the numbers in ``long_steps``.
    """
    num_experts, num_slots, staging_rows, top_k = draw(layer)
    expert_map = None
    num_ids = num_experts
    if draw(st.booleans()):
        num_ids = draw(st.integers(1, 2 * num_experts))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        # Local ids in any order, some of other ranks (-1), some that no rank should name.
        order = torch.randperm(max(num_ids, num_experts + 2), generator=generator)[:num_ids]
        expert_map = torch.where(order < num_experts + 2, order, -1).int()
    pair = Pair(num_experts, num_slots, staging_rows, max(long_steps), top_k, device, expert_map)
    return pair, draw(st.lists(steps(top_k, num_ids, long_steps), min_size=1, max_size=8))
