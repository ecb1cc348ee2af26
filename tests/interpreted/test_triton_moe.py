"""vLLM's own Triton kernel over banks and waves, in Triton's interpreter, against plain products expert by expert.

In float16: the interpreter multiplies bfloat16 matrices as the integers that hold them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.backends
from moe_operators import align, moe_sum
from torch.nn import functional

from vllm_hlwq.expert_formats import SIXTEEN_BIT
from vllm_hlwq.triton_moe import TritonBackend
from vllm_hlwq.wave_blocks import blocks_of_waves
from vllm_hlwq.weight_bank import WeightBank

# vLLM's CPU build turns its Triton kernels off unless Triton has a CPU backend; the interpreter needs none. To be said
# before vLLM is imported.
triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=None))

EXPERTS, TOP_K, HIDDEN, WIDTH = 12, 3, 48, 40


def make_backend(activation: str) -> TritonBackend:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    config = FusedMoEConfig(
        num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=WIDTH,
        num_local_experts=EXPERTS, num_logical_experts=EXPERTS, activation=MoEActivation(activation),
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), in_dtype=torch.float16,
    )  # fmt: skip
    backend = TritonBackend(SIXTEEN_BIT, config)
    backend._align, backend._sum = align, moe_sum
    return backend


def weights(bias: bool) -> dict[str, torch.Tensor]:
    fields = {
        "w13_weight": 0.3 * torch.randn(EXPERTS, 2 * WIDTH, HIDDEN),
        "w2_weight": 0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH),
    }
    if bias:
        fields |= {"w13_bias": torch.randn(EXPERTS, 2 * WIDTH), "w2_bias": torch.randn(EXPERTS, HIDDEN)}
    return {name: tensor.half() for name, tensor in fields.items()}


def run(
    backend: TritonBackend, banks: list[WeightBank], wave_rows: torch.Tensor, step: dict[str, Any], on_input: bool
) -> torch.Tensor:
    rows = step["ids"].numel()
    shapes = backend.workspace_shapes(len(step["ids"]), HIDDEN, TOP_K)
    workspaces = [torch.full(shape, torch.nan, dtype=torch.float16) for shape in shapes]
    buffers = backend.buffers(*workspaces, rows)
    waves = blocks_of_waves(backend.align(step["ids"], EXPERTS), wave_rows)
    for bank, blocks in zip(banks, waves, strict=True):
        backend.compute(bank, blocks, step["hidden"], step["weights"], on_input, buffers)
    output = torch.full_like(step["hidden"], torch.nan)
    backend.combine(buffers.out_rows, step["ids"], output)
    return output


def plain(fields: dict[str, torch.Tensor], gate: Any, step: dict[str, Any], on_input: bool) -> torch.Tensor:
    total = torch.zeros(step["hidden"].shape)
    wide = {name: tensor.float() for name, tensor in fields.items()}
    for token, experts in enumerate(step["ids"].tolist()):
        for k, expert in enumerate(experts):
            if expert < 0:
                continue
            x = step["hidden"][token].float() @ wide["w13_weight"][expert].t()
            x = (x + wide["w13_bias"][expert] if "w13_bias" in wide else x).half().float()
            x = (gate(x[:WIDTH]) * x[WIDTH:]).half().float() @ wide["w2_weight"][expert].t()
            x = x + wide["w2_bias"][expert] if "w2_bias" in wide else x
            total[token] += x if on_input else x * step["weights"][token, k]
    return total


@pytest.mark.parametrize("tokens", [1, 9, 600])
@pytest.mark.parametrize(
    ("activation", "gate"),
    [("silu", functional.silu), ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh"))],
)
def test_every_row_has_its_experts_product_in_whichever_wave(tokens: int, activation: str, gate: Any) -> None:
    torch.manual_seed(tokens)
    backend = make_backend(activation)
    on_input, bias = activation == "gelu_tanh", tokens == 9
    fields = weights(bias)
    step = {
        "hidden": torch.randn(tokens, HIDDEN).half(),
        "weights": torch.rand(tokens, TOP_K),
        "ids": torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int(),
    }
    step["ids"][torch.rand(tokens, TOP_K) < 0.1] = -1
    resident = run(backend, [WeightBank(fields)], torch.arange(EXPERTS, dtype=torch.int32)[None], step, on_input)
    wanted = plain(fields, gate, step, on_input)
    # Two roundings to float16 of values up to the largest.
    torch.testing.assert_close(resident.float(), wanted, rtol=2**-9, atol=2**-9 * wanted.abs().max().item())

    places = torch.randperm(EXPERTS)
    cuts = ((0, 5), (5, 6), (6, EXPERTS))
    wave_rows = torch.full((len(cuts), EXPERTS), -1, dtype=torch.int32)
    banks = []
    for wave, (start, end) in enumerate(cuts):
        chosen = places[start:end]
        wave_rows[wave, chosen] = torch.arange(len(chosen), dtype=torch.int32)
        banks.append(WeightBank({name: tensor[chosen] for name, tensor in fields.items()}))
    assert torch.equal(run(backend, banks, wave_rows, step, on_input), resident)


def test_blocks_are_those_of_vllms_settings_for_the_whole_layer() -> None:
    backend = make_backend("silu")
    sizes = [backend.align(torch.zeros(tokens, TOP_K).int(), EXPERTS).block_size for tokens in (1, 40, 200, 600)]
    assert sizes == [16, 32, 64, 128]
