"""gpt-oss, which brings its own layer: 16-bit on the reference backend, MXFP4 up to Marlin's layout; on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import format_files
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from commands import succeeds
from engines import LoadedModel
from format_files import State
from int4_format import decoded
from marlin_operators import FP4_VALUES, OnlyLoads, assert_chunks_convert_as_the_layer, marlin_on_cpu
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.errors import ExpertCacheError

EXPERTS = "model.layers.{}.mlp.experts."


@pytest.fixture(scope="session")
def mxfp4(gpt_oss_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return format_files.gpt_oss_mxfp4(gpt_oss_bf16, tmp_path_factory.mktemp("gpt-oss-mxfp4"))


def step(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 128, generator=generator).bfloat16()
    return hidden, 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator)


def routed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids ``[T, k]``: softmax over the chosen."""
    top = logits.topk(TOP_K)
    return top.values.softmax(-1), top.indices


@pytest.mark.parametrize("cache_size", [1, TOP_K, NUM_EXPERTS])
def test_16_bit_outputs_equal_the_transformers_model(gpt_oss_bf16: Path, cache_size: int) -> None:
    reference = AutoModelForCausalLM.from_pretrained(gpt_oss_bf16, dtype=torch.float32)
    loaded = LoadedModel(gpt_oss_bf16, cache_size)
    for layer, block in enumerate(reference.model.layers):
        hidden, logits = step(40, layer)
        weights, ids = routed(logits)
        with torch.no_grad():
            expected = block.mlp.experts(hidden.float(), ids, weights)
        output = loaded.run(layer, hidden, logits).float()
        torch.testing.assert_close(output, expected, rtol=2**-8, atol=2**-10 * expected.abs().max().item())


