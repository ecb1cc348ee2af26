"""The INT4 sibling: every matrix of every layout, what stays in 16 bit, group sizes, and stock vLLM's loader."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4ForConditionalGeneration

from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.int4_source import Int4Source
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.sources import PlainSource
from vllm_hlwq.errors import CheckpointError

State = dict[str, torch.Tensor]
STOCK = Path(__file__).parent / "stock_vllm.py"
TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

# Model, its configuration, and the group size that its shapes admit.
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "gemma4": (lambda: checkpoints.gemma4_config(num_experts=4, top_k_experts=2, attention_k_eq_v=True), 64),
    "gemma4_multimodal": (checkpoints.gemma4_multimodal_config, 64),
    "qwen3_moe": (lambda: checkpoints.qwen3_moe_config(), 128),
    "qwen3_moe_stacked": (lambda: checkpoints.qwen3_moe_config(), 128),
    "mixtral": (checkpoints.mixtral_config, 128),
    "olmoe": (checkpoints.olmoe_config, 64),
    "glm4_moe": (checkpoints.glm4_moe_config, 64),
    "gpt_oss": (checkpoints.gpt_oss_config, 64),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """16-bit models in all layouts; Qwen3-MoE as it is on disk and as transformers holds it in memory."""
    root = tmp_path_factory.mktemp("models")
    for model, (config, _) in MODELS.items():
        stacked = {"save_original_format": False} if model == "qwen3_moe_stacked" else {}
        checkpoints.write(config(), root / model, varied=True, **stacked)
    return {model: root / model for model in MODELS}


@pytest.fixture(scope="module")
def exports(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for model, source in sources.items():
        plan = export_int4(source, root / model)
        assert plan.group_size == MODELS[model][1]
    return {model: root / model for model in sources}


def weights(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Codes -8 to 7 of int32 words ``[rows, words]``, lowest bits first."""
    shifts = torch.arange(0, 32, 4)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8


