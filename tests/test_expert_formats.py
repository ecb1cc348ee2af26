"""Each format of experts from a checkpoint's tensors to a layer's output, on a CPU.

vLLM's own loader and conversions run, and our backend, with all experts resident; the CUDA operators beneath are those
of ``marlin_operators``. What kernels make of slots and waves is asked in ``test_gpu_formats.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import format_files
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel, engine_config
from format_files import State
from int4_format import decoded
from marlin_operators import AWQ_ORDER, OnlyLoads, assert_chunks_convert_as_the_layer, marlin_on_cpu, unpack
from torch.nn import functional

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.expert_formats import SIXTEEN_BIT, both
from vllm_hlwq.quant_methods import UnquantizedFusedMoEMethod

Parts = dict[tuple[int, int, str], State]
"""Tensors of each matrix by layer, expert and projection."""


def awq_matrix(part: State) -> torch.Tensor:
    def codes(words: torch.Tensor) -> torch.Tensor:
        return unpack(words, 4, 1).view(len(words), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)

    groups = len(part["scales"])
    size = len(part["qweight"]) // groups
    zeros = codes(part["qzeros"]).repeat_interleave(size, 0)
    return ((codes(part["qweight"]) - zeros) * part["scales"].float().repeat_interleave(size, 0)).t()


def gptq_matrix(part: State) -> torch.Tensor:
    codes = unpack(part["qweight"], 4, 0)
    size = len(codes) // len(part["scales"])
    return ((codes - 8) * part["scales"].float().repeat_interleave(size, 0)).t()


def compressed_matrix(part: State) -> torch.Tensor:
    return decoded(part, "")


def fp8_matrix(part: State) -> torch.Tensor:
    codes = part["weight"].float()
    if "weight_scale_inv" in part or part["weight_scale"].shape not in ((len(codes), 1), (1,), ()):
        scale = part.get("weight_scale_inv", part.get("weight_scale"))
        return codes * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes * part["weight_scale"]


def exported(base: Path, out: Path, **arguments: Any) -> Path:
    export_int4(base, out, **arguments)
    return out


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what is to be known of its format.

    ``matrix`` makes a weight ``[out, in]`` of one matrix's tensors. ``stored`` names the tensors of each matrix that
    are kept, ``inputs_first`` those of them that have inputs before outputs. With ``one_scale`` gate and up share the
    larger of their scales.
    """

    write: Callable[[Path, Path], Path]
    matrix: Callable[[State], torch.Tensor]
    stored: tuple[str, ...]
    inputs_first: tuple[str, ...] = ()
    base: str = "qwen3_moe_bf16"
    one_scale: bool = False

    def matrices(self, parts: Parts, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Weights of an expert by projection, as the kernels have them."""
        found = {name: self.matrix(parts[layer, expert, name]) for name in ("gate_proj", "up_proj", "down_proj")}
        if self.one_scale:
            scale = max(parts[layer, expert, name]["weight_scale"] for name in ("gate_proj", "up_proj"))
            for name in ("gate_proj", "up_proj"):
                found[name] = (found[name].half() / scale).to(torch.float8_e4m3fn).float() * scale
        return found


def written(make: Callable[..., Path], **arguments: Any) -> Callable[[Path, Path], Path]:
    return lambda base, out: make(base, out, **arguments)


COMPRESSED: Any = compressed_matrix, ("weight_packed", "weight_scale")
ASYMMETRIC: Any = compressed_matrix, ("weight_packed", "weight_scale", "weight_zero_point")
AWQ: Any = awq_matrix, ("qweight", "scales", "qzeros"), ("qweight", "scales", "qzeros")
GPTQ: Any = gptq_matrix, ("qweight", "scales"), ("qweight", "scales")
BIASED_GPTQ: Any = gptq_matrix, ("qweight", "scales", "bias"), ("qweight", "scales")
FP8: Any = fp8_matrix, ("weight", "weight_scale")
FP8_BLOCKS: Any = fp8_matrix, ("weight", "weight_scale_inv")
WIDE: Any = {"base": "qwen3_moe_wide_bf16"}
CASES = {
    "compressed-int4": Case(written(exported, group_size=64), *COMPRESSED),
    "compressed-int4-asymmetric": Case(written(exported, group_size=32, symmetric=False), *ASYMMETRIC),
    "compressed-int4-channel": Case(written(exported, group_size=None), *COMPRESSED),
    "awq": Case(format_files.awq, *AWQ),
    "awq-g32": Case(written(format_files.awq, group_size=32), *AWQ),
    "awq-g128": Case(written(format_files.awq, group_size=128), *AWQ, **WIDE),
    "gptq": Case(format_files.gptq, *GPTQ),
    "gptq-g128": Case(written(format_files.gptq, group_size=128), *GPTQ, **WIDE),
    "gptq-channel": Case(written(format_files.gptq, group_size=-1), *GPTQ),
    "gptq-bias": Case(written(format_files.gptq, biases=True), *BIASED_GPTQ),
    "fp8-tensor": Case(format_files.fp8, *FP8, one_scale=True),
    "fp8-tensor-static": Case(written(format_files.fp8, static=True), *FP8, one_scale=True),
    "fp8-block": Case(written(format_files.fp8, block=128), *FP8_BLOCKS, **WIDE),
    "compressed-fp8-tensor": Case(written(format_files.compressed_fp8, strategy="tensor"), *FP8, one_scale=True),
    "compressed-fp8-static": Case(
        written(format_files.compressed_fp8, strategy="tensor", static=True), *FP8, one_scale=True
    ),
    "compressed-fp8-channel": Case(written(format_files.compressed_fp8, strategy="channel"), *FP8, **WIDE),
    "compressed-fp8-block": Case(written(format_files.compressed_fp8, strategy="block"), *FP8, **WIDE),
}


@pytest.fixture(scope="session", params=CASES)
def case_and_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = CASES[request.param]
    return case, case.write(request.getfixturevalue(case.base), tmp_path_factory.mktemp(request.param))


def parts_of(checkpoint: Path) -> Parts:
    parts: Parts = {}
    for layer, expert, projection, name, tensor in format_files.expert_tensors(checkpoint):
        parts.setdefault((layer, expert, projection), {})[name] = tensor
    return parts


def test_the_store_holds_the_files_values(
    case_and_checkpoint: tuple[Case, Path], use_backend: Callable[..., None]
) -> None:
    case, checkpoint = case_and_checkpoint
    use_backend(lambda *_: OnlyLoads())
    loaded = LoadedModel(checkpoint, TOP_K)
    parts = parts_of(checkpoint)
    for number, runner in enumerate(loaded.runners):
        store = runner.routed_experts.expert_cache.store
        for expert in range(NUM_EXPERTS):
            for name in case.stored:
                gate, up, down = (parts[number, expert, f"{part}_proj"][name] for part in ("gate", "up", "down"))
                if gate.numel() == 1:
                    gate, up, down = gate.reshape(1), up.reshape(1), down.reshape(())
                both = torch.cat([gate, up], dim=1 if name in case.inputs_first else 0)
                for field, wanted in ((f"w13_{name}", both), (f"w2_{name}", down)):
                    found = store.field(field)[expert]
                    assert found.dtype == wanted.dtype
                    assert torch.equal(found.float(), wanted.float()), f"{field} of expert {expert}"


def plain(parts: Parts, case: Case, layer: int, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A layer's output from the file's tensors, float32."""
    top = logits.softmax(-1).topk(TOP_K)
    weights = top.values / top.values.sum(-1, keepdim=True)
    output = torch.zeros(hidden.shape)
    for token, experts in enumerate(top.indices.tolist()):
        for k, expert in enumerate(experts):
            matrices = case.matrices(parts, layer, expert)

            def project(name: str, x: torch.Tensor, expert: int = expert, matrices: State = matrices) -> torch.Tensor:
                bias = parts[layer, expert, name].get("bias")
                return x @ matrices[name].t() + (0.0 if bias is None else bias.float())

            x = hidden[token].float()
            inner = functional.silu(project("gate_proj", x)) * project("up_proj", x)
            output[token] += weights[token, k] * project("down_proj", inner)
    return output


def test_the_converted_experts_are_the_files(
    case_and_checkpoint: tuple[Case, Path], use_backend: Callable[..., None]
) -> None:
    case, checkpoint = case_and_checkpoint
    use_backend(marlin_on_cpu)
    loaded = LoadedModel(checkpoint, NUM_EXPERTS)
    parts = parts_of(checkpoint)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        hidden = torch.randn(3, loaded.config.model_config.get_hidden_size(), generator=generator).bfloat16()
        logits = 2 * torch.randn(3, NUM_EXPERTS, generator=generator)
        output = loaded.run(layer, hidden, logits).float()
        wanted = plain(parts, case, layer, hidden, logits)
        # Roundings to BF16 of what lies between the products, and of the rows before the sum.
        torch.testing.assert_close(output, wanted, rtol=2**-6, atol=2**-6 * wanted.abs().max().item())


def test_a_chunk_of_experts_converts_as_the_layer_does(
    case_and_checkpoint: tuple[Case, Path], use_backend: Callable[..., None]
) -> None:
    _, checkpoint = case_and_checkpoint
    use_backend(lambda *_: OnlyLoads())
    assert_chunks_convert_as_the_layer(LoadedModel(checkpoint, TOP_K).runners[1].routed_experts)


# Refusals.


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(ExpertCacheError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_cuda_the_machine_is_named(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    checkpoint = format_files.awq(qwen3_moe_bf16, tmp_path / "awq")
    message = refusal(lambda: LoadedModel(checkpoint, TOP_K))
    assert (
        "AWQ INT4 experts run on vLLM's Marlin kernels, which need CUDA; on this machine serve a BF16, FP16 or"
        in message
    )


def test_a_tensor_that_the_format_does_not_list_is_named(qwen3_moe_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "expert_format", replace(SIXTEEN_BIT, carried=both("bias")))
    message = refusal(lambda: LoadedModel(qwen3_moe_bf16, TOP_K))
    assert message.startswith("model.layers.0.mlp.experts: weight w13_weight is none that the expert cache carries")


def test_gptq_with_activation_ordering(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    checkpoint = format_files.gptq(qwen3_moe_bf16, tmp_path / "gptq", desc_act=True)
    with pytest.raises(ValueError, match="desc_act=True"):  # vLLM's own refusal, before ours are asked
        engine_config(checkpoint, TOP_K)


@pytest.mark.parametrize(
    ("write", "changes", "named"),
    [
        (format_files.awq, {"zero_point": False}, "AWQ with zero_point False and group size 64"),
        (format_files.gptq, {"bits": 8}, "GPTQ with 8 bits"),
        (format_files.fp8, {"weight_block_size": [64, 64]}, "FP8 in blocks of [64, 64]"),
        (format_files.fp8, {"store_dtype": "mxfp4"}, "FP8 stored as mxfp4"),
    ],
)
def test_a_variant_without_a_backend_is_named(
    qwen3_moe_bf16: Path, tmp_path: Path, write: Any, changes: dict[str, Any], named: str
) -> None:
    checkpoint = write(qwen3_moe_bf16, tmp_path / "variant", **changes)
    assert f"experts quantised as {named} have no expert-cache backend" in refusal(lambda: LoadedModel(checkpoint, 4))
