"""The slot table of one layer and the planner that decides, step by step, which expert sits in which slot.

Policy only: nothing here copies a weight. ``plan_step`` is the CPU mirror of the device planner in ``plan_kernel.py``:
whole-tensor integer arithmetic without a data-dependent loop, which the kernel reproduces bit for bit.

A step needs the distinct experts named in its ``topk_ids``. Those in a slot are hits. The others are misses, and each
miss is either *admitted* (copied into a slot, evicting the least recently used expert that this step does not need) or
*staged* (computed in the staging bank and forgotten). No needed expert is ever left out.

A step is *streaming* when its experts exceed the slots and its tokens mention each expert several times, as the prefill
of a long prompt does. It admits into empty slots only and refreshes no stamp, so that a prompt does not flush what
decoding needs. Its staged experts come in ascending order. Before such a step the first experts without a slot can be
copied into the staging bank unasked (``prefetch``): a long prompt needs nearly all of them, and the copy can begin
before the layer's router has spoken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

EMPTY = -1
"""Marks an expert without a slot and a slot without an expert."""

COUNTERS = ("steps", "queries", "hits", "admitted", "evictions", "staged", "waves", "copied")
"""What a layer counts. ``queries`` are distinct experts per step: queries = hits + admitted + staged. ``copied`` ones
moved to the device: those admitted and staged, and those prefetched whether needed or not."""

MENTIONS_OF_A_PROMPT = 4
"""Mentions per expert of the layer, on any rank, from which on a step is taken for a prompt. Tokens that mention each
of 128 experts four times on average leave 2 % of them unused if they choose evenly, some more in practice. A decoding
batch that large is treated alike; where its tokens are alike, a resident set that stays costs it some hits."""


def is_prompt(mentions: int, global_experts: int) -> bool:
    """Whether a step of ``mentions`` = T * k pairs of (token, k) is taken for the prefill of a long prompt.

    Pairs are those of all experts of the layer, ``global_experts``, wherever they are.
    """
    return mentions >= MENTIONS_OF_A_PROMPT * global_experts


def named_experts(expert_ids: torch.Tensor, num_experts: int, is_padding: torch.Tensor | None = None) -> torch.Tensor:
    """The ids that a planner heeds, int32 and contiguous: ``EMPTY`` for what is no expert of this rank, and in padding.

    Args:
        expert_ids: integer ``[T, k]``, local ids.
        num_experts: experts of the layer on this rank.
        is_padding: bool ``[T]``; None if no row is.
    """
    named = (expert_ids >= 0) & (expert_ids < num_experts)
    if is_padding is not None:
        named = named & ~is_padding.unsqueeze(1)
    return torch.where(named, expert_ids, EMPTY).int().contiguous()


@dataclass(frozen=True)
class StepPlan:
    """What one step loads and where it computes; expert ids are local to this rank.

    Attributes:
        load_experts: int64 [L], experts to copy from the host store into slots.
        load_slots: int64 [L], the slot of each of them.
        slot_of_expert: int32 [E], the slot table after the loads, ``EMPTY`` where an expert has none.
        resident: int64 [R], needed experts that are computed in the slot bank, ascending.
        staged: int64 [S], needed experts that are computed in the staging bank, in order of first use;
            ascending in a streaming step.
        staged_places: int64 [S], the place of each: it is computed in staged wave ``place // staging_rows`` from row
            ``place % staging_rows``. 0, 1, 2 ... unless experts were prefetched: those have the first places.
    """

    load_experts: torch.Tensor
    load_slots: torch.Tensor
    slot_of_expert: torch.Tensor
    resident: torch.Tensor
    staged: torch.Tensor
    staged_places: torch.Tensor


class SlotState:
    """Which expert sits in which of a layer's slots, when it was last needed, and what has been counted.

    Tensors keep their addresses for life; only the counters can move, once and before anything is captured.

    Attributes:
        slot_of_expert: int32 [E], slot or ``EMPTY``.
        expert_of_slot: int32 [N], expert or ``EMPTY``.
        stamp_of_slot: int64 [N], clock of the last step that needed the slot's expert, -1 if never.
        clock: int64 [], number of steps that needed any expert.
        counters: int64 [len(COUNTERS)].
    """

    def __init__(
        self,
        num_experts: int,
        num_slots: int,
        staging_rows: int,
        device: torch.device | str = "cpu",
        global_experts: int | None = None,
    ) -> None:
        """Make an empty table.

        Args:
            num_experts: experts of the layer on this rank, E.
            num_slots: slots of the layer, N, 1 to E.
            staging_rows: experts that one staged wave holds; 1 or more unless N equals E.
            device: where the tensors lie.
            global_experts: experts of the layer on all ranks; None if they are all on this one.

        Raises:
            ValueError: a size is out of its range.
        """
        if not 1 <= num_slots <= num_experts:
            raise ValueError(f"num_slots={num_slots} must be 1 to num_experts={num_experts}")
        if num_slots < num_experts and staging_rows < 1:
            raise ValueError(f"staging_rows={staging_rows} must be 1 or more when num_slots < num_experts")
        self.num_experts = num_experts
        self.global_experts = global_experts or num_experts
        self.num_slots = num_slots
        self.staging_rows = staging_rows
        self.slot_of_expert = torch.empty(num_experts, dtype=torch.int32, device=device)
        self.expert_of_slot = torch.empty(num_slots, dtype=torch.int32, device=device)
        self.stamp_of_slot = torch.empty(num_slots, dtype=torch.int64, device=device)
        self.clock = torch.empty((), dtype=torch.int64, device=device)
        self.counters = torch.empty(len(COUNTERS), dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Empty every slot and zero clock and counters, as after start-up."""
        self.empty()
        self.clock.zero_()
        self.counters.zero_()

    def empty(self) -> None:
        """Empty every slot: of a step that broke off, experts may be named whose bytes never came."""
        self.slot_of_expert.fill_(EMPTY)
        self.expert_of_slot.fill_(EMPTY)
        self.stamp_of_slot.fill_(-1)

    @contextmanager
    def empty_on_error(self) -> Iterator[None]:
        """Empty every slot if what is done within breaks off between the plan of a step and its loads."""
        try:
            yield
        except BaseException:  # an interrupt too, after which an engine in its caller's process may go on
            self.empty()
            raise

    def count_in(self, counters: torch.Tensor) -> None:
        """Go on counting in another int64 [len(COUNTERS)] on the same device, from what is counted so far."""
        self.counters = counters.copy_(self.counters)

    def counts(self) -> dict[str, int]:
        """The counters by name; waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))


class SlotTable(SlotState):
    """The state of a layer's slots on the CPU, and the planner that moves it from step to step."""

    def prefetch(self) -> torch.Tensor:
        """Experts to copy into rows 0, 1, 2 ... of the staging bank before a step that is expected to need all.

        Returns:
            int64 [R], the first ``staging_rows`` experts without a slot, ascending; none as long as a slot is empty,
            since then it is for the step to say who gets it.
        """
        absent = torch.nonzero(self.slot_of_expert < 0).flatten()
        full = len(absent) == self.num_experts - self.num_slots
        experts = absent[: self.staging_rows if full else 0]
        self.counters[COUNTERS.index("copied")] += len(experts)
        return experts

    def plan_step(self, expert_ids: torch.Tensor, prefetched: int = 0) -> StepPlan:
        """Decide one step and update the table as if its loads were done.

        Args:
            expert_ids: integer tensor of any shape on the CPU, one expert per (token, k). Ids below 0 or at or
                above ``num_experts`` name no expert of this rank and are passed over.
            prefetched: how many experts ``prefetch`` has named since the step before, if they lie in the staging bank.
        """
        first_use = self._first_use(expert_ids)
        needed = first_use < expert_ids.numel()
        num_needed = int(needed.sum())
        streaming = num_needed > self.num_slots and is_prompt(expert_ids.numel(), self.global_experts)
        rank_without_slot = torch.cumsum(self.slot_of_expert < 0, 0) - 1

        hit = needed & (self.slot_of_expert >= 0)
        missing = torch.nonzero(needed & ~hit).flatten()
        missing = missing[torch.argsort(first_use[missing])]

        empty = self.expert_of_slot < 0
        held_is_needed = needed[self.expert_of_slot.clamp(min=0)] & ~empty
        usable = empty if streaming else empty | ~held_is_needed
        victims = torch.nonzero(usable).flatten()
        # A stable sort keeps equal stamps in slot order; empty slots have stamp -1 and come first.
        victims = victims[torch.argsort(self.stamp_of_slot[victims], stable=True)]

        admitted = min(len(missing), len(victims))
        load_experts, load_slots, staged = missing[:admitted], victims[:admitted], missing[admitted:]
        places, ahead = torch.arange(len(staged)), 0
        if streaming:
            staged = staged.sort().values
            rank = rank_without_slot[staged]
            ahead = int((rank < prefetched).sum())
            places = torch.where(rank < prefetched, rank, prefetched + places - ahead)
        evicted = self.expert_of_slot[load_slots]
        evicted = evicted[evicted >= 0].long()
        self.slot_of_expert[evicted] = EMPTY
        self.slot_of_expert[load_experts] = load_slots.int()
        self.expert_of_slot[load_slots] = load_experts.int()

        resident = torch.nonzero(needed & (self.slot_of_expert >= 0)).flatten()
        if num_needed:
            self.clock += 1
        refreshed = load_slots if streaming else self.slot_of_expert[resident].long()
        self.stamp_of_slot[refreshed] = self.clock

        last_place = int(places[-1]) if len(places) else -1
        waves = int(len(resident) > 0) + -(-(last_place + 1) // max(1, self.staging_rows))
        copied = admitted + len(staged) - ahead
        step = (int(num_needed > 0), num_needed, int(hit.sum()), admitted, len(evicted), len(staged), waves, copied)
        self.counters += torch.tensor(step, dtype=torch.int64)
        return StepPlan(load_experts, load_slots, self.slot_of_expert.clone(), resident, staged, places)

    def _first_use(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Position of each expert's first mention in row-major order, int64 [E]; ``numel`` if it is not mentioned.

        Routers list a token's experts by falling weight, so an earlier mention is the more deserving one.
        """
        flat = expert_ids.reshape(-1).long()
        valid = (flat >= 0) & (flat < self.num_experts)
        bins = torch.where(valid, flat, self.num_experts)
        first_use = torch.full((self.num_experts + 1,), flat.numel(), dtype=torch.int64)
        first_use.scatter_reduce_(0, bins, torch.arange(flat.numel()), reduce="amin")
        return first_use[: self.num_experts]
