"""Damaged, missing and misleading files of a checkpoint: each refused in one line that names it and the remedy."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hlwq_files import (
    CONFIG,
    INDEX,
    O_PROJ,
    Q_PROJ,
    STATE,
    Tensors,
    dotted,
    edit_json,
    edit_tensors,
    polar_state,
    read_all,
    refused,
    shard_of,
    weights,
    write_json,
    write_state,
)
from safetensors.torch import save_file

from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.errors import CheckpointError


@pytest.fixture(scope="module")
def state() -> Tensors:
    return polar_state(weights(), dotted)[0]


@pytest.fixture
def copy(hlwq_coded: Path, tmp_path: Path) -> Path:
    """Our writer's form, to damage."""
    return Path(shutil.copytree(hlwq_coded, tmp_path / "copy"))


def test_truncated(copy: Path) -> None:
    file = shard_of(copy, f"{O_PROJ}__packed")
    os.truncate(file, file.stat().st_size - 3)
    refused(copy, file.name, "truncated: tensor ")


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(60), b"{}", b"\xff" * 64])
def test_wrong_magic(copy: Path, content: bytes) -> None:
    file = shard_of(copy, f"{O_PROJ}__packed")
    file.write_bytes(content)
    refused(copy, file.name, "not a safetensors file, or its header is damaged")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle(protocol: int | str, name: str, tmp_path: Path) -> None:
    if protocol == "zip":
        torch.save({"weight": torch.zeros(3)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"weight": [1, 2]}, protocol=protocol))
    refused(tmp_path, name, "a pickle, not a safetensors file")


def test_an_index_of_pickles(copy: Path) -> None:
    edit_json(copy / INDEX, lambda index: index["weight_map"].update({"a": "pytorch_model.bin"}))
    refused(copy, "pytorch_model.bin", "a pickle, not a safetensors file")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "holds no safetensors file")
    refused(tmp_path / "absent", "absent", "does not exist")
    refused(tmp_path / ("n" * 300), "does not exist")


