"""One layer's experts where ids are read on the host: the reference backend, on any device.

``HostExpertCache.step`` is the way of a step: ids -> plan -> gather -> compute, wave by wave -> sum over top-k.
``DeviceExpertCache`` is its counterpart that leaves every decision to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from .expert_cache import SlotTable, named_experts
from .host_store import HostStore
from .reference_backend import ReferenceBackend
from .weight_bank import WeightBank


@dataclass(frozen=True)
class Wave:
    """Experts that are computed together: int64 [R] local ids, their bank, and the bank row of each."""

    bank: WeightBank
    experts: torch.Tensor
    bank_rows: torch.Tensor


class HostExpertCache:
    """One layer's experts at run time: host store, slots, staging bank and backend.

    Attributes:
        record: called with a step's local ids, int32 ``[T, k]``, if they are recorded.
    """

    record: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self,
        store: HostStore,
        num_slots: int,
        staging_bank: WeightBank | None,
        backend: ReferenceBackend,
        device: torch.device,
        global_experts: int | None = None,
    ) -> None:
        """Take the banks.

        Args:
            store: the layer's experts, all loaded.
            num_slots: slots of the layer; with as many as experts all are resident and nothing is planned.
            staging_bank: where experts without a slot are computed; None when all are resident.
            backend: computes experts from a bank.
            device: where the banks lie.
            global_experts: experts of the layer on all ranks; None if they are all on this one.
        """
        self.num_experts = store.num_experts
        self.global_experts = global_experts or store.num_experts
        self.num_slots = num_slots
        self.record_bytes = store.layout.record_bytes
        self.layout_key = store.layout.key()
        self.backend = backend
        self.staging_bank = staging_bank
        self.table: SlotTable | None = None
        self.store: HostStore | None = None
        if staging_bank is None:
            self.slot_bank = WeightBank.resident(store, device)
        else:
            self.store = store
            self.slot_bank = WeightBank.allocate(num_slots, store.layout, device)
            self.table = SlotTable(self.num_experts, num_slots, staging_bank.rows, global_experts=global_experts)

    def step(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor | None,
        expert_ids: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Run all experts that a step names; none is ever left out.

        Args:
            hidden_states: [T, hidden] in the model's dtype.
            topk_weights: [T, k]; None when they were applied to the input.
            expert_ids: [T, k] integer, local ids; those outside 0..E-1 belong to no expert of this rank.
            output: [T, hidden], overwritten.
        """
        if self.record is not None:
            self.record(named_experts(expert_ids, self.num_experts))
        ids = expert_ids.cpu()
        out_rows = torch.zeros(ids.numel(), output.shape[1], dtype=torch.float32, device=output.device)
        with nullcontext() if self.table is None else self.table.empty_on_error():
            for wave in self._waves(ids):
                self.backend.compute(wave.bank, wave.experts, wave.bank_rows, hidden_states, ids, out_rows)
        self.backend.combine(out_rows, topk_weights, output)

    def _waves(self, ids: torch.Tensor) -> Iterator[Wave]:
        """Plan the step, then load and yield what is computed together; a wave is valid until the next is asked for."""
        if self.table is None or self.store is None or self.staging_bank is None:
            experts = torch.unique(ids).long()
            experts = experts[(experts >= 0) & (experts < self.num_experts)]
            yield Wave(self.slot_bank, experts, experts)
            return
        plan = self.table.plan_step(ids)
        self.slot_bank.load(self.store, plan.load_experts, plan.load_slots)
        if len(plan.resident):
            yield Wave(self.slot_bank, plan.resident, plan.slot_of_expert[plan.resident])
        for start in range(0, len(plan.staged), self.staging_bank.rows):
            experts = plan.staged[start : start + self.staging_bank.rows]
            rows = torch.arange(len(experts))
            self.staging_bank.load(self.store, experts, rows)
            yield Wave(self.staging_bank, experts, rows)

    def admit(self, expert: int) -> None:
        """Bring one expert into a slot as a step that needs it would, and compute nothing."""
        assert self.table is not None
        assert self.store is not None
        plan = self.table.plan_step(torch.tensor([expert]))
        self.slot_bank.load(self.store, plan.load_experts, plan.load_slots)

    def reset(self) -> None:
        """Forget residency and counts: what warm-up loaded must leave no trace."""
        if self.table is not None:
            self.table.reset()

    def counts(self) -> dict[str, int]:
        """Counters by name, with ``h2d_bytes`` copied to the device; all zero when every expert is resident."""
        counts = self.table.counts() if self.table is not None else dict.fromkeys(SlotTable(1, 1, 0).counts(), 0)
        counts["h2d_bytes"] = counts["copied"] * self.record_bytes
        return counts

    def weight_views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First field of each projection, for vLLM's kernel frame, which reads nothing of them but their being."""
        fields = self.slot_bank.fields
        return tuple(next(t for n, t in fields.items() if n.startswith(p)) for p in ("w13_", "w2_"))  # type: ignore[return-value]
