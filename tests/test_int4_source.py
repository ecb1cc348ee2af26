"""INT4 checkpoints back to 16 bit, and damaged ones."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hlwq_files import edit_json
from int4_format import State, decoded, nibbles, refusal, weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from vllm_hlwq.checkpoint.dequantize import dequantize
from vllm_hlwq.checkpoint.int4_source import Int4Source
from vllm_hlwq.checkpoint.sources import PlainSource


@pytest.mark.parametrize("model", ["gemma4", "qwen3_moe", "glm4_moe", "mixtral"])
def test_transformers_loads_what_an_export_decodes_to(
    model: str, layout_models: dict[str, Path], layout_exports: dict[str, Path], tmp_path: Path
) -> None:
    dequantize(Int4Source(layout_exports[model]), tmp_path / "16-bit")
    restored, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "16-bit", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(layout_models[model], dtype=torch.bfloat16).state_dict()
    state = weights(layout_exports[model])
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


def test_experts_laid_out_for_vllm_alone_are_not_decoded(layout_exports: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(lambda: dequantize(Int4Source(layout_exports["gpt_oss"]), tmp_path / "16-bit"))
    assert "is laid out for vLLM only" in message


def test_a_16_bit_checkpoint_is_not_decoded(layout_models: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(lambda: dequantize(PlainSource(layout_models["olmoe"]), tmp_path / "16-bit"))
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
    layout_exports: dict[str, Path], tmp_path: Path, change: Callable[[State], None], reason: str
) -> None:
    damaged = changed(layout_exports["olmoe"], tmp_path / "damaged", change)
    assert reason in refusal(lambda: Int4Source(damaged))


def test_an_infinite_scale_is_refused(layout_exports: dict[str, Path], tmp_path: Path) -> None:
    damaged = changed(
        layout_exports["olmoe"], tmp_path / "damaged", lambda s: s[f"{EXPERT}up_proj.weight_scale"].fill_(torch.inf)
    )
    message = refusal(lambda: dequantize(Int4Source(damaged), tmp_path / "out"))
    assert f"{EXPERT}up_proj.weight_scale holds NaN or inf" in message


def test_what_is_not_coded_is_finite_too(layout_exports: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    damaged = changed(layout_exports["olmoe"], tmp_path / "damaged", lambda state: state[name][3:4].fill_(float("nan")))
    message = refusal(lambda: dequantize(Int4Source(damaged), tmp_path / "out"))
    assert f"tensor {name} holds NaN or inf" in message
    assert not (tmp_path / "out").exists()


def ordered(source: Path, out: Path) -> dict[str, torch.Tensor]:
    """A copy of an export whose matrices have their columns in another order; returns that order by stem."""
    orders: dict[str, torch.Tensor] = {}

    def shuffle(state: State) -> None:
        for stem in [name.removesuffix("weight_packed") for name in state if name.endswith("weight_packed")]:
            codes = nibbles(state[f"{stem}weight_packed"])
            order = orders[stem] = torch.randperm(codes.shape[1], generator=torch.Generator().manual_seed(len(orders)))
            size = codes.shape[1] // state[f"{stem}weight_scale"].shape[1]
            state[f"{stem}weight_packed"] = pack_to_int32(codes[:, order].to(torch.int8), 4)
            state[f"{stem}weight_g_idx"] = (order // size).int()

    changed(source, out, shuffle)
    edit_json(
        out / "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(actorder="group"),
    )
    return orders


def test_columns_in_an_order_of_their_own_have_their_group_s_scale(
    layout_exports: dict[str, Path], tmp_path: Path
) -> None:
    orders = ordered(layout_exports["olmoe"], tmp_path / "ordered")
    dequantize(Int4Source(tmp_path / "ordered"), tmp_path / "16-bit")
    found, state = weights(tmp_path / "16-bit"), weights(layout_exports["olmoe"])
    assert not [name for name in found if "g_idx" in name]
    experts = "model.layers.1.mlp.experts"
    for index, matrix in enumerate(found[f"{experts}.down_proj"]):
        stem = f"{experts}.{index}.down_proj."
        assert torch.equal(matrix, decoded(state, stem).bfloat16()[:, orders[stem]])
    for index, matrix in enumerate(found[f"{experts}.gate_up_proj"]):
        stems = [f"{experts}.{index}.{part}_proj." for part in ("gate", "up")]
        wanted = [decoded(state, stem).bfloat16()[:, orders[stem]] for stem in stems]
        assert torch.equal(matrix, torch.cat(wanted))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop(f"{EXPERT}up_proj.weight_g_idx"), f"{EXPERT}up_proj.weight_g_idx is missing"),
        (lambda s: s[f"{EXPERT}up_proj.weight_g_idx"].fill_(0), "gives no groups of 64 columns each"),
        (lambda s: s[f"{EXPERT}up_proj.weight_g_idx"][:1].fill_(-1), "gives no groups of 64 columns each"),
        (lambda s: s.update({f"{EXPERT}up_proj.weight_g_idx": torch.zeros(64).int()}), "weight_g_idx is [64] of"),
    ],
    ids=["missing", "one group", "partly in order", "shape"],
)
def test_an_order_of_columns_that_cannot_be_is_refused(
    layout_exports: dict[str, Path], tmp_path: Path, change: Callable[[State], None], reason: str
) -> None:
    ordered(layout_exports["olmoe"], tmp_path / "ordered")
    damaged = changed(tmp_path / "ordered", tmp_path / "damaged", change)
    assert reason in refusal(lambda: dequantize(Int4Source(damaged), tmp_path / "out"))


def test_an_order_of_columns_that_the_configuration_does_not_know_is_refused(
    layout_exports: dict[str, Path], tmp_path: Path
) -> None:
    ordered(layout_exports["olmoe"], tmp_path / "ordered")
    shutil.copy(layout_exports["olmoe"] / "config.json", tmp_path / "ordered")
    message = refusal(lambda: Int4Source(tmp_path / "ordered"))
    assert "weight_g_idx orders columns, but config.json has no actorder 'group'" in message


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda q: q.update(transform_config={"config_groups": {"u": {}}}), "transform_config says that weights are"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits="x"), "describes no single INT4 scheme ("),
    ],
    ids=["rotated", "several lines of pydantic's"],
)
def test_a_configuration_that_is_not_understood_is_refused_in_one_line(
    layout_exports: dict[str, Path], tmp_path: Path, edit: Callable[[dict[str, Any]], None], reason: str
) -> None:
    folder = changed(layout_exports["olmoe"], tmp_path / "model", lambda state: None)
    edit_json(folder / "config.json", lambda config: edit(config["quantization_config"]))
    message = refusal(lambda: Int4Source(folder))
    assert message.startswith(f"{folder}/config.json: {reason}")