def test_a_model_that_is_not_coded(hlwq_base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no HLWQ-coded tensor; make one with `hlwq quantize`"):
        HlwqSource(hlwq_base)


def test_a_trace_of_routing_is_no_model() -> None:
    trace = Path(__file__).parent.parent / "examples/tiny_moe/trace.safetensors"
    refused(trace, str(trace), "a trace of routing, which `hlwq simulate` reads")


def test_a_missing_shard(copy: Path) -> None:
    file = shard_of(copy, f"{O_PROJ}__packed")
    file.unlink()
    refused(copy, file.name, "listed in " + INDEX)


def test_a_tensor_in_another_shard_than_the_index_says(copy: Path) -> None:
    name = f"{O_PROJ}__packed"
    right = shard_of(copy, name)
    wrong = next(file for file in sorted(copy.glob("*.safetensors")) if file != right)
    edit_json(copy / INDEX, lambda index: index["weight_map"].update({name: wrong.name}))
    refused(copy, wrong.name, right.name, name)


def test_a_tensor_in_two_shards(copy: Path) -> None:
    name = f"{O_PROJ}__norms"
    right = shard_of(copy, name)
    other = next(file for file in sorted(copy.glob("*.safetensors")) if file != right)
    edit_tensors(other, lambda tensors: tensors.update({name: torch.zeros(136, 1)}))
    refused(copy, right.name, other.name, name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"), ("[1]", "holds no JSON object"), ("{}", "no weight_map"),
        ('{"weight_map": [1]}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"), ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)  # fmt: skip
def test_an_unreadable_index(copy: Path, text: str, problem: str) -> None:
    (copy / INDEX).write_text(text)
    refused(copy, INDEX, problem)


def test_two_indices(copy: Path) -> None:
    shutil.copy(copy / INDEX, copy / "other.safetensors.index.json")
    refused(copy, INDEX, "other.safetensors.index.json", "keep the one that is meant")


def test_coded_tensors_beside_an_index_that_does_not_list_them(copy: Path, state: Tensors) -> None:
    refused(write_state(copy, state), STATE, f"beside {INDEX}, which does not list it")


# Paths


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/tmp/out.safetensors", "sub/out.safetensors", "..", "", "a.gguf"]
)
def test_an_index_that_leads_out_of_the_folder(name: str, copy: Path) -> None:
    save_file({"a": torch.zeros(1)}, copy.parent / "out.safetensors")
    edit_json(copy / INDEX, lambda index: index["weight_map"].update({"a": name}))
    refused(copy, INDEX, repr(name), "is no safetensors file of this folder")


@pytest.mark.parametrize("name", ["n" * 300 + ".safetensors", "a\0.safetensors", "\ud800.safetensors"])
def test_an_index_with_impossible_names(name: str, copy: Path) -> None:
    edit_json(copy / INDEX, lambda index: index["weight_map"].update({"a": name}))
    refused(copy, "listed in " + INDEX)


@pytest.mark.parametrize("file", ["shard", "config.json", "hlwq_config.json", "hlwq_sha256.json", INDEX])
def test_a_link_out_of_the_folder(file: str, copy: Path) -> None:
    path = shard_of(copy, f"{O_PROJ}__packed") if file == "shard" else copy / file
    path.rename(copy.parent / "elsewhere")
    path.symlink_to(copy.parent / "elsewhere")
    refused(copy, path.name, "a link that leads out of its folder")


@pytest.mark.parametrize("file", ["config.json", "hlwq_config.json", "hlwq_sha256.json"])
@pytest.mark.parametrize("kind", ["circle", "dangling", "folder", "pipe"])
def test_what_is_no_file(kind: str, file: str, copy: Path) -> None:
    path = copy / file
    path.unlink()
    if kind in ("circle", "dangling"):
        path.symlink_to(path.name if kind == "circle" else "absent")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    refused(copy, file)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_shard_that_is_no_file(kind: str, copy: Path) -> None:
    path = shard_of(copy, f"{O_PROJ}__packed")
    path.unlink()
    (path.mkdir if kind == "folder" else lambda: os.mkfifo(path))()
    refused(copy, path.name, "no ordinary file")


def test_links_within_the_folder_and_to_the_hubs_blobs_are_followed(hlwq_coded: Path, tmp_path: Path) -> None:
    """The layout of the Hugging Face cache."""
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(hlwq_coded.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    found, wanted = read_all(HlwqSource(snapshot)), read_all(HlwqSource(hlwq_coded))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# JSON


@pytest.mark.parametrize("file", ["config.json", "hlwq_config.json", "hlwq_sha256.json", INDEX])
def test_a_key_named_twice(file: str, copy: Path) -> None:
    text = (copy / file).read_text().replace("{", '{"twice": 1, "twice": 2, ', 1)
    (copy / file).write_text(text)
    refused(copy, file, "names 'twice' twice")


def test_a_tensor_named_twice_in_a_header(state: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    """safetensors itself takes the last."""
    file = write_state(tmp_path, state) / STATE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    key = f"{Q_PROJ}__norms"
    entry = re.search(rb'"%s":\{[^}]*\}' % key.encode(), header)
    twice = header.rstrip()[:-1] + b"," + entry[0].replace(b"F16", b"I16") + b"}"
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + length :])
    refused(tmp_path, STATE, f"names '{key}' twice", base=hlwq_base, codebook="A")


@pytest.mark.parametrize(
    ("file", "key", "value", "problem"),
    [
        ("config.json", "quant_method", "gptq", "quant_method is 'gptq'"),
        ("config.json", "packing", "lsb", "packing is 'lsb'"),
        ("config.json", "rotation", "random", "rotation is 'random'"),
        ("config.json", "norm_dtype", "float32", "norm_dtype is 'float32'"),
        ("config.json", "bits", 4, "bits is 5 in hlwq_config.json, 4 in config.json"),
        ("config.json", "bits", "5", "bits is '5'"),
        ("config.json", "block_size", 64, "block_size is 128 in hlwq_config.json, 64 in config.json"),
        ("hlwq_config.json", "bits", 55, "bits is 55"),
        ("hlwq_config.json", "kept", [], "kept is []"),
    ],
)
def test_settings_that_no_reader_can_honour(file: str, key: str, value: object, problem: str, copy: Path) -> None:
    def change(content: dict) -> None:
        (content["quantization_config"] if file == "config.json" else content)[key] = value

    edit_json(copy / file, change)
    refused(copy, problem)


def test_a_quantization_config_that_is_none(copy: Path, hlwq_base: Path) -> None:
    edit_json(copy / "config.json", lambda content: content.update(quantization_config=["polarengine"]))
    refused(copy, "config.json", "['polarengine']")
    write_json(copy / "config.json", CONFIG | {"quantization_config": {"quant_method": "awq"}})
    refused(hlwq_base, "quantised already ('awq')", base=copy)


# Sums


def test_a_flipped_bit_is_found_by_its_sum(copy: Path) -> None:
    name = f"{O_PROJ}__packed"
    edit_tensors(shard_of(copy, name), lambda tensors: tensors[name].__setitem__(77, tensors[name][77] ^ 1))
    refused(copy, shard_of(copy, name).name, name, "its SHA-256 is not the listed one")


@pytest.mark.parametrize("change", [dict.popitem, lambda sums: sums.update(more={"sha256": ""}), dict.clear])
def test_a_list_of_other_tensors(change: Callable[[dict], object], copy: Path) -> None:
    edit_json(copy / "hlwq_sha256.json", change)
    refused(copy, "hlwq_sha256.json", "tensor ")
