"""The reference backend against formulas written out in float64, and features of layers that few models have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_config, start_worker
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_hlwq.activations import ACTIVATIONS
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.reference_backend import ReferenceBackend
from vllm_hlwq.weight_bank import WeightBank
from vllm_hlwq.worker import install_layers

HIDDEN, WIDTH, EXPERTS = 64, 32, 8


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu2(x: float) -> float:
    return max(x, 0.0) ** 2


POINTWISE: dict[str, Callable[[float], float]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("gated", [True, False])
def test_activations_follow_their_formulas(name: str, gated: bool) -> None:
    x = torch.linspace(-9, 9, 40).view(2, 20)
    output = ACTIVATIONS[name if gated else f"{name}_no_mul"](x)
    for row, values in zip(output.tolist(), x.tolist(), strict=True):
        gates, ups = (values[:10], values[10:]) if gated else (values, [1.0] * 20)
        expected = [POINTWISE[name](gate) * up for gate, up in zip(gates, ups, strict=True)]
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_swigluoai_interleaves_and_clamps() -> None:
    gate, up = 20.0, -20.0
    output = ACTIVATIONS["swigluoai"](torch.tensor([[gate, up, 1.0, 2.0]]))
    clamped = (-7 + 1) * 7 / (1 + math.exp(-1.702 * 7))
    plain = (2 + 1) * 1 / (1 + math.exp(-1.702))
    assert output.tolist()[0] == pytest.approx([clamped, plain], rel=1e-5)


def test_every_name_is_one_of_vllms_and_others_are_refused() -> None:
    assert set(ACTIVATIONS) <= {activation.value for activation in MoEActivation}
    with pytest.raises(ExpertCacheError, match="'situ' is not known to the reference backend"):
        ReferenceBackend("situ", None)


def test_rows_of_other_experts_are_left_alone() -> None:
    torch.manual_seed(0)
    bank = WeightBank(
        {
            "w13_weight": torch.randn(2, 2 * WIDTH, HIDDEN).bfloat16(),
            "w2_weight": torch.randn(2, HIDDEN, WIDTH).bfloat16(),
        }
    )
    hidden = torch.randn(3, HIDDEN).bfloat16()
    ids = torch.tensor([[5, 1], [1, -1], [7, 5]])
    rows = torch.full((6, HIDDEN), torch.nan)
    ReferenceBackend("silu", None).compute(bank, torch.tensor([5]), torch.tensor([1]), hidden, ids, rows)
    assert rows[[1, 2, 3, 4]].isnan().all()
    for row, token in ((0, 0), (5, 2)):
        inner = bank.fields["w13_weight"][1].double() @ hidden[token].double()
        gated = torch.nn.functional.silu(inner[:WIDTH]) * inner[WIDTH:]
        expected = bank.fields["w2_weight"][1].double() @ gated
        torch.testing.assert_close(rows[row].double(), expected, rtol=1e-4, atol=1e-3)


class Layer:
    """One layer made by vLLM's own factory with random BF16 experts, loaded through vLLM's weight loader."""

    def __init__(self, model: Path, cache_size: int, top_k: int, has_bias: bool = False, **options: Any) -> None:
        install_layers()
        self.config = engine_config(model, cache_size)
        start_worker(self.config)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16() / 4

        with set_current_vllm_config(self.config):
            self.runner = FusedMoEFactory(
                num_experts=EXPERTS, top_k=top_k, hidden_size=HIDDEN, intermediate_size=WIDTH, renormalize=False,
                params_dtype=torch.bfloat16, tp_size=1, dp_size=1, prefix="layer.experts", has_bias=has_bias, **options,
            )  # fmt: skip
            self.gate, self.up = random(EXPERTS, WIDTH, HIDDEN), random(EXPERTS, WIDTH, HIDDEN)
            self.down = random(EXPERTS, HIDDEN, WIDTH)
            layer = self.runner.routed_experts
            for expert in range(EXPERTS):
                layer.weight_loader(layer.w13_weight, self.gate[expert], "w13_weight", "w1", expert)
                layer.weight_loader(layer.w13_weight, self.up[expert], "w13_weight", "w3", expert)
                layer.weight_loader(layer.w2_weight, self.down[expert], "w2_weight", "w2", expert)
            if has_bias:
                self.inner_bias, self.outer_bias = random(EXPERTS, 2 * WIDTH), random(EXPERTS, HIDDEN)
                for expert in range(EXPERTS):
                    gate, up = self.inner_bias[expert].chunk(2)
                    layer.weight_loader(layer.w13_bias, gate, "w13_bias", "w1", expert)
                    layer.weight_loader(layer.w13_bias, up, "w13_bias", "w3", expert)
                    layer.weight_loader(layer.w2_bias, self.outer_bias[expert], "w2_bias", "w2", expert)
            layer.quant_method.process_weights_after_loading(layer)

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        with (
            torch.inference_mode(),
            set_current_vllm_config(self.config),
            set_forward_context(None, self.config, num_tokens=len(hidden)),
        ):
            return self.runner(hidden.clone(), logits)

    def expert(self, expert: int, x: torch.Tensor, has_bias: bool = False) -> torch.Tensor:
        x = x.double()
        inner_bias = self.inner_bias[expert].double() if has_bias else torch.zeros(2 * WIDTH, dtype=torch.float64)
        outer_bias = self.outer_bias[expert].double() if has_bias else torch.zeros(HIDDEN, dtype=torch.float64)
        gate = self.gate[expert].double() @ x + inner_bias[:WIDTH]
        up = self.up[expert].double() @ x + inner_bias[WIDTH:]
        return self.down[expert].double() @ (torch.nn.functional.silu(gate) * up) + outer_bias


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), torch.randn(
        tokens, EXPERTS, generator=generator
    )


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output.double(), expected, rtol=2**-7, atol=2**-8 * expected.abs().max().item())


@pytest.mark.parametrize("cache_size", [1, 3, EXPERTS])
def test_expert_biases(qwen3_moe_bf16: Path, cache_size: int) -> None:
    layer = Layer(qwen3_moe_bf16, cache_size, top_k=3, has_bias=True)
    hidden, logits = inputs(6)
    top = logits.softmax(-1).topk(3)
    expected = torch.stack(
        [
            sum(
                w * layer.expert(int(e), hidden[t], True)
                for w, e in zip(top.values[t].double(), top.indices[t], strict=True)
            )
            for t in range(6)
        ]
    )
    close(layer(hidden, logits), expected)


@pytest.mark.parametrize("cache_size", [2, EXPERTS])
def test_router_weight_on_input(qwen3_moe_bf16: Path, cache_size: int) -> None:
    layer = Layer(qwen3_moe_bf16, cache_size, top_k=1, apply_router_weight_on_input=True)
    hidden, logits = inputs(6)
    top = logits.softmax(-1).max(-1)
    scaled = hidden * top.values[:, None].bfloat16()
    expected = torch.stack([layer.expert(int(e), x) for e, x in zip(top.indices, scaled, strict=True)])
    close(layer(hidden, logits), expected)


@pytest.mark.parametrize("cache_size", [2, EXPERTS])
def test_shared_experts_and_routed_scaling(qwen3_moe_bf16: Path, cache_size: int) -> None:
    shared = torch.nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.bfloat16)
    layer = Layer(
        qwen3_moe_bf16, cache_size, top_k=2, shared_experts=shared, routed_scaling_factor=2.5,
        apply_routed_scale_to_output=True,
    )  # fmt: skip
    hidden, logits = inputs(6)
    top = logits.softmax(-1).topk(2)
    routed = torch.stack(
        [
            sum(
                w * layer.expert(int(e), hidden[t]) for w, e in zip(top.values[t].double(), top.indices[t], strict=True)
            )
            for t in range(6)
        ]
    )
    with torch.inference_mode():
        expected = 2.5 * routed + shared(hidden).double()
    close(layer(hidden, logits), expected)
