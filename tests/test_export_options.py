"""The export's options and refusals, on models of a few tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from int4_format import State, assert_nearest, decoded, refusal, weights
from safetensors.torch import save_file

from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.int4_source import Int4Source
from vllm_hlwq.checkpoint.quantize import quantize


def folder(path: Path, tensors: State, **config: Any) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"hidden_size": 128, **config}))
    return path


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def experts(width: int, hidden: int = 128) -> State:
    return {
        f"layers.0.experts.{expert}.{name}.weight": random(*shape)
        for expert in range(2)
        for name, shape in {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}.items()
    }


@pytest.mark.parametrize(("width", "size"), [(256, 128), (192, 64), (704, 64), (96, 32)])
def test_the_largest_group_size_that_fits_is_chosen(tmp_path: Path, width: int, size: int) -> None:
    plan = export_int4(folder(tmp_path / "model", experts(width)), tmp_path / "out")
    assert plan.group_size == size
    assert Int4Source(tmp_path / "out").arguments.group_size == size


def test_a_group_size_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", experts(704))
    assert refusal(lambda: export_int4(source, tmp_path / "out", 128)) == (
        f"{source}: vLLM's Marlin INT4 kernels cannot take layers.0.experts.0.w1: group size 128 does not divide the "
        "expert width 704; --group-size 64 or 32 fits"
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("width", "hidden", "reason"),
    [(128, 192, "hidden size 192 is no multiple of 128"), (80, 128, "does not divide the expert width 80")],
)
def test_shapes_that_no_group_size_helps(tmp_path: Path, width: int, hidden: int, reason: str) -> None:
    message = refusal(lambda: export_int4(folder(tmp_path / "model", experts(width, hidden)), tmp_path / "out"))
    assert reason in message
    assert message.endswith("no group size helps")


def test_searched_scales_lower_the_error_of_every_group(tmp_path: Path) -> None:
    tensors = experts(128)
    source = folder(tmp_path / "model", tensors)
    states = []
    for search in (True, False):
        export_int4(source, tmp_path / str(search), 64, search=search)
        states.append(weights(tmp_path / str(search)))
    for name, tensor in tensors.items():
        wanted, stem = tensor.float(), name.removesuffix("weight")
        searched, largest = (
            (decoded(state, stem) - wanted).square().view(len(wanted), -1, 64).sum(-1) for state in states
        )
        assert (searched <= largest).all()
        assert searched.sum() < 0.9 * largest.sum()
        peak = wanted.view(len(wanted), -1, 64).abs().amax(-1)
        torch.testing.assert_close(states[1][f"{stem}weight_scale"].float(), peak / 7.5, rtol=2**-8, atol=0)


def test_asymmetric_groups_reach_from_their_smallest_weight_to_their_largest(tmp_path: Path) -> None:
    tensors = experts(64)
    tensors["layers.0.experts.1.w3.weight"] += 3  # no group straddles zero
    export_int4(folder(tmp_path / "model", tensors), tmp_path / "out", 32, symmetric=False)
    state = weights(tmp_path / "out")
    for name, wanted in tensors.items():
        groups = wanted.float().view(len(wanted), -1, 32)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = state[name.replace("weight", "weight_scale")].float()
        torch.testing.assert_close(scale, (high - low) / 15, rtol=2**-8, atol=0)
        error = (decoded(state, name.removesuffix("weight")) - wanted.float()).abs().view_as(groups)
        # Half a step, and what rounding the scale to BF16 adds over fifteen steps.
        assert (error <= scale.unsqueeze(-1) * (0.5 + 15 * 2**-8)).all()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_scales_are_of_16_bits(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Float32 weights are quantised as the BF16 ones that vLLM would make of them."""
    tensors = {name: (1.003 * tensor.float()).to(dtype) for name, tensor in experts(64).items()}
    export_int4(folder(tmp_path / "model", tensors), tmp_path / "out", 32)
    state = weights(tmp_path / "out")
    for name, tensor in tensors.items():
        assert state[name.replace("weight", "weight_scale")].dtype == stored
        assert_nearest(state, name.removesuffix("weight"), tensor.to(stored), 32)


def test_linears_outside_the_experts(tmp_path: Path) -> None:
    attention = "layers.0.self_attn"
    tensors = {
        **experts(128),
        f"{attention}.q_proj.weight": random(128, 128),
        f"{attention}.k_proj.weight": random(32, 128),  # Marlin takes no 32 outputs, so q and v stay with it
        f"{attention}.v_proj.weight": random(64, 128),
        f"{attention}.o_proj.weight": random(128, 128),
        "layers.0.mlp.gate_proj.weight": random(2112, 128),
        "layers.0.mlp.up_proj.weight": random(2112, 128),
        "layers.0.mlp.down_proj.weight": random(128, 2112),  # no multiple of 128 inputs
        "layers.0.mlp.gate.weight": random(64, 128),
        "vision_tower.layers.0.fc.weight": random(128, 128),
        "embed_tokens.weight": random(512, 128),
        "lm_head.weight": random(512, 128),
    }
    source = folder(tmp_path / "model", tensors)
    export_int4(source, tmp_path / "without")
    export_int4(source, tmp_path / "with", linears=True)
    stems = set(Int4Source(tmp_path / "with").stems) - set(Int4Source(tmp_path / "without").stems)
    assert stems == {f"{attention}.o_proj.", "layers.0.mlp.gate_proj.", "layers.0.mlp.up_proj."}
    state = weights(tmp_path / "with")
    for stem in stems:
        assert_nearest(state, stem, tensors[f"{stem}weight"], 128)
    config = json.loads((tmp_path / "with/config.json").read_text())
    assert config["quantization_config"]["ignore"] == sorted(
        {name.removesuffix(".weight") for name in tensors if ".experts." not in name} - {stem[:-1] for stem in stems}
    )


