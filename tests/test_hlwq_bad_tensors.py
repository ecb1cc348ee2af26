"""HLWQ tensors that contradict one another or the model: each refused in one line with file, tensor and remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hlwq_files import (
    DOWN,
    EMBEDDING,
    INDEX,
    Q_PROJ,
    STATE,
    Coded,
    Tensors,
    dotted,
    edit_json,
    edit_tensors,
    polar_state,
    refused,
    shard_of,
    slice_inside,
    table,
    weights,
    write_base,
    write_json,
    write_state,
)


@pytest.fixture(scope="module")
def state() -> Tensors:
    return polar_state(weights(), dotted)[0]


@pytest.fixture
def copy(hlwq_coded: Path, tmp_path: Path) -> Path:
    """Our writer's form, to damage."""
    return Path(shutil.copytree(hlwq_coded, tmp_path / "copy"))


@pytest.fixture
def unlisted(copy: Path) -> Path:
    """Our form without our lists, so that nothing but the weights themselves tells."""
    for name in ("hlwq_config.json", "hlwq_sha256.json"):
        (copy / name).unlink()
    return copy


def change_of(key: str, value: object) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: value(tensors[key]) if callable(value) else value})


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("__packed", lambda t: t[:-1].clone(), "is 959 bytes; the 1536 codes of 5 bits"),
        ("__packed", lambda t: t[:768].clone(), "is 768 bytes; the 1536 codes of 5 bits"),
        ("__packed", lambda t: t.view(6, -1), "[6, 160] of torch.uint8, not a row of bytes"),
        ("__packed", lambda t: t.view(torch.int8), "of torch.int8, not a row of bytes"),
        ("__norms", lambda t: t.float(), "is [6, 2] of torch.float32"),
        ("__norms", lambda t: t.view(-1), "is [12] of torch.float16"),
        ("__norms", lambda t: t[:5].clone(), "is [5, 2] of torch.float16"),
        ("__meta", torch.tensor([6, 2, 128, 1536]).int(), "is [4] of torch.int32, not 4 or 5 of int64"),
        ("__meta", torch.tensor([6, 2, 128]), "is [3] of torch.int64"),
        ("__meta", torch.tensor(6), "is [] of torch.int64"),
        ("__meta", torch.tensor([6, 2, 128, 1537, 136]), "not [rows, blocks, block size, their product, columns]"),
        ("__meta", torch.tensor([-6, -2, 128, 1536, 136]), "not [rows, blocks, block size, their product, columns]"),
        ("__meta", torch.tensor([12, 2, 64, 1536, 128]), "is [6, 2] of torch.float16, by "),
        ("__meta", torch.tensor([2, 6, 128, 1536, 700]), "is [6, 2] of torch.float16, by "),
        ("__meta", torch.tensor([8, 2, 96, 1536, 136]), "has block size 96, no power of two"),
        ("__meta", torch.tensor([6, 2, 128, 1536, 400]), "has 400 columns, in the model 136"),
        ("__meta", torch.tensor([6, 2, 128, 1536, 130]), "has 130 columns, in the model 136"),
        ("__meta", torch.tensor([2**62, 2, 128, 1536, 136]), "not [rows, blocks, block size, their product, columns]"),
    ],
)
def test_parts_that_disagree(
    key: str, value: object, problem: str, state: Tensors, hlwq_base: Path, tmp_path: Path
) -> None:
    changed = dict(state)
    change_of(f"{Q_PROJ}{key}", value)(changed)
    refused(write_state(tmp_path, changed), STATE, Q_PROJ, problem, base=hlwq_base, codebook="A")