def decoded(state: State, stem: str) -> torch.Tensor:
    """A matrix by the format's definition: codes times the stored scale of their group."""
    scale = state[f"{stem}weight_scale"].float()
    codes = nibbles(state[f"{stem}weight_packed"])
    if f"{stem}weight_zero_point" in state:
        words = state[f"{stem}weight_zero_point"]  # packed down the rows, eight of them in a word
        zero = nibbles(words.t()).t()[: len(codes)]
        codes = codes - zero.repeat_interleave(codes.shape[1] // zero.shape[1], dim=1)
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def expert_weights(model: str, state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Every expert matrix of a 16-bit model under the name that vLLM expects, written out layout by layout."""
    for name, tensor in state.items():
        if model in ("mixtral", "olmoe", "glm4_moe", "qwen3_moe"):
            if re.search(r"\.experts\.\d+\.", name):
                yield name.removesuffix("weight"), tensor
        elif model == "gpt_oss":
            for expert, weight in enumerate(tensor if name.endswith("_proj") else []):
                if name.endswith(".experts.gate_up_proj"):
                    yield name.replace("gate_up_proj", f"{expert}.w13_"), weight.t()
                elif name.endswith(".experts.down_proj"):
                    yield name.replace("down_proj", f"{expert}.w2_"), weight.t()
        elif name.endswith(".experts.gate_up_proj"):
            for expert, weight in enumerate(tensor):
                half = len(weight) // 2
                yield name.replace("gate_up_proj", f"{expert}.gate_proj."), weight[:half]
                yield name.replace("gate_up_proj", f"{expert}.up_proj."), weight[half:]
        elif name.endswith(".experts.down_proj"):
            for expert, weight in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.down_proj."), weight


def assert_nearest(state: State, stem: str, wanted: torch.Tensor, group_size: int) -> None:
    """Each weight is the level nearest to it, its group's scale within what a search may choose."""
    found, wanted = decoded(state, stem), wanted.float()
    if f"{stem}weight_shape" in state:
        assert state[f"{stem}weight_shape"].tolist() == list(wanted.shape)
    scale = state[f"{stem}weight_scale"].float()
    assert scale.shape == (wanted.shape[0], wanted.shape[1] // group_size)
    groups = wanted.view(len(wanted), -1, group_size)
    ratio = scale / (groups.abs().amax(-1) / 7.5)
    assert ((ratio > 0.59) & (ratio < 1.02)).all()
    wide = scale.repeat_interleave(group_size, dim=1)
    torch.testing.assert_close(found, (wanted / wide).round().clamp(-8, 7) * wide, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_every_expert_matrix_is_at_its_nearest_levels(
    model: str, sources: dict[str, Path], exports: dict[str, Path]
) -> None:
    state = weights(exports[model])
    stems = {name.removesuffix("weight_packed") for name in state if name.endswith("weight_packed")}
    expected = dict(expert_weights(model, weights(sources[model])))
    assert stems == expected.keys()
    layers = 1 if model == "glm4_moe" else 2
    experts = checkpoints.NUM_EXPERTS if "qwen3" in model else 4
    assert len(stems) == layers * experts * (2 if model == "gpt_oss" else 3)
    for stem, wanted in expected.items():
        assert_nearest(state, stem, wanted, MODELS[model][1])


@pytest.mark.parametrize("model", MODELS)
def test_everything_else_is_unchanged_and_its_modules_are_ignored(
    model: str, sources: dict[str, Path], exports: dict[str, Path]
) -> None:
    original, state = weights(sources[model]), weights(exports[model])
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(TENSORS)}
    if model == "gpt_oss":
        for name in [name for name in plain if ".experts." in name]:
            layer, expert, part = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)_bias", name).groups()
            projection = {"w13": "gate_up_proj_bias", "w2": "down_proj_bias"}[part]
            assert torch.equal(plain.pop(name), original[f"{layer}.experts.{projection}"][int(expert)])
    kept = {name for name in original if not re.search(r"\.experts\.", name)}
    assert plain.keys() == kept
    for name in kept:
        assert plain[name].dtype == original[name].dtype
        assert torch.equal(plain[name], original[name]), name
    config = json.loads((exports[model] / "config.json").read_text())
    ignore = config.pop("quantization_config")["ignore"]
    linears = {name.removesuffix(".weight") for name, t in plain.items() if name.endswith(".weight") and t.ndim > 1}
    assert linears | {"lm_head"} <= set(ignore)
    assert not [name for name in ignore if re.search(r"\.experts\.", name)]
    # What is named beside them: values that keys stand in for.
    extra = set(ignore) - linears - {"lm_head"}
    assert all(name.endswith("layers.1.self_attn.v_proj") for name in extra)
    assert bool(extra) == model.startswith("gemma4")
    assert config == json.loads((sources[model] / "config.json").read_text())


def test_the_multimodal_export_has_the_names_that_transformers_gives(exports: dict[str, Path]) -> None:
    with torch.device("meta"):
        names = Gemma4ForConditionalGeneration(checkpoints.gemma4_multimodal_config()).state_dict().keys()
    outside = {name for name in names if ".experts." not in name and name != "lm_head.weight"}
    exported = {name for name in weights(exports["gemma4_multimodal"]) if ".experts." not in name}
    # transformers renames this module when it loads; a checkpoint has the name with `linear`.
    assert {name.replace(".linear.weight", ".weight") for name in exported} == {
        name.replace(".linear.weight", ".weight") for name in outside
    }
    assert any(name.startswith("model.vision_tower.encoder.layers.0.mlp.") for name in exported)
    assert "model.embed_vision.embedding_projection.weight" in exported


# Stock vLLM, without this plugin.


def variants(sources: dict[str, Path], root: Path) -> dict[str, Path]:
    """Exports with other options, and one by way of HLWQ."""
    export_int4(sources["gemma4"], root / "gemma4-asymmetric", 32, symmetric=False)
    export_int4(sources["gemma4"], root / "gemma4-linears", linears=True)
    export_int4(sources["glm4_moe"], root / "glm4_moe-linears", 32, linears=True)
    quantize(sources["qwen3_moe"], root / "hlwq", shard_bytes=400_000)
    export_int4(open_source(root / "hlwq"), root / "qwen3_moe-hlwq", shard_bytes=400_000)
    return {path.name: path for path in root.iterdir() if path.name != "hlwq"}


VARIANTS = ("gemma4-asymmetric", "gemma4-linears", "glm4_moe-linears", "qwen3_moe-hlwq")


@pytest.fixture(scope="module")
def loaded(
    sources: dict[str, Path], exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What stock vLLM said of each export, all loaded in one process."""
    folders = exports | variants(sources, tmp_path_factory.mktemp("variants"))
    if importlib.util.find_spec("torchvision") is None:
        del folders["gemma4_multimodal"]
    done = subprocess.run(
        [sys.executable, str(STOCK), *map(str, folders.values())],
        env={**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(folders, map(json.loads, done.stdout.splitlines()[-len(folders) :]), strict=True))


@pytest.mark.parametrize("model", [*MODELS, *VARIANTS])
def test_stock_vllm_takes_every_tensor_and_misses_none(model: str, loaded: dict[str, dict[str, Any]]) -> None:
    if model == "gemma4_multimodal" and model not in loaded:
        pytest.skip("vLLM's class of multimodal Gemma-4 needs torchvision, which vLLM's CPU runtime does not bring")
    assert loaded[model] == {"unplaced": []}


# Options and refusals, on models of a few tensors.


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


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_asymmetric_experts_with_biases_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(lambda: export_int4(sources["gpt_oss"], tmp_path / "out", 64, symmetric=False))
    assert message.endswith("vLLM reads no zero points of experts with biases; export symmetric ones")


def test_no_configuration_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", experts(64))
    (source / "config.json").unlink()
    assert "has no config.json" in refusal(lambda: export_int4(source, tmp_path / "out"))


def test_an_int4_checkpoint_is_no_source(exports: dict[str, Path], tmp_path: Path) -> None:
    opened = open_source(exports["olmoe"])
    assert "holds INT4 weights already" in refusal(lambda: export_int4(opened, tmp_path / "out"))
    assert "(compressed-tensors)" in refusal(lambda: export_int4(exports["olmoe"], tmp_path / "out"))


def test_an_export_by_way_of_hlwq_is_that_of_the_decoded_model(sources: dict[str, Path], tmp_path: Path) -> None:
    quantize(sources["glm4_moe"], tmp_path / "hlwq")
    dequantize(open_source(tmp_path / "hlwq"), tmp_path / "16-bit")
    export_int4(open_source(tmp_path / "hlwq"), tmp_path / "from-hlwq")
    export_int4(tmp_path / "16-bit", tmp_path / "from-16-bit")
    one, other = weights(tmp_path / "from-hlwq"), weights(tmp_path / "from-16-bit")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "from-hlwq/config.json").read_text() == (tmp_path / "from-16-bit/config.json").read_text()


# Back to 16 bit.


@pytest.mark.parametrize("model", ["gemma4", "qwen3_moe", "glm4_moe", "mixtral"])
def test_transformers_loads_what_an_export_decodes_to(
    model: str, sources: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    dequantize(Int4Source(exports[model]), tmp_path / "16-bit")
    restored, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "16-bit", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(sources[model], dtype=torch.bfloat16).state_dict()
    state = weights(exports[model])
    for name, tensor in restored.state_dict().items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if match is None:
            assert torch.equal(tensor, original[name]), name
            continue
        prefix = match[1].replace(".mlp.", ".block_sparse_moe.") if model == "mixtral" else match[1]
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[match[2]]
        if model == "mixtral":
            names = tuple({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part] for part in names)
        for expert, matrix in enumerate(tensor):
            wanted = torch.cat([decoded(state, f"{prefix}.{expert}.{part}.") for part in names])
            assert torch.equal(matrix, wanted.bfloat16())


def test_experts_laid_out_for_vllm_alone_are_not_decoded(exports: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(lambda: dequantize(Int4Source(exports["gpt_oss"]), tmp_path / "16-bit"))
    assert "is laid out for vLLM only" in message


def test_a_16_bit_checkpoint_is_not_decoded(sources: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(lambda: dequantize(PlainSource(sources["olmoe"]), tmp_path / "16-bit"))
    assert message.endswith("is neither HLWQ nor INT4, so there is nothing to decode")


def changed(source: Path, out: Path, change: Callable[[State], None]) -> Path:
    """A copy of an export whose tensors were changed, without the list of sums."""
    state = weights(source)
    change(state)
    out.mkdir()
    save_file(state, out / "model.safetensors")
    (out / "config.json").write_text((source / "config.json").read_text())
    return out


EXPERT = "model.layers.0.mlp.experts.1."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop(f"{EXPERT}up_proj.weight_scale"), f"{EXPERT}up_proj.weight_scale is missing"),
        (lambda s: [s.pop(n) for n in list(s) if f"{EXPERT}up_proj" in n], f"{EXPERT}up_proj.weight_packed is missing"),
        (lambda s: [s.pop(n) for n in list(s) if EXPERT in n], f"{EXPERT}gate_proj.weight_packed is missing"),
        (
            lambda s: s.update({f"{EXPERT}up_proj.weight_packed": torch.zeros(64, 8, dtype=torch.int32)}),
            f"{EXPERT}up_proj.weight_packed is [64, 8] of torch.int32, but 64 x 128 weights have [64, 16]",
        ),
        (
            lambda s: s[f"{EXPERT}down_proj.weight_shape"].copy_(torch.tensor([64, 64])),
            f"{EXPERT}down_proj.weight_packed is [128, 8]",
        ),
    ],
    ids=["no scale", "no matrix", "no expert", "codes", "shape"],
)
def test_an_int4_checkpoint_that_contradicts_itself_is_refused(
    exports: dict[str, Path], tmp_path: Path, change: Callable[[State], None], reason: str
) -> None:
    damaged = changed(exports["olmoe"], tmp_path / "damaged", change)
    assert reason in refusal(lambda: Int4Source(damaged))


def test_an_infinite_scale_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    damaged = changed(
        exports["olmoe"], tmp_path / "damaged", lambda s: s[f"{EXPERT}up_proj.weight_scale"].fill_(torch.inf)
    )
    message = refusal(lambda: dequantize(Int4Source(damaged), tmp_path / "out"))
    assert f"{EXPERT}up_proj.weight_scale holds NaN or inf" in message