@pytest.mark.parametrize(("outputs", "fits"), [(192, True), (96, False)])
def test_latent_projections_become_int4_both_or_neither(tmp_path: Path, outputs: int, fits: bool) -> None:
    """vLLM makes one layer of the first projections of queries and of keys; Marlin takes no 96 outputs."""
    attention = "layers.0.self_attn"
    projections = {"q_a_proj": 128, "kv_a_proj_with_mqa": outputs, "o_proj": 128}
    tensors = {f"{attention}.{name}.weight": random(out, 128) for name, out in projections.items()}
    export_int4(folder(tmp_path / "model", experts(128) | tensors), tmp_path / "out", linears=True)
    together = {f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"}
    stems = {stem for stem in Int4Source(tmp_path / "out").stems if ".experts." not in stem}
    assert stems == {f"{attention}.o_proj."} | {f"{module}." for module in together if fits}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(config["quantization_config"]["ignore"]) == {"lm_head"} | (set() if fits else together)


@pytest.mark.parametrize("width", [64, 128], ids=["told by down_proj", "told by gate_up_proj"])
def test_stacks_with_the_input_first_and_no_biases(tmp_path: Path, width: int) -> None:
    gate_up, down = random(2, 128, 2 * width), random(2, width, 128)
    stacks = {"layers.0.experts.gate_up_proj": gate_up, "layers.0.experts.down_proj": down}
    export_int4(folder(tmp_path / "model", stacks), tmp_path / "out", 64)
    state = weights(tmp_path / "out")
    for expert in range(2):
        stem = f"layers.0.experts.{expert}."
        assert_nearest(state, f"{stem}gate_proj.", gate_up[expert, :, :width].t(), 64)
        assert_nearest(state, f"{stem}up_proj.", gate_up[expert, :, width:].t(), 64)
        assert_nearest(state, f"{stem}down_proj.", down[expert].t(), 64)


def test_one_fused_matrix_an_expert_is_split(tmp_path: Path) -> None:
    fused = {f"experts.{expert}.gate_up_proj.weight": random(128, 128) for expert in range(2)}
    down = {f"experts.{expert}.down_proj.weight": random(128, 64) for expert in range(2)}
    export_int4(folder(tmp_path / "model", fused | down), tmp_path / "out", 64)
    state = weights(tmp_path / "out")
    for expert in range(2):
        weight = fused[f"experts.{expert}.gate_up_proj.weight"]
        assert_nearest(state, f"experts.{expert}.gate_proj.", weight[:64], 64)
        assert_nearest(state, f"experts.{expert}.up_proj.", weight[64:], 64)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"experts.gate_up_proj": random(2, 96, 64)}, "neither dimension is the hidden size 128"),
        (
            {"experts.gate_up_proj": random(2, 64, 128), "experts.down_proj": random(2, 32, 128)},
            "experts.down_proj and experts.gate_up_proj disagree on which dimension is the input",
        ),
        ({"experts.gate_up_proj": random(2, 63, 128)}, "63 output rows, which are no pair of gate and up"),
        (experts(64) | {"experts.mlp.v1": random(2, 64, 128)}, "experts.mlp.v1 [2, 64, 128] is of experts, but its"),
        ({"layers.0.mlp.up_proj.weight": random(64, 128)}, "holds no experts"),
        (experts(64) | {"experts.0.w1.weight": torch.full((64, 128), torch.nan).bfloat16()}, "experts.0.w1.weight"),
    ],
    ids=["shape", "orientation", "odd", "name", "dense", "nan"],
)
def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path, tensors: State, reason: str) -> None:
    source = folder(tmp_path / "model", tensors)
    message = refusal(lambda: export_int4(source, tmp_path / "out"))
    assert message.startswith(f"{source}: ")
    assert reason in message
    assert not (tmp_path / "out").exists()


def test_asymmetric_experts_with_biases_are_refused(layout_models: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(lambda: export_int4(layout_models["gpt_oss"], tmp_path / "out", 64, symmetric=False))
    assert message.endswith("vLLM reads no zero points of experts with biases; export symmetric ones")


def test_no_configuration_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", experts(64))
    (source / "config.json").unlink()
    assert "has no config.json" in refusal(lambda: export_int4(source, tmp_path / "out"))


def test_an_int4_checkpoint_is_no_source(layout_exports: dict[str, Path], tmp_path: Path) -> None:
    opened = open_source(layout_exports["olmoe"])
    assert "holds INT4 weights already" in refusal(lambda: export_int4(opened, tmp_path / "out"))
    assert "('compressed-tensors')" in refusal(lambda: export_int4(layout_exports["olmoe"], tmp_path / "out"))


def test_an_export_by_way_of_hlwq_is_that_of_the_decoded_model(layout_models: dict[str, Path], tmp_path: Path) -> None:
    quantize(layout_models["glm4_moe"], tmp_path / "hlwq")
    dequantize(open_source(tmp_path / "hlwq"), tmp_path / "16-bit")
    export_int4(open_source(tmp_path / "hlwq"), tmp_path / "from-hlwq")
    export_int4(tmp_path / "16-bit", tmp_path / "from-16-bit")
    one, other = weights(tmp_path / "from-hlwq"), weights(tmp_path / "from-16-bit")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "from-hlwq/config.json").read_text() == (tmp_path / "from-16-bit/config.json").read_text()
