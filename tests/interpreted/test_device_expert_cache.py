"""A step that the device decides, in Triton's interpreter: every row is computed from its own expert's weights.

One wave only: further waves are loaded on a CUDA stream of their own, which tests/test_gpu_layer.py covers.
"""

from __future__ import annotations

import pytest
import torch

from vllm_hlwq.device_backend import Buffers
from vllm_hlwq.device_expert_cache import DeviceExpertCache, Staging
from vllm_hlwq.expert_cache import SlotTable
from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.wave_blocks import Alignment
from vllm_hlwq.weight_bank import WeightBank

CPU = torch.device("cpu")
EXPERTS, TOP_K, HIDDEN = 12, 3, 16
BLOCK = 8


class OneMatrix:
    """A backend in plain torch whose experts are one matrix each: ``row @ w13_weight + w2_weight``."""

    name = "one matrix"

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

    def combine(self, out_rows: torch.Tensor, expert_ids: torch.Tensor, output: torch.Tensor) -> None:
        rows = out_rows.view(*expert_ids.shape, -1)
        output.copy_(torch.where((expert_ids >= 0).unsqueeze(-1), rows, 0.0).sum(1))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_cache(num_slots: int) -> DeviceExpertCache:
    layout = RecordLayout({"w13_weight": ((HIDDEN, HIDDEN), torch.float32), "w2_weight": ((HIDDEN,), torch.float32)})
    store = HostStore(EXPERTS, layout)
    store.device_address = store.address  # what the interpreter's kernels read is host memory
    for name in layout:
        store.field(name).copy_(torch.randn(store.field(name).shape))
    bank = WeightBank.allocate(EXPERTS - num_slots, layout, CPU)
    staging = Staging((bank,), (Gather(layout, bank),), stream=None)
    slots = WeightBank.allocate(num_slots, layout, CPU)
    return DeviceExpertCache(store, slots, staging, OneMatrix(), EXPERTS, TOP_K, max_tokens=8)


@pytest.mark.parametrize("num_slots", [3, 6, 11])
def test_rows_are_computed_from_their_own_experts(num_slots: int) -> None:
    torch.manual_seed(num_slots)
    cache = make_cache(num_slots)
    mirror = SlotTable(EXPERTS, num_slots, EXPERTS - num_slots)
    assert not any(cache.counts().values()), "compiling the kernels left a trace"
    for _ in range(25):
        tokens = int(torch.randint(1, num_slots // TOP_K + 1, ()))
        hidden = torch.randn(tokens, HIDDEN)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int()
        padding = torch.rand(tokens) < 0.3
        output = torch.full((tokens, HIDDEN), torch.nan)
        rows = torch.full((tokens * TOP_K, HIDDEN), torch.nan)
        buffers = Buffers(rows.new_empty(0), rows.new_empty(0), rows)
        cache.step(hidden, torch.ones(tokens, TOP_K), ids, output, buffers, False, padding, None)
        mirror.plan_step(torch.where(padding.unsqueeze(1), -1, ids))
        weight, bias = cache.store.field("w13_weight"), cache.store.field("w2_weight")
        for token in range(tokens):
            wanted = [hidden[token] @ weight[e] + bias[e] for e in ids[token].tolist()]
            assert torch.equal(output[token], torch.zeros(HIDDEN) if padding[token] else torch.stack(wanted).sum(0))
    counts = cache.counts()
    assert {name: counts[name] for name in mirror.counts()} == mirror.counts()
    assert counts["h2d_bytes"] == counts["admitted"] * cache.record_bytes > 0
    cache.reset()
    assert not any(cache.counts().values())