def fp4_matrix(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """An expert's matrix ``[out, in]`` by the format's definition: low half of a byte first."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = FP4_VALUES[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values * torch.exp2(exponents.float() - 127).unsqueeze(-1)).flatten(1)


def test_mxfp4_stacks_lie_in_padded_places(mxfp4: Path, use_backend: Callable[..., None]) -> None:
    use_backend(lambda *_: OnlyLoads())
    loaded = LoadedModel(mxfp4, TOP_K)
    state = load_file(mxfp4 / "model.safetensors")
    for layer, runner in enumerate(loaded.runners):
        store = runner.routed_experts.expert_cache.store
        # 128 features and an expert width of 64, rounded up to what Marlin takes.
        assert store.layout["w13_weight"].shape == (2 * 128, 256 // 2)
        for projection, name in (("w13", "gate_up_proj"), ("w2", "down_proj")):
            stem = EXPERTS.format(layer) + name
            for field, stored in (
                (f"{projection}_weight", state[f"{stem}_blocks"].flatten(2)),
                (f"{projection}_weight_scale", state[f"{stem}_scales"]),
                (f"{projection}_bias", state[f"{stem}_bias"]),
            ):
                place = store.field(field).clone()
                inside = tuple(slice(0, size) for size in stored.shape)
                assert torch.equal(place[inside], stored), field
                place[inside] = 0
                assert not place.any(), f"{field}: padding is not zero"


def test_mxfp4_outputs_are_the_files(mxfp4: Path, use_backend: Callable[..., None]) -> None:
    use_backend(marlin_on_cpu)
    loaded = LoadedModel(mxfp4, NUM_EXPERTS)
    state = load_file(mxfp4 / "model.safetensors")

    def matrix(layer: int, expert: int, name: str) -> torch.Tensor:
        stem = EXPERTS.format(layer) + name
        return fp4_matrix(state[f"{stem}_blocks"][expert], state[f"{stem}_scales"][expert])

    for layer in range(2):
        hidden, logits = step(3, layer)
        wanted = plain(state, layer, hidden, logits, matrix)
        output = loaded.run(layer, hidden, logits).float()
        assert output.shape == hidden.shape
        # Roundings to BF16 of what lies between the products, and of the rows before the sum.
        torch.testing.assert_close(output, wanted, rtol=2**-6, atol=2**-6 * wanted.abs().max().item())


def plain(
    state: State,
    layer: int,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    matrix: Callable[[int, int, str], torch.Tensor],
) -> torch.Tensor:
    """A layer's output in float32, by weights ``[out, in]`` of a layer's expert and the biases of a file."""

    def project(expert: int, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ matrix(layer, expert, name).t() + state[f"{EXPERTS.format(layer)}{name}_bias"][expert].float()

    output = torch.zeros(hidden.shape)
    weights, ids = routed(logits)
    for token, experts in enumerate(ids.tolist()):
        for k, expert in enumerate(experts):
            inner = project(expert, "gate_up_proj", hidden[token].float())
            gate, up = inner[0::2].clamp(max=7.0), inner[1::2].clamp(-7.0, 7.0)
            output[token] += weights[token, k] * project(
                expert, "down_proj", (up + 1) * gate * torch.sigmoid(1.702 * gate)
            )
    return output


def test_int4_outputs_are_the_files(gpt_oss_bf16: Path, tmp_path: Path) -> None:
    export_int4(gpt_oss_bf16, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    loaded = LoadedModel(tmp_path, TOP_K - 1)

    def matrix(layer: int, expert: int, name: str) -> torch.Tensor:
        part = {"gate_up_proj": "w13", "down_proj": "w2"}[name]
        return decoded(state, f"{EXPERTS.format(layer)}{expert}.{part}_").bfloat16().float()

    biases = load_file(gpt_oss_bf16 / "model.safetensors")
    for layer in range(2):
        hidden, logits = step(5, layer)
        wanted = plain(biases, layer, hidden, logits, matrix)
        output = loaded.run(layer, hidden, logits).float()
        torch.testing.assert_close(output, wanted, rtol=2**-8, atol=2**-10 * wanted.abs().max().item())


def test_a_chunk_of_experts_converts_as_the_layer_does(mxfp4: Path, use_backend: Callable[..., None]) -> None:
    use_backend(lambda *_: OnlyLoads())
    assert_chunks_convert_as_the_layer(LoadedModel(mxfp4, TOP_K).runners[0].routed_experts)


# Refusals.


def changed(source: Path, out: Path, change: Callable[[State], object]) -> Path:
    state = load_file(source / "model.safetensors")
    change(state)
    out.mkdir()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((source / "config.json").read_text())
    return out


@pytest.mark.parametrize(
    ("name", "field"),
    [("gate_up_proj", "w13_weight"), ("gate_up_proj_bias", "w13_bias"), ("down_proj_bias", "w2_bias")],
)
def test_a_missing_16_bit_stack(gpt_oss_bf16: Path, tmp_path: Path, name: str, field: str) -> None:
    damaged = changed(gpt_oss_bf16, tmp_path / "damaged", lambda s: s.pop(EXPERTS.format(1) + name))
    with pytest.raises(ExpertCacheError, match=rf"layers\.1\..* lacks 16 expert tensors, first {field} \(whole\) of"):
        LoadedModel(damaged, TOP_K)


@pytest.mark.parametrize(
    ("name", "field"), [("gate_up_proj_scales", "w13_weight_scale"), ("down_proj_bias", "w2_bias")]
)
def test_a_missing_mxfp4_stack(
    mxfp4: Path, tmp_path: Path, use_backend: Callable[..., None], name: str, field: str
) -> None:
    use_backend(lambda *_: OnlyLoads())
    damaged = changed(mxfp4, tmp_path / "damaged", lambda s: s.pop(EXPERTS.format(0) + name))
    with pytest.raises(ExpertCacheError, match=rf"layers\.0\..* lacks 16 expert tensors, first {field} \(whole\) of"):
        LoadedModel(damaged, TOP_K)


def test_a_stack_that_does_not_fill_its_place(mxfp4: Path, tmp_path: Path, use_backend: Callable[..., None]) -> None:
    def narrow(state: State) -> None:
        name = EXPERTS.format(0) + "down_proj_scales"
        state[name] = state[name][:, :-1].contiguous()

    use_backend(lambda *_: OnlyLoads())
    with pytest.raises(ExpertCacheError, match=r"w2_weight_scale of all experts has shape \(127, 2\), the model needs"):
        LoadedModel(changed(mxfp4, tmp_path / "damaged", narrow), TOP_K)


def test_without_cuda_mxfp4_names_the_machine(mxfp4: Path) -> None:
    with pytest.raises(ExpertCacheError, match="MXFP4 experts run on vLLM's Marlin kernels, which need CUDA"):
        LoadedModel(mxfp4, TOP_K)


def test_its_export_is_served_with_a_cache(gpt_oss_bf16: Path, tmp_path: Path) -> None:
    said = succeeds("export", gpt_oss_bf16, tmp_path / "int4", "--group-size", 32)
    assert said.endswith(f"Serve it: vllm serve {tmp_path / 'int4'} --moe-expert-cache-size 4\n")
