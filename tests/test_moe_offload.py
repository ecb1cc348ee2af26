"""The layer inside stock vLLM: the same bits at every cache size, and the values of the transformers model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K, write_glm4_moe_with_mtp
from engines import LoadedModel
from transformers import AutoModelForCausalLM

from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.int4_source import Int4Source
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.host_store import HostStore, RecordLayout

FORMATS = {
    "bf16": None,
    "int4-g32": {"group_size": 32, "symmetric": True},
    "int4-g64": {"group_size": 64, "symmetric": True},
    "int4-g64-asymmetric": {"group_size": 64, "symmetric": False},
    "int4-g128": {"group_size": 128, "symmetric": True},
    "int4-channel": {"group_size": None, "symmetric": True},
    "int4-hlwq": {},  # by way of 5 bits, as the shipped model is made
}
COMBINATIONS = [
    (model, weights)
    for model in ("gemma4", "qwen3_moe")
    for weights in FORMATS
    # Gemma-4's expert width of 192 is no multiple of 128; one model by way of HLWQ will do.
    if (model, weights) not in (("gemma4", "int4-g128"), ("gemma4", "int4-hlwq"))
]
CACHE_SIZES = (1, TOP_K - 1, TOP_K, TOP_K + 1, NUM_EXPERTS // 2, NUM_EXPERTS)


@pytest.fixture(scope="session", params=COMBINATIONS, ids="-".join)
def model_and_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    model, weights = request.param
    source: Path = request.getfixturevalue(f"{model}_bf16")
    export = FORMATS[weights]
    if export is None:
        return model, source
    out = tmp_path_factory.mktemp(f"{model}-{weights}")
    if weights == "int4-hlwq":
        coded = tmp_path_factory.mktemp("hlwq")
        quantize(source, coded)
        export_int4(open_source(coded), out)
    else:
        export_int4(source, out, **export)
    return model, out


@cache
def steps() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states and router logits of a prefill, decode steps of one and of five tokens, and another prefill."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(tokens, 128, generator=generator).bfloat16(),
            2 * torch.randn(tokens, NUM_EXPERTS, generator=generator),
        )
        for tokens in (300, 1, 1, 1, 5, 1, 5, 1, 40, 1)
    ]


def run_all(loaded: LoadedModel) -> list[torch.Tensor]:
    return [loaded.run(layer, *step) for layer in range(len(loaded.runners)) for step in steps()]


def test_outputs_are_bit_identical_for_every_cache_size(model_and_checkpoint: tuple[str, Path]) -> None:
    _, checkpoint = model_and_checkpoint
    expected = run_all(LoadedModel(checkpoint, NUM_EXPERTS))
    assert all(output.isfinite().all() and output.any() for output in expected)
    for cache_size in CACHE_SIZES:
        outputs = run_all(LoadedModel(checkpoint, cache_size))
        for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
            assert torch.equal(output, wanted), f"cache size {cache_size}, call {number}"


@pytest.mark.parametrize("staging_size", [1, 3, NUM_EXPERTS])
def test_outputs_are_bit_identical_for_every_staging_size(qwen3_moe_bf16: Path, staging_size: int) -> None:
    cached = LoadedModel(qwen3_moe_bf16, TOP_K - 1, staging_size=staging_size)
    cache = cached.runners[0].routed_experts.expert_cache
    assert cache.staging_bank.rows == min(staging_size, NUM_EXPERTS - TOP_K + 1)
    expected = run_all(LoadedModel(qwen3_moe_bf16, NUM_EXPERTS))
    assert all(torch.equal(output, wanted) for output, wanted in zip(run_all(cached), expected, strict=True))


def test_outputs_equal_the_transformers_model(model_and_checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    model, source = model_and_checkpoint
    checkpoint = source
    if "int4" in checkpoint.name:
        source = tmp_path / "16-bit"
        dequantize(Int4Source(checkpoint), source)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = LoadedModel(checkpoint, TOP_K - 1)
    for layer, block in enumerate(reference.model.layers):
        for hidden_states, logits in steps():
            weights = logits.softmax(-1)
            top = weights.topk(TOP_K)
            chosen = top.values / top.values.sum(-1, keepdim=True)
            experts = block.experts if model == "gemma4" else block.mlp.experts
            if model == "gemma4":
                chosen = chosen * block.router.per_expert_scale[top.indices]
            with torch.no_grad():
                expected = experts(hidden_states.float(), top.indices, chosen)
            output = loaded.run(layer, hidden_states, logits).float()
            # Ours is float32 up to one rounding to BF16 at the end.
            torch.testing.assert_close(output, expected, rtol=2**-8, atol=2**-8 * expected.abs().max().item() / 4)


def test_counters_follow_the_step_and_reset(qwen3_moe_bf16: Path) -> None:
    loaded = LoadedModel(qwen3_moe_bf16, 4)
    hidden = torch.ones(1, 128, dtype=torch.bfloat16)
    favourites = torch.zeros(1, NUM_EXPERTS)
    favourites[0, [2, 3, 5, 7]] = 9.0
    for _ in range(3):
        loaded.run(1, hidden, favourites)
    favourites[0, 11] = 8.0
    favourites[0, 2] = 0.0
    loaded.run(1, hidden, favourites)
    counters = loaded.worker.expert_cache_counters()
    record = 3 * 128 * 128 * 2
    assert list(counters.values())[1] == {
        "steps": 4, "queries": 16, "hits": 11, "admitted": 5, "evictions": 1, "staged": 0, "waves": 4,
        "copied": 5,
        "h2d_bytes": 5 * record,
    }  # fmt: skip
    assert set(next(iter(counters.values())).values()) == {0}
    loaded.worker.compile_or_warm_up_model()
    assert set(list(loaded.worker.expert_cache_counters().values())[1].values()) == {0}


def test_all_layers_share_one_staging_bank_and_hold_no_parameter(qwen3_moe_bf16: Path) -> None:
    loaded = LoadedModel(qwen3_moe_bf16, 4)
    layers = [runner.routed_experts for runner in loaded.runners]
    assert len({id(layer.expert_cache.staging_bank) for layer in layers}) == 1
    assert [list(layer.named_parameters()) for layer in layers] == [[], []]


def test_a_layer_of_another_shape_has_a_staging_bank_of_its_own(qwen3_moe_bf16: Path) -> None:
    layer = LoadedModel(qwen3_moe_bf16, 4).runners[1].routed_experts
    layout, shared = layer.expert_cache.store.layout, layer.expert_cache.staging_bank
    assert layer._staging_bank(HostStore(NUM_EXPERTS, layout), torch.device("cpu")) is shared
    turned = RecordLayout({name: ((*field.shape[::-1], 1), field.dtype) for name, field in layout.items()})
    bank = layer._staging_bank(HostStore(NUM_EXPERTS, turned), torch.device("cpu"))
    assert bank is not shared
    assert {name: tensor.shape[1:] for name, tensor in bank.fields.items()} == {
        name: field.shape for name, field in turned.items()
    }


def test_with_every_expert_resident_nothing_is_planned(qwen3_moe_bf16: Path) -> None:
    loaded = LoadedModel(qwen3_moe_bf16, NUM_EXPERTS)
    run_all(loaded)
    for runner in loaded.runners:
        cache = runner.routed_experts.expert_cache
        assert cache.table is None
        assert set(cache.counts().values()) == {0}


def test_padding_ids_are_no_expert(qwen3_moe_bf16: Path) -> None:
    cache = LoadedModel(qwen3_moe_bf16, 2).runners[0].routed_experts.expert_cache
    hidden = torch.randn(3, 128).bfloat16()
    weights = torch.full((3, 2), 0.5)
    ids = torch.tensor([[4, 9], [-1, -1], [-1, 4]])
    output = torch.full((3, 128), torch.nan, dtype=torch.bfloat16)
    cache.step(hidden, weights, ids, output)
    assert not output[1].any()
    assert output[0].any()
    assert cache.counts()["queries"] == 2
    alone = torch.empty(1, 128, dtype=torch.bfloat16)
    cache.step(hidden[2:], weights[2:, 1:], ids[2:, 1:], alone)
    torch.testing.assert_close(output[2:], alone)


def test_made_up_weights_are_served_like_a_checkpoint_s(qwen3_moe_bf16: Path) -> None:
    expected = run_all(LoadedModel(qwen3_moe_bf16, NUM_EXPERTS, load_format="dummy"))
    assert all(output.isfinite().all() and output.any() for output in expected)
    outputs = run_all(LoadedModel(qwen3_moe_bf16, 2, load_format="dummy"))
    assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected, strict=True))


def test_a_correction_of_the_routers_choice_is_no_experts_weight(tmp_path: Path) -> None:
    model = write_glm4_moe_with_mtp(tmp_path)
    cached, stock = LoadedModel(model, 4), LoadedModel(model, 0)
    bias = cached.runners[0].routed_experts.e_score_correction_bias
    assert torch.equal(bias, torch.linspace(0, 0.2, NUM_EXPERTS))
    for step in steps():
        torch.testing.assert_close(cached.run(0, *step), stock.run(0, *step), rtol=0.02, atol=0.02)
