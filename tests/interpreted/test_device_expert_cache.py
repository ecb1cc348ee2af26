"""A step that the device decides, in Triton's interpreter: every row is computed from its own expert's weights.

Streams are torch's stand-ins here and do everything in the order of the calls, so that a load into a bank before its
reader is done, or a load that is missing, shows in the values; what only a real stream could break,
tests/test_gpu_layer.py covers.
"""

from __future__ import annotations

import pytest
import torch

from vllm_hlwq.device_backend import Buffers
from vllm_hlwq.device_expert_cache import DeviceExpertCache
from vllm_hlwq.expert_cache import SlotTable
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.slot_audit import audit
from vllm_hlwq.staging import Staging
from vllm_hlwq.warm_start import seed
from vllm_hlwq.wave_blocks import Alignment
from vllm_hlwq.weight_bank import WeightBank

CPU = torch.device("cpu")
EXPERTS, TOP_K, HIDDEN = 12, 3, 16
BLOCK = 8


class OneMatrix:
    """A backend in plain torch whose experts are one matrix each: ``row @ w13_weight + w2_weight``."""

    name = "one matrix"

    def block_size(self, tokens: int, top_k: int, num_experts: int) -> int:
        return BLOCK

    def align(self, expert_ids: torch.Tensor, num_experts: int) -> Alignment:
        flat = expert_ids.reshape(-1).tolist()
        places, blocks = [], []
        for expert in range(num_experts):
            rows = [row for row, named in enumerate(flat) if named == expert]
            rows += [len(flat)] * (-len(rows) % BLOCK)
            places += rows
            blocks += [expert] * (len(rows) // BLOCK)
        unused = 5
        places += [len(flat)] * (BLOCK * unused)
        padded = BLOCK * len(blocks)
        return Alignment(int32(places), int32(blocks + [-1] * unused), int32([padded]), BLOCK)

    def compute(
        self,
        bank: WeightBank,
        blocks: Alignment,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        weights_on_input: bool,
        buffers: Buffers,
    ) -> None:
        for block in range(blocks.padded_rows.item() // blocks.block_size):
            block_row = int(blocks.block_rows[block])
            weight, bias = bank.fields["w13_weight"][block_row], bank.fields["w2_weight"][block_row]
            for row in blocks.sorted_rows[block * BLOCK : (block + 1) * BLOCK].tolist():
                if row < topk_weights.numel():
                    buffers.out_rows[row] = hidden_states[row // TOP_K] @ weight + bias

    def combine(
        self, out_rows: torch.Tensor, expert_ids: torch.Tensor, output: torch.Tensor, all_written: bool = False
    ) -> None:
        rows = out_rows.view(*expert_ids.shape, -1)
        # Rows that nobody has written are NaN, so a wrong all_written shows in the sum.
        written = torch.ones_like(expert_ids, dtype=torch.bool) if all_written else expert_ids >= 0
        output.copy_(torch.where(written.unsqueeze(-1), rows, 0.0).sum(1))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


LAYOUT = RecordLayout({"w13_weight": ((HIDDEN, HIDDEN), torch.float32), "w2_weight": ((HIDDEN,), torch.float32)})


def make_cache(num_slots: int, staging: Staging | None = None, global_experts: int | None = None) -> DeviceExpertCache:
    slots = WeightBank.allocate(num_slots, LAYOUT, CPU)
    if num_slots == EXPERTS:
        for field in slots.fields.values():
            field.copy_(torch.randn(field.shape))
        return DeviceExpertCache(None, slots, None, OneMatrix(), EXPERTS, TOP_K, max_tokens=64)
    store = HostStore(EXPERTS, LAYOUT)
    store.device_address = store.address  # what the interpreter's kernels read is host memory
    for name in LAYOUT:
        store.field(name).copy_(torch.randn(store.field(name).shape))
    staging = staging or Staging.allocate(EXPERTS - num_slots, 2, LAYOUT, CPU)
    return DeviceExpertCache(store, slots, staging, OneMatrix(), EXPERTS, TOP_K, 64, global_experts)


def run_and_check(
    cache: DeviceExpertCache,
    ids: torch.Tensor,
    padding: torch.Tensor | None = None,
    forward: object | None = None,
    expert_map: torch.Tensor | None = None,
    unreadable: torch.Tensor | None = None,
) -> None:
    """Run a step on random rows and compare every row with its experts' own weights, those of this rank.

    ``unreadable`` are experts whose bytes in host memory are others while the step runs.
    """
    fields = cache.slot_bank.fields if cache.store is None else {name: cache.store.field(name) for name in LAYOUT}
    weight, bias = (fields[name].clone() for name in LAYOUT)
    if unreadable is not None:
        for field in fields.values():
            field[unreadable] = torch.nan
    tokens = len(ids)
    hidden = torch.randn(tokens, HIDDEN)
    output = torch.full((tokens, HIDDEN), torch.nan)
    rows = torch.full((tokens * TOP_K, HIDDEN), torch.nan)
    buffers = Buffers(rows.new_empty(0), rows.new_empty(0), rows)
    cache.step(hidden, torch.ones(tokens, TOP_K), ids, output, buffers, False, padding, expert_map, forward)
    if unreadable is not None:
        fields["w13_weight"].copy_(weight)
        fields["w2_weight"].copy_(bias)
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)])
    for token in range(tokens):
        parts = [hidden[token] @ weight[e] + bias[e] if e >= 0 else torch.zeros(HIDDEN) for e in ids[token].tolist()]
        # With all experts resident a row that pads is computed like any other; nobody reads it.
        is_padding = cache.table is not None and padding is not None and padding[token]
        assert torch.equal(output[token], torch.zeros(HIDDEN) if is_padding else torch.stack(parts).sum(0))


