"""Loading against reading in place, in Triton's interpreter: outputs are compared, a clock that only counts."""

from __future__ import annotations

import inside_gemm
import pytest
import torch
from test_device_expert_cache import CPU, EXPERTS
from test_layer_step import LAYOUT, SHAPE, Backend, count_only

from vllm_hlwq.host_store import HostStore
from vllm_hlwq.marlin_moe import Buffers
from vllm_hlwq.wave_blocks import Alignment
from vllm_hlwq.weight_bank import WeightBank


class AnyTopK(Backend):
    def compute(
        self,
        bank: WeightBank,
        blocks: Alignment,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        weights_on_input: bool,
        buffers: Buffers,
    ) -> None:
        # Each (token, k) as a token of its own would be, so that a smaller top-k than the layer's comes out right too.
        flat = hidden_states.repeat_interleave(topk_weights.shape[1], 0)
        for block in range(int(blocks.padded_rows) // blocks.block_size):
            expert = int(blocks.block_rows[block])
            for row in blocks.sorted_rows[block * blocks.block_size : (block + 1) * blocks.block_size].tolist():
                if row < len(flat):
                    product = flat[row] @ bank.fields["w13_weight"][expert] + bank.fields["w2_weight"][expert]
                    buffers.out_rows[row] = product * topk_weights.flatten()[row]


@pytest.fixture
def ways() -> inside_gemm.Ways:
    store = HostStore(EXPERTS, LAYOUT)
    store.device_address = store.address
    for name in LAYOUT:
        store.field(name).copy_(torch.randn(store.field(name).shape))
    bank, mapped = WeightBank.allocate(EXPERTS, LAYOUT, CPU), WeightBank.resident(store, CPU)
    mapped = WeightBank({name: field.clone() for name, field in mapped.fields.items()})
    return inside_gemm.Ways(SHAPE, AnyTopK(), store, bank, mapped, 16, count_only)


@pytest.mark.parametrize(
    ("case", "calls", "blocks"),
    [
        (inside_gemm.Case(1, 1, 1), 12, 1),
        (inside_gemm.Case(2, 1, 2), 6, 1),
        (inside_gemm.Case(8, 3, 3), 1, 1),
        (inside_gemm.Case(12, 4, 3), 1, 1),
        (inside_gemm.Case(3, 16, 3), 4, 2),
    ],
)
def test_a_row_holds_the_times_of_ways_that_compute_the_same(
    ways: inside_gemm.Ways, case: inside_gemm.Case, calls: int, blocks: int
) -> None:
    row = ways.row(case)
    assert (row["experts"], row["tokens"], row["top_k"]) == (case.experts, case.tokens, case.top_k)
    assert (row["blocks"], row["same_bits"], row["ratio"]) == (blocks, True, 1)
    assert row["gather_us"] == row["inside_us"] == row["resident_us"] == pytest.approx(calls)
    assert row["inside_gb_per_s"] == pytest.approx(case.experts * LAYOUT.record_bytes / (1e3 * calls))


@pytest.mark.parametrize("wrong", ["store", "mapped"])
def test_one_wrong_expert_is_noticed(ways: inside_gemm.Ways, wrong: str) -> None:
    fields = ways.store.field("w13_weight") if wrong == "store" else ways.mapped.fields["w13_weight"]
    fields[int(ways.order[-1])] = 0
    with pytest.raises(AssertionError, match="differs from resident"):
        ways.row(inside_gemm.Case(2, 1, 2))