@pytest.mark.parametrize("part", ["__packed", "__norms", "__meta"])
def test_a_missing_part(part: str, state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    changed = {key: tensor for key, tensor in state.items() if key != f"{Q_PROJ}{part}"}
    refused(write_state(tmp_path, changed), STATE, f"{Q_PROJ}{part} is missing", base=hlwq_base, codebook="A")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_a_norm_that_is_none(value: float, state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    """A float32 norm beyond float16 was stored as inf."""
    key = f"{DOWN}_e1__norms"
    norms = state[key].clone()
    norms[44, 0] = value
    changed = state | {key: norms}
    refused(
        write_state(tmp_path, changed), STATE, f"{key} is {value} for block 0 of row 44", base=hlwq_base, codebook="A"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value: float, unlisted: Path, state: Tensors, tmp_path: Path) -> None:
    """In the file itself, and in the base model."""
    name = "model.norm.weight"
    edit_tensors(shard_of(unlisted, name), lambda tensors: tensors[name].__setitem__(3, value))
    refused(unlisted, shard_of(unlisted, name).name, name, "NaN or inf")
    damaged = weights()
    damaged[name][3] = value
    base = write_base(tmp_path / "base", damaged)
    (tmp_path / "state").mkdir()
    refused(write_state(tmp_path / "state", state), "model.safetensors", name, "NaN or inf", base=base, codebook="A")


def test_two_spellings_of_one_tensor(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    again = Coded.of(weights()[Q_PROJ], table("A")).packed(Q_PROJ.replace(".", "__").removesuffix("__weight"))
    refused(write_state(tmp_path, state | again), STATE, Q_PROJ, "the same tensor, in two spellings", base=hlwq_base)


@pytest.mark.parametrize("key", [f"{DOWN.replace('.', '__')}_e1", f"{DOWN}_e01", slice_inside(DOWN, 1)])
def test_two_spellings_of_one_expert(key: str, state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    again = Coded.of(weights()[DOWN][1], table("A")).packed(key)
    refused(write_state(tmp_path, state | again), STATE, "_e1 ", "the same tensor, in two spellings", base=hlwq_base)


def test_new_and_old_form_of_one_tensor(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    old = {f"{Q_PROJ}.codes": torch.zeros(6, 256, dtype=torch.int8), f"{Q_PROJ}.ct": torch.arange(32.0)}
    old[f"{Q_PROJ}.norms"] = torch.zeros(6, 2, dtype=torch.float16)
    refused(write_state(tmp_path, state | old), STATE, Q_PROJ, "in two spellings or forms", base=hlwq_base)


def test_coded_and_plain(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    both = state | {Q_PROJ: weights()[Q_PROJ]}
    refused(write_state(tmp_path, both), STATE, f"{Q_PROJ} and another tensor", base=hlwq_base, codebook="A")


def test_head_and_embedding_of_a_tied_model(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    both = state | Coded.of(weights()[EMBEDDING], table("A")).packed("lm_head.weight")
    refused(
        write_state(tmp_path, both), STATE, f"and another tensor are both {EMBEDDING}", base=hlwq_base, codebook="A"
    )


# Codebooks


@pytest.mark.parametrize(
    ("levels", "problem"),
    [
        (torch.arange(33.0), "no float32 table of 4 to 256 levels"),
        (torch.arange(2.0), "no float32 table of 4 to 256 levels"),
        (torch.arange(32).half(), "no float32 table of 4 to 256 levels"),
        (torch.arange(32.0).view(4, 8), "no float32 table of 4 to 256 levels"),
        (torch.empty(0), "no float32 table of 4 to 256 levels"),
        (torch.arange(16.0), "is 3200 bytes; the 5120 codes of 4 bits"),
        (torch.arange(32.0).flip(0), "must be finite and ascending"),
        (torch.full((32,), float("nan")), "must be finite and ascending"),
        (torch.arange(32.0) * 1e30, "level 3.1e+31 is none of a normalised block"),
    ],
)
def test_a_stored_codebook_that_is_none(
    levels: torch.Tensor, problem: str, state: Tensors, hlwq_base: Path, tmp_path: Path
) -> None:
    refused(write_state(tmp_path, state | {"hlwq.codebook": levels}), STATE, problem, base=hlwq_base)


def test_an_unknown_codebook(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    refused(write_state(tmp_path, state), str(tmp_path), "stores no codebook", "--codebook A, B or C", base=hlwq_base)


def test_a_codebook_that_was_taken_out(unlisted: Path) -> None:
    file = shard_of(unlisted, "hlwq.codebook")
    edit_tensors(file, lambda tensors: tensors.pop("hlwq.codebook"))
    edit_json(unlisted / INDEX, lambda index: index["weight_map"].pop("hlwq.codebook"))
    refused(unlisted, "config.json says that the codebook is stored, but tensor hlwq.codebook is missing")


# Older files

OLD = "layer.q_proj"


def old_file(folder: Path, **changed: torch.Tensor) -> Path:
    parts = {
        "codes": torch.full((4, 128), 15, dtype=torch.int8),
        "norms": torch.ones(4, 1, dtype=torch.float16),
        "ct": torch.from_numpy(table("A")).float(),
    } | changed
    return write_state(folder, {f"{OLD}.{part}": tensor for part, tensor in parts.items()})


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("codes", torch.full((4, 128), 32, dtype=torch.int8), f"{OLD}.codes holds code 32, beyond 32 levels"),
        ("codes", torch.full((4, 128), -1, dtype=torch.int8), f"{OLD}.codes holds code 255, beyond 32 levels"),
        ("codes", torch.zeros(4, 64, dtype=torch.uint8), "holds no 128 codes of 5 bits a row"),
        ("codes", torch.zeros(4, 128, dtype=torch.int32), "holds no 128 codes of 5 bits a row"),
        ("codes", torch.zeros(512, dtype=torch.int8), "is [512], no matrix"),
        ("norms", torch.ones(3, 1, dtype=torch.float16), f"{OLD}.norms"),
        ("norms", torch.ones(4, 1), f"{OLD}.norms is [4, 1] of torch.float32"),
        ("norms", torch.empty(0, dtype=torch.float16), f"{OLD}.norms is [0]"),
        ("ct", torch.arange(31.0), f"{OLD}.ct has 31 levels, no power of two"),
        ("ct", torch.arange(32), f"{OLD}.ct is of torch.int64, not float32"),
        ("ct", torch.arange(32.0).flip(0), f"{OLD}.ct: a codebook's levels must be finite and ascending"),
    ],
)
def test_older_files_that_disagree(part: str, value: torch.Tensor, problem: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{OLD}.weight": torch.zeros(4, 128, dtype=torch.bfloat16)})
    refused(old_file(tmp_path, **{part: value}), STATE, problem, base=base)


def test_an_older_file_of_an_unknown_kind(tmp_path: Path) -> None:
    write_json(tmp_path / "polar_config.json", {"format": "polar_engine_v6"})
    refused(old_file(tmp_path), "polar_config.json: format is 'polar_engine_v6'")


def test_an_older_file_without_its_table(tmp_path: Path) -> None:
    old_file(tmp_path)
    edit_tensors(tmp_path / STATE, lambda tensors: tensors.pop(f"{OLD}.ct"))
    refused(tmp_path, STATE, f"{OLD}.ct_scaled is missing")