def distinct_ids(tokens: int, experts: int = EXPERTS) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)]).int()


@pytest.mark.parametrize("given", [[], [7], [7, 2, 5, 0], [7, 2, 5, 0, 11, 1, 3]])
def test_a_warm_start_leaves_what_serving_would(given: list[int]) -> None:
    torch.manual_seed(0)
    slots = 5
    cache, mirror = make_cache(slots), SlotTable(EXPERTS, slots, EXPERTS - slots)
    assert seed(cache, given) == min(slots, len(given))
    for expert in reversed(given[:slots]):
        mirror.plan_step(torch.tensor([expert]))
    assert not any(cache.counts().values())
    mirror.counters.zero_()
    for step in range(6):
        held = [expert for expert in cache.table.expert_of_slot.tolist() if expert >= 0]
        assert step or held == given[:slots][::-1]
        for name in ("expert_of_slot", "slot_of_expert", "stamp_of_slot", "clock", "counters"):
            assert torch.equal(getattr(cache.table, name), getattr(mirror, name)), name
        by_age = torch.argsort(mirror.stamp_of_slot, stable=True)
        assert torch.equal(cache.table.slot_by_age.long(), by_age)
        for slot, expert in enumerate(cache.table.expert_of_slot.tolist()):
            for name, field in cache.slot_bank.fields.items():
                assert expert < 0 or torch.equal(field[slot], cache.store.field(name)[expert])
        ids = distinct_ids(1)
        run_and_check(cache, ids)
        mirror.plan_step(ids)


@pytest.mark.parametrize("num_slots", [3, 6, 11])
def test_rows_are_computed_from_their_own_experts(num_slots: int) -> None:
    torch.manual_seed(num_slots)
    cache = make_cache(num_slots)
    mirror = SlotTable(EXPERTS, num_slots, EXPERTS - num_slots)
    assert not any(cache.counts().values()), "compiling the kernels left a trace"
    for _ in range(25):
        tokens = int(torch.randint(1, num_slots // TOP_K + 1, ()))
        ids, padding = distinct_ids(tokens), torch.rand(tokens) < 0.3
        run_and_check(cache, ids, padding)
        mirror.plan_step(torch.where(padding.unsqueeze(1), -1, ids))
    counts = cache.counts()
    assert {name: counts[name] for name in mirror.counts()} == mirror.counts()
    assert counts["h2d_bytes"] == counts["copied"] * cache.record_bytes > 0
    cache.reset()
    assert not any(cache.counts().values())


@pytest.mark.parametrize("num_slots", [3, EXPERTS])
def test_a_rank_computes_its_own_experts_and_no_others(num_slots: int) -> None:
    """Every second expert of twice as many is of this rank, the first among them; ids below zero name none."""
    torch.manual_seed(num_slots)
    cache = make_cache(num_slots, global_experts=2 * EXPERTS)
    expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    expert_map[::2] = torch.arange(EXPERTS, dtype=torch.int32)
    recorded: list[torch.Tensor] = []
    cache.record = lambda ids: recorded.append(ids.clone())
    for tokens in (1, 5, 20, 40):
        ids, padding = distinct_ids(tokens, 2 * EXPERTS), torch.rand(tokens) < 0.3
        ids[0, 1] = -1
        run_and_check(cache, ids, padding, Forward(), expert_map)
        local = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)])
        assert torch.equal(recorded.pop(), torch.where(padding.unsqueeze(1), -1, local))


def test_layers_prefetch_from_four_mentions_of_an_expert_of_all_ranks_on() -> None:
    staging = Staging.allocate(9, 2, LAYOUT, CPU)
    alone = make_cache(3, staging)
    of_two_ranks = make_cache(3, staging, global_experts=2 * EXPERTS)
    assert [alone._overlaps(pairs) for pairs in (47, 48)] == [False, True]
    assert [of_two_ranks._overlaps(pairs) for pairs in (48, 95, 96)] == [False, False, True]


