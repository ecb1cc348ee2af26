"""One layer's experts on CUDA: every decision of a step is made on the device, and the host only enqueues.

``DeviceExpertCache.step`` is the way of a step: ids -> plan -> gather -> compute, wave by wave -> sum over top-k. All
addresses and shapes are fixed, and how much is loaded is read from device memory, so a step can be captured in a CUDA
graph. ``HostExpertCache`` is its counterpart where ids are read on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from .device_backend import Buffers, DeviceBackend
from .expert_cache import COUNTERS, is_prompt, named_experts
from .gather_kernel import Gather
from .host_store import HostStore
from .plan_kernel import DeviceSlotTable, plan, prefetch
from .short_steps import MOST_PAIRS, blocks_of_short_step, lanes
from .staging import Arrival, Staging
from .wave_blocks import Alignment, blocks_of_waves
from .weight_bank import WeightBank


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The ids of a rank's own experts, -1 for those of others and in padding."""
    return topk_ids if expert_map is None else torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)])


class DeviceExpertCache:
    """Slots, table and backend of one layer.

    Args:
        store: the layer's experts in the kernels' layout, page-locked; None if all are resident in ``slot_bank``.
        slot_bank: the layer's slots; all experts, row = expert, when there is no store.
        staging: None when all are resident.
        backend: computes experts from a bank.
        num_experts: experts of the layer on this rank.
        top_k: experts of a token.
        max_tokens: rows of the largest step.

    Attributes:
        record: called with a step's local ids, int32 ``[T, k]`` on the device, if they are recorded; only enqueues.
    """

    record: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self,
        store: HostStore | None,
        slot_bank: WeightBank,
        staging: Staging | None,
        backend: DeviceBackend,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        global_experts: int | None = None,
    ) -> None:
        self.store = store
        self.slot_bank = slot_bank
        self.staging_bank = staging
        self.backend = backend
        self.num_experts = num_experts
        self.global_experts = global_experts or num_experts
        self.num_slots = slot_bank.rows
        self.record_bytes = slot_bank.nbytes // slot_bank.rows
        self.table: DeviceSlotTable | None = None
        if store is None or staging is None:
            return
        assert store.device_address is not None
        self._address = store.device_address
        self.layout_key = store.layout.key()
        device = next(iter(slot_bank.fields.values())).device
        self._runtime = torch.get_device_module(device)
        self.table = DeviceSlotTable(
            num_experts, slot_bank.rows, staging.rows, max_tokens, top_k, device, global_experts
        )
        self._load_slots = Gather(store.layout, slot_bank)
        staging.add(self)
        self._staged_rows = torch.arange(num_experts, dtype=torch.int32, device=device) % staging.rows
        self._compile_kernels(self.table, top_k, device)

    def _compile_kernels(self, table: DeviceSlotTable, top_k: int, device: torch.device) -> None:
        """Launch each kernel once in each of its forms: while a graph is captured, nothing can be compiled."""
        nothing = torch.full((1,), -1, dtype=torch.int32, device=device)
        for dtype in (torch.int32, torch.int64):
            for prefetched in (False, True):
                plan(table, torch.full((1, top_k), -1, dtype=dtype, device=device), prefetched=prefetched)
        prefetch(table)
        short_steps = range(1, min(self.num_slots, MOST_PAIRS) + 1)
        for pairs in {lanes(pairs): pairs for pairs in short_steps}.values():
            blocks_of_short_step(nothing.repeat(pairs).view(1, pairs), table.wave_rows[0], 8)
        for waves in (1, table.num_waves):
            blocks_of_waves(Alignment(nothing, nothing, nothing, 1), table.wave_rows[:waves])
        self._load_slots(self._address, table.load_experts, table.load_slots, table.load_count)
        table.reset()

    def step(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        output: torch.Tensor,
        buffers: Buffers,
        weights_on_input: bool,
        is_padding: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        forward: object | None = None,
    ) -> None:
        """Enqueue all experts that a step names; none is ever left out.

        Args:
            hidden_states: ``[T, hidden]``, BF16 or FP16.
            topk_weights: float32 ``[T, k]``.
            topk_ids: integer ``[T, k]``, global ids.
            output: ``[T, hidden]``, overwritten.
            buffers: working memory for ``T * k`` rows.
            weights_on_input: whether the weights multiply the input.
            is_padding: bool ``[T]``, rows that need no expert; None if there are none.
            expert_map: int32, global to local ids under expert parallelism.
            forward: an object for each forward pass, the same for its layers: they may then prefetch for each other.
        """
        with nullcontext() if self.table is None else self.table.empty_on_error():
            if self.table is None:
                ids = local_ids(topk_ids, expert_map).int().contiguous()
                alignment = self.backend.align(ids, self.num_experts)
                waves = iter([(self.slot_bank, alignment)])
                if self.record is not None:
                    self.record(named_experts(ids, self.num_experts, is_padding))
            else:
                arrival = self._arrival(topk_ids.numel(), forward)
                plan(self.table, topk_ids, is_padding, expert_map, prefetched=arrival is not None)
                ids = self.table.ids[: len(topk_ids)]
                if self.record is not None:
                    self.record(ids)
                waves = self._waves(self.blocks(ids), topk_ids.numel(), forward, arrival)
            for bank, blocks in waves:
                self.backend.compute(bank, blocks, hidden_states, topk_weights, weights_on_input, buffers)
            # With a table, rows that pad have no expert.
            self.backend.combine(buffers.out_rows, ids, output, all_written=self.table is None and expert_map is None)

    def _arrival(self, pairs: int, forward: object | None) -> Arrival | None:
        """What the layer before has prefetched for this step of ``pairs`` = T * k, if it did."""
        assert self.staging_bank is not None
        if forward is None:
            return None
        self.staging_bank.enter(self, forward)
        if not self._overlaps(pairs):
            return None
        self.staging_bank.watch()
        return self.staging_bank.take(self)

    def _overlaps(self, pairs: int) -> bool:
        """Whether layers prefetch for each other in a step of ``pairs``.

        Not in a capture: a graph may hold a single layer, and what it copies must be there when the graph ends.
        """
        if not is_prompt(pairs, self.global_experts):
            return False
        return self._runtime is not torch.cuda or not torch.cuda.is_current_stream_capturing()

    def blocks(self, ids: torch.Tensor) -> list[Alignment]:
        """The blocks of each wave of the step that was planned last.

        How many waves there are follows from shapes alone: one if every (token, k) could name another expert and still
        fit the slots, else as many as ``DeviceSlotTable`` proves enough.

        Args:
            ids: its local ids, int32 ``[T, k]``, as the planner wrote them.
        """
        table, pairs = self.table, ids.numel()
        assert table is not None
        if pairs <= min(self.num_slots, MOST_PAIRS):
            tokens, top_k = ids.shape
            size = self.backend.block_size(tokens, top_k, self.num_experts)
            return [blocks_of_short_step(ids, table.wave_rows[0], size)]
        wave_rows = table.wave_rows[: 1 if pairs <= self.num_slots else None]
        return blocks_of_waves(self.backend.align(ids, self.num_experts), wave_rows)

    def _waves(
        self, blocks: list[Alignment], pairs: int, forward: object | None, arrival: Arrival | None
    ) -> Iterator[tuple[WeightBank, Alignment]]:
        """Enqueue the step's loads; give out bank and blocks of each wave, which is to be computed before the next."""
        table, staging = self.table, self.staging_bank
        assert table is not None
        assert staging is not None
        if len(blocks) == 1:
            self._load_slots(self._address, table.load_experts, table.load_slots, table.load_count)
            yield self.slot_bank, blocks[0]
            return
        next_layer = staging.successor(self) if forward is not None and self._overlaps(pairs) else None
        if next_layer is not None:
            assert next_layer.table is not None
            prefetch(next_layer.table)
        staged_waves = table.num_waves - 1
        first_bank = 0 if arrival is None else arrival.bank
        ahead = len(staging.banks)

        def bank(load: int) -> int:
            return (first_bank + load - 1) % ahead

        def enqueue(wave: int) -> torch.cuda.Event | None:
            lists = (table.staged_experts, self._staged_rows, table.staged_count)
            with self._runtime.stream(staging.stream):
                staging.gathers[bank(wave)](self._address, *lists, (wave - 1) * staging.rows, table.staged_skip)
                return staging.stream.record_event()

        compute = self._runtime.current_stream()
        # Also waits for the layers before, which read the staging banks.
        staging.stream.wait_stream(compute)
        loaded = {wave: enqueue(wave) for wave in range(1, min(staged_waves, ahead) + 1)}
        self._load_slots(self._address, table.load_experts, table.load_slots, table.load_count)
        for wave in range(table.num_waves):
            if wave:
                compute.wait_event(loaded[wave])
            yield staging.banks[bank(wave)] if wave else self.slot_bank, blocks[wave]
            # A bank is free as soon as the wave that reads it is computed; the next layer's is the one after the last.
            following = wave + ahead
            if wave and following <= staged_waves + 1:
                staging.stream.wait_stream(compute)
            if wave and following <= staged_waves:
                loaded[following] = enqueue(following)
            if next_layer is not None and wave == max(0, staged_waves + 1 - ahead):
                staging.prefetch(next_layer, bank(staged_waves + 1))

    def admit(self, expert: int) -> None:
        """Enqueue what brings one expert into a slot as a step that needs it would, and computes nothing."""
        assert self.table is not None
        ids = torch.full((1, self.table.top_k), -1, dtype=torch.int32, device=self.table.ids.device)
        ids[:, :1].fill_(expert)
        plan(self.table, ids)
        self._load_slots(self._address, self.table.load_experts, self.table.load_slots, self.table.load_count)

    def reset(self) -> None:
        """Forget residency and counts: what warm-up loaded must leave no trace."""
        if self.table is not None:
            self.table.reset()

    def counts(self) -> dict[str, int]:
        """Counters by name, with ``h2d_bytes`` copied to the device; waits for the device. All zero without a table."""
        counts = dict.fromkeys(COUNTERS, 0) if self.table is None else self.table.counts()
        counts["h2d_bytes"] = counts["copied"] * self.record_bytes
        return counts

    def weight_views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First field of each projection, for vLLM's kernel frame, which reads nothing of them but their being."""
        return self.slot_bank.fields["w13_weight"], self.slot_bank.fields["w2_weight"]
