"""The INT4 sibling of every layout: each matrix, what stays in 16 bit, and stock vLLM's loader."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from int4_format import MODELS, State, assert_nearest, weights
from transformers import Gemma4ForConditionalGeneration

from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.quantize import quantize

STOCK = Path(__file__).parent / "stock_vllm.py"
TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


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


@pytest.mark.parametrize("model", MODELS)
def test_every_expert_matrix_is_at_its_nearest_levels(
    model: str, layout_models: dict[str, Path], layout_exports: dict[str, Path]
) -> None:
    state = weights(layout_exports[model])
    stems = {name.removesuffix("weight_packed") for name in state if name.endswith("weight_packed")}
    expected = dict(expert_weights(model, weights(layout_models[model])))
    assert stems == expected.keys()
    layers = 1 if model == "glm4_moe" else 2
    experts = checkpoints.NUM_EXPERTS if "qwen3" in model else 4
    assert len(stems) == layers * experts * (2 if model == "gpt_oss" else 3)
    for stem, wanted in expected.items():
        assert_nearest(state, stem, wanted, MODELS[model][1])


@pytest.mark.parametrize("model", MODELS)
def test_everything_else_is_unchanged_and_its_modules_are_ignored(
    model: str, layout_models: dict[str, Path], layout_exports: dict[str, Path]
) -> None:
    original, state = weights(layout_models[model]), weights(layout_exports[model])
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
    config = json.loads((layout_exports[model] / "config.json").read_text())
    ignore = config.pop("quantization_config")["ignore"]
    linears = {name.removesuffix(".weight") for name, t in plain.items() if name.endswith(".weight") and t.ndim > 1}
    assert linears | {"lm_head"} <= set(ignore)
    assert not [name for name in ignore if re.search(r"\.experts\.", name)]
    # What is named beside them: values that keys stand in for.
    extra = set(ignore) - linears - {"lm_head"}
    assert all(name.endswith("layers.1.self_attn.v_proj") for name in extra)
    assert bool(extra) == model.startswith("gemma4")
    assert config == json.loads((layout_models[model] / "config.json").read_text())


def test_the_multimodal_export_has_the_names_that_transformers_gives(layout_exports: dict[str, Path]) -> None:
    with torch.device("meta"):
        names = Gemma4ForConditionalGeneration(checkpoints.gemma4_multimodal_config()).state_dict().keys()
    outside = {name for name in names if ".experts." not in name and name != "lm_head.weight"}
    exported = {name for name in weights(layout_exports["gemma4_multimodal"]) if ".experts." not in name}
    # transformers renames this module when it loads; a checkpoint has the name with `linear`.
    assert {name.replace(".linear.weight", ".weight") for name in exported} == {
        name.replace(".linear.weight", ".weight") for name in outside
    }
    assert any(name.startswith("model.vision_tower.encoder.layers.0.mlp.") for name in exported)
    assert "model.embed_vision.embedding_projection.weight" in exported


# Stock vLLM, without this plugin.


def variants(layout_models: dict[str, Path], root: Path) -> dict[str, Path]:
    """Exports with other options, and one by way of HLWQ."""
    export_int4(layout_models["gemma4"], root / "gemma4-asymmetric", 32, symmetric=False)
    export_int4(layout_models["gemma4"], root / "gemma4-linears", linears=True)
    export_int4(layout_models["glm4_moe"], root / "glm4_moe-linears", 32, linears=True)
    quantize(layout_models["qwen3_moe"], root / "hlwq", shard_bytes=400_000)
    export_int4(open_source(root / "hlwq"), root / "qwen3_moe-hlwq", shard_bytes=400_000)
    return {path.name: path for path in root.iterdir() if path.name != "hlwq"}


VARIANTS = ("gemma4-asymmetric", "gemma4-linears", "glm4_moe-linears", "qwen3_moe-hlwq")


@pytest.fixture(scope="module")
def loaded(
    layout_models: dict[str, Path], layout_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What stock vLLM said of each export, all loaded in one process."""
    folders = layout_exports | variants(layout_models, tmp_path_factory.mktemp("variants"))
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