@pytest.mark.parametrize(
    ("num_slots", "staging_rows", "banks"), [(1, 11, 2), (3, 9, 2), (3, 2, 2), (2, 1, 2), (5, 3, 1)]
)
def test_waves_and_prefetched_experts_are_computed_from_their_own_weights(
    num_slots: int, staging_rows: int, banks: int
) -> None:
    torch.manual_seed(staging_rows)
    staging = Staging.allocate(staging_rows, banks, LAYOUT, CPU)
    layers = [make_cache(num_slots, staging) for _ in range(3)]
    tables = [SlotTable(EXPERTS, num_slots, staging_rows) for _ in layers]
    # Prompts, whose layers prefetch for each other, with decoding between them.
    for number, tokens in enumerate((1, 20, 7, 30, 2, 40, 3)):
        forward = Forward()
        for layer, (cache, mirror) in enumerate(zip(layers, tables, strict=True)):
            # The first pass shows the order of the layers.
            ahead = number > 0 and layer > 0 and tokens * TOP_K >= 4 * EXPERTS
            # Expert 0 is never needed, though it is prefetched.
            ids = distinct_ids(tokens, EXPERTS - 1) + 1
            mirror.plan_step(ids, len(mirror.prefetch()) if ahead else 0)
            run_and_check(cache, ids, forward=forward)
            assert {name: cache.counts()[name] for name in mirror.counts()} == mirror.counts()
    for counts in (layer.counts() for layer in layers[1:]):
        assert counts["copied"] > counts["admitted"] + counts["staged"]
        assert counts["h2d_bytes"] == counts["copied"] * LAYOUT.record_bytes


def test_what_was_prefetched_for_another_pass_is_not_used() -> None:
    torch.manual_seed(0)
    staging = Staging.allocate(9, 2, LAYOUT, CPU)
    first, second = (make_cache(3, staging) for _ in range(2))
    ids = distinct_ids(20)
    for _ in range(2):
        forward = Forward()
        run_and_check(first, ids, forward=forward)
        run_and_check(second, ids, forward=forward)
    run_and_check(first, ids, forward=Forward())  # this pass ends after the first layer
    run_and_check(first, ids, forward=Forward())
    run_and_check(second, ids, forward=Forward())
    run_and_check(second, ids)


def test_what_was_prefetched_is_not_copied_again() -> None:
    torch.manual_seed(0)
    staging = Staging.allocate(9, 2, LAYOUT, CPU)
    first, second = (make_cache(3, staging) for _ in range(2))
    ids = distinct_ids(40)
    for _ in range(2):
        forward = Forward()
        run_and_check(first, ids, forward=forward)
        run_and_check(second, ids, forward=forward)
    forward = Forward()
    run_and_check(first, ids, forward=forward)
    assert second.table is not None
    prefetched = second.table.prefetch_experts[: second.table.prefetch_count].long()
    assert len(prefetched) == 9
    run_and_check(second, ids, forward=forward, unreadable=prefetched)


def test_an_only_layer_follows_no_other() -> None:
    torch.manual_seed(0)
    staging = Staging.allocate(9, 2, LAYOUT, CPU)
    only, forward = make_cache(3, staging), Forward()
    for _ in range(3):
        run_and_check(only, distinct_ids(20), forward=forward)
    assert staging.successor(only) is None
    counts = only.counts()
    assert counts["copied"] == counts["admitted"] + counts["staged"] > 0


def test_a_step_that_breaks_off_leaves_no_expert_named_without_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(6)
    run_and_check(cache, torch.tensor([[0, 1, 2], [3, 4, 5]]).int())

    def no_memory(*_: object) -> int:
        raise torch.cuda.OutOfMemoryError("between the plan and its loads")

    ids = torch.tensor([[6, 7, 8], [9, 10, 11]]).int()
    with monkeypatch.context() as broken:
        broken.setattr(OneMatrix, "block_size", no_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run_and_check(cache, ids)
    assert audit(cache) == []
    before = cache.counts()
    run_and_check(cache, ids)
    assert audit(cache) == []
    assert cache.counts()["hits"] == before["hits"] == 0
    run_and_check(cache, ids)
    assert cache.counts()["hits"] == 6


def test_the_first_layer_of_a_model_follows_no_other() -> None:
    """Two passes may share an object, as warm-up's might; nothing is on its way when the second of them ends."""
    torch.manual_seed(0)
    staging = Staging.allocate(9, 2, LAYOUT, CPU)
    first, second = (make_cache(3, staging) for _ in range(2))
    forward = Forward()
    for _ in range(3):
        run_and_check(first, distinct_ids(20), forward=forward)
        run_and_check(second, distinct_ids(20), forward=forward)
    assert staging.successor(first) is second
    assert staging.successor(second) is None


class Forward:
    """Stands for vLLM's forward context, of which the cache uses the identity."""
