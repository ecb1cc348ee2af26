"""HLWQ checkpoints that lack an expert or a parameter, or belong to another model: refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hlwq_files import (
    CONFIG,
    GATE_UP,
    INDEX,
    O_PROJ,
    Q_PROJ,
    STATE,
    Coded,
    Tensors,
    dotted,
    edit_json,
    edit_tensors,
    polar_state,
    read_all,
    refused,
    table,
    weights,
    write_base,
    write_json,
    write_state,
)
from safetensors.torch import load_file, save_file

from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.errors import CheckpointError


@pytest.fixture(scope="module")
def state() -> Tensors:
    return polar_state(weights(), dotted)[0]


@pytest.fixture
def copy(hlwq_coded: Path, tmp_path: Path) -> Path:
    """Our writer's form, to damage."""
    return Path(shutil.copytree(hlwq_coded, tmp_path / "copy"))


def without_expert(state: Tensors, stack: str, expert: int) -> Tensors:
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{stack}_e{expert}__")}


@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_missing_in_the_middle(expert: int, state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    write_state(tmp_path, without_expert(state, GATE_UP, expert))
    refused(tmp_path, STATE, f"_e{expert} is missing although expert 2 is there", base=hlwq_base, codebook="A")


@pytest.mark.parametrize("known_from", ["base model", "config.json", "hlwq_config.json"])
def test_an_expert_missing_at_the_end(
    known_from: str, state: Tensors, hlwq_base: Path, copy: Path, tmp_path: Path
) -> None:
    if known_from == "hlwq_config.json":
        (copy / "hlwq_sha256.json").unlink()
        edit_json(copy / "config.json", lambda config: config.pop("num_experts"))
        edit_json(
            copy / INDEX,
            lambda index: [index["weight_map"].pop(f"{GATE_UP}_e2{p}") for p in ("__packed", "__norms", "__meta")],
        )
        for file in copy.glob("*.safetensors"):
            tensors = without_expert(load_file(file), GATE_UP, 2)
            file.unlink()
            save_file(tensors or {"filler": torch.zeros(1)}, file)
        refused(copy, GATE_UP, "stands for [2, 8, 136]", "[3, 8, 136]")
        return
    write_state(tmp_path, without_expert(state, GATE_UP, 2))
    if known_from == "base model":
        write_json(tmp_path / "config.json", {"hidden_size": 136})
        refused(tmp_path, STATE, GATE_UP, "stands for [2, 8, 136]", "[3, 8, 136]", base=hlwq_base, codebook="A")
    else:
        write_json(tmp_path / "config.json", CONFIG)
        refused(tmp_path, STATE, f"{GATE_UP} has 2 experts, config.json says 3: expert 2 is missing", codebook="A")


def test_too_many_experts(state: Tensors, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"text_config": {"num_local_experts": 2}})
    refused(write_state(tmp_path, state), STATE, "has 3 experts, config.json says 2: expert 2 is one too", codebook="A")


@pytest.mark.parametrize(
    ("expert", "problem"),
    [
        (1, "experts.1.gate_up_proj is missing although expert 2 is there"),
        (2, "has 2 experts, config.json says 3: expert 2 is missing"),
    ],
)
def test_an_expert_missing_among_single_matrices(expert: int, problem: str, tmp_path: Path) -> None:
    """Where each expert is a parameter of its own; a base model of that kind does not fill the gap."""
    model = weights()
    singles = {
        f"model.layers.0.mlp.experts.{i}.gate_up_proj.weight": part.clone() for i, part in enumerate(model[GATE_UP])
    }
    base = write_base(tmp_path / "base", {"model.norm.weight": model["model.norm.weight"]} | singles)
    stored: Tensors = {}
    for name, weight in singles.items():
        if f"experts.{expert}." not in name:
            stored |= Coded.of(weight, table("A")).packed(name)
    refused(write_state(tmp_path, stored), problem, base=base, codebook="A")


def test_gate_without_up(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    stored = {key: tensor for key, tensor in state.items() if not key.startswith(GATE_UP)}
    for expert, both in enumerate(weights()[GATE_UP]):
        for projection, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
            if (expert, projection) != (2, "up_proj"):
                key = f"model.layers.0.mlp.experts.{expert}.{projection}"
                stored |= Coded.of(half, table("A")).packed(key)
    refused(
        write_state(tmp_path, stored), STATE, "the up_proj beside", "experts.2.gate_proj", base=hlwq_base, codebook="A"
    )


def test_experts_of_different_shapes(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    odd = state | Coded.of(weights()[GATE_UP][1, :6], table("A")).packed(f"{GATE_UP}_e1")
    refused(write_state(tmp_path, odd), STATE, f"{GATE_UP}_e1 is 6 x 136", f"{GATE_UP}_e0 8 x 136", base=hlwq_base)


def test_a_stack_stored_whole_and_by_experts(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    whole = state | Coded.of(weights()[GATE_UP].view(-1, 136), table("A")).packed(GATE_UP)
    refused(write_state(tmp_path, whole), STATE, "stored both whole and by experts", base=hlwq_base)


# What the model has


def test_the_wrong_base_model(state: Tensors, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    write_state(tmp_path / "state", state)
    larger = weights() | {O_PROJ: torch.zeros(200, 128, dtype=torch.bfloat16)}
    base = write_base(tmp_path / "larger", larger)
    refused(tmp_path / "state", STATE, f"{O_PROJ} stands for [136, 128]", "[200, 128]", base=base, codebook="A")
    del larger[O_PROJ]
    base = write_base(tmp_path / "smaller", larger)
    refused(tmp_path / "state", "o_proj is coded, but the base model", "smaller", base=base, codebook="A")


def test_a_plain_tensor_of_another_shape_than_the_base_models(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    odd = state | {"model.norm.weight": torch.ones(8)}
    refused(write_state(tmp_path, odd), STATE, "model.norm.weight stands for [8]", base=hlwq_base, codebook="A")


@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
def test_a_parameter_that_only_our_list_knows_of(name: str, copy: Path) -> None:
    """Every trace of it in the files is gone."""
    (copy / "hlwq_sha256.json").unlink()
    for file in copy.glob("*.safetensors"):
        edit_tensors(file, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)])
        if not load_file(file):
            save_file({"filler": torch.zeros(1)}, file)
    edit_json(
        copy / INDEX,
        lambda index: [index["weight_map"].pop(k) for k in list(index["weight_map"]) if k.startswith(name)],
    )
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_all(HlwqSource(copy))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_a_configuration_of_a_billion_layers_is_not_built(key: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "qwen3_moe", "hidden_size": 136, key: 10**9})
    write_state(tmp_path, polar_state(weights(), dotted, meta=4, names=(Q_PROJ,))[0])
    refused(tmp_path, STATE, Q_PROJ, "give --base-model, whose shapes tell it", codebook="A")
