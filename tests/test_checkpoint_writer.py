"""The writer: what is written is what was read, in shards, with index and sums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hlwq_files import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_format import weights as tensors
from quantizing import contents, refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.checkpoint.shard import Group, TensorPlan, shards_of, write_shard
from vllm_hlwq.codec import SEARCH, BlockCoder, codebook, dequantize_matrix, quantize_matrix

CODE = BlockCoder(codebook("C", 5), 128, torch.device("cpu"))


# What is written.


def test_every_value_is_the_codec_s_or_the_source_s(varied_source: Path, varied_coded: Path) -> None:
    original, reader = tensors(varied_source), HlwqSource(varied_coded)
    assert reader.parameters.keys() == original.keys()
    squared = energy = 0.0
    for name, tensor in original.items():
        parameter = reader.parameters[name]
        assert parameter.shape == tuple(tensor.shape)
        rows = reader.rows(name, 0, parameter.rows).view(tensor.shape)
        if name not in reader.matrices:
            assert parameter.dtype == tensor.dtype
            assert torch.equal(rows, tensor)
            continue
        for read, matrix in zip(rows.view(-1, *tensor.shape[-2:]), tensor.view(-1, *tensor.shape[-2:]), strict=True):
            assert torch.equal(read, dequantize_matrix(quantize_matrix(matrix, CODE, SEARCH), CODE))
        squared += float((rows.double() - tensor.double()).square().sum())
        energy += float(tensor.double().square().sum())
    stated = json.loads((varied_coded / "hlwq_config.json").read_text())
    assert stated["coded"].keys() == reader.matrices.keys()
    assert stated["kept"].keys() == original.keys() - reader.matrices.keys()
    assert stated["relative_mse"] == pytest.approx(squared / energy, rel=0.01)  # measured before rounding to BF16
    assert stated["original_bytes"] == sum(t.nbytes for t in original.values())
    assert stated["bytes"] == sum(t.nbytes for t in tensors(varied_coded).values())


def test_shards_index_and_sums(varied_source: Path, varied_coded: Path) -> None:
    index = json.loads((varied_coded / "model.safetensors.index.json").read_text())
    sums = json.loads((varied_coded / "hlwq_sha256.json").read_text())
    files = sorted(varied_coded.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))
    ]
    assert len(files) > 3
    held = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - the handle is no mapping
                held[name] = file.name
                data = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                assert sums[name]["sha256"] == hashlib.sha256(data).hexdigest()
    assert index["weight_map"] == held
    assert sums.keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(varied_coded).values())
    config = json.loads((varied_coded / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "polarengine", "format": "hlwq-q5", "bits": 5, "block_size": 128, "norm_dtype": "float16",
        "packing": "msb", "rotation": "sylvester", "codebook": "explicit", "modules_to_not_convert": ["norm", "router"],
    }  # fmt: skip
    assert config.pop("auto_map") == {"AutoConfig": "hlwq_auto.HLWQAutoConfig"}
    assert config == json.loads((varied_source / "config.json").read_text())
    others = {path.name for path in varied_coded.iterdir()} - {file.name for file in files}
    assert others == {
        "config.json", "generation_config.json", "hlwq_auto.py", "hlwq_config.json", "hlwq_sha256.json",
        "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip


def test_the_source_is_untouched_and_one_shard_needs_no_index(varied_source: Path, tmp_path: Path) -> None:
    before = contents(varied_source)
    quantize(varied_source, tmp_path / "out")
    assert contents(varied_source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").glob("model*")} == {"model.safetensors"}


def test_kept_parameters(varied_source: Path, tmp_path: Path) -> None:
    patterns = ["*embed_tokens*", "*.layers.0.self_attn.[qk]_proj.weight"]
    stated = quantize(varied_source, tmp_path / "out", keep=patterns)
    names = ["model.embed_tokens.weight", *(f"model.layers.0.self_attn.{p}_proj.weight" for p in "kq")]
    by_name = {name: reason for name, reason in stated.kept.items() if reason.startswith("named by --keep")}
    assert by_name == {names[0]: f"named by --keep {patterns[0]}"} | dict.fromkeys(
        names[1:], f"named by --keep {patterns[1]}"
    )
    assert json.loads((tmp_path / "out/hlwq_config.json").read_text())["kept"] == stated.kept
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == sorted(
        ["norm", "router", *(name.removesuffix(".weight") for name in names)]
    )
    original, written = tensors(varied_source), tensors(tmp_path / "out")
    assert all(torch.equal(written[name], original[name]) for name in names)
    assert "model.layers.0.self_attn.v_proj.weight__packed" in written


@pytest.mark.parametrize("pattern", ["*no_such_thing*", "*norm*"], ids=["nothing", "never coded anyway"])
def test_a_pattern_to_keep_that_matches_nothing_codable_is_refused(
    varied_source: Path, tmp_path: Path, pattern: str
) -> None:
    message = refusal(varied_source, tmp_path / "out", keep=["*embed_tokens*", pattern])
    assert message.startswith(f"--keep {pattern}: matches no parameter of {varied_source} that would be coded; ")
    assert not list(tmp_path.iterdir())


def test_patterns_that_leave_nothing_to_code_are_refused(varied_source: Path, tmp_path: Path) -> None:
    message = refusal(varied_source, tmp_path / "out", keep=["*weight*", "*experts*"])
    assert message == f"--keep *weight* *experts*: leaves nothing of {varied_source} to code; keep less"
    assert not list(tmp_path.iterdir())


def test_a_coded_model_is_not_coded_again(varied_coded: Path, tmp_path: Path) -> None:
    assert "is coded with HLWQ already" in refusal(varied_coded, tmp_path / "out")
    bare = tmp_path / "bare"  # as the published files, whose config.json may be the original's
    shutil.copytree(varied_coded, bare)
    (bare / "config.json").unlink()
    (bare / "hlwq_config.json").unlink()
    assert "is coded with HLWQ already" in refusal(bare, tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_cannot_be_coded_leave_nothing_that_looks_whole(tmp_path: Path, value: float) -> None:
    weight = torch.ones(8, 256, dtype=torch.bfloat16)
    weight[5, 3] = value
    (tmp_path / "model").mkdir()
    save_file({"up_proj.weight": weight}, tmp_path / "model/model.safetensors")
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert message.startswith(f"{tmp_path}/model/model.safetensors: up_proj.weight holds NaN, inf")
    assert not (tmp_path / "out").exists()
    assert {path.suffix for path in (tmp_path / "out.partial").iterdir()} == {".json"}


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_kept_parameters_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    (tmp_path / "model").mkdir()
    norm = torch.ones(128, dtype=torch.bfloat16)
    norm[7] = value
    weights = {"up_proj.weight": torch.randn(64, 128).bfloat16(), "norm.weight": norm}
    save_file(weights, tmp_path / "model/model.safetensors")
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert message.startswith(f"{tmp_path}/model/model.safetensors: tensor norm.weight holds NaN or inf; ")
    assert not (tmp_path / "out").exists()


DTYPES = [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.int64]
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=6), pieces=st.integers(1, 3))
def test_a_shard_reads_back_through_safetensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int]]], pieces: int
) -> None:
    wanted = {}
    for number, (dtype, shape) in enumerate(shapes):
        size = dtype.itemsize * torch.Size(shape).numel()
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
        wanted[f"t{number}"] = data.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)

    def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        for plan in group.tensors:
            for piece in wanted[plan.name].reshape(-1).chunk(pieces):
                yield plan.name, piece

    plans = [Group(name, (TensorPlan(name, t.dtype, tuple(t.shape)),)) for name, t in wanted.items()]
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    write_shard(path, plans, produce)
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
        assert found[name].data_ptr() % tensor.dtype.itemsize == 0


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_groups_are_dealt_in_order_and_shards_are_as_full_as_they_may_be(sizes: list[int], limit: int) -> None:
    groups = [Group(str(i), (TensorPlan(str(i), torch.uint8, (size,)),)) for i, size in enumerate(sizes)]
    shards = shards_of(groups, limit)
    assert [group for shard in shards for group in shard] == groups
    totals = [sum(group.bytes for group in shard) for shard in shards]
    assert all(shard and (total <= limit or len(shard) == 1) for shard, total in zip(shards, totals, strict=True))
    assert all(total + after[0].bytes > limit for total, after in zip(totals, shards[1:], strict=False))


def test_a_model_with_code_of_its_own_keeps_it(varied_source: Path, tmp_path: Path) -> None:
    """Ours would stand in the place of its configuration class."""
    source = tmp_path / "source"
    shutil.copytree(varied_source, source)
    own = {"AutoConfig": "configuration_own.OwnConfig"}
    edit_json(source / "config.json", lambda config: config.update(auto_map=own))
    quantize(source, tmp_path / "out", fit="norm")
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == own
    assert not (tmp_path / "out/hlwq_auto.py").exists()
    assert HlwqSource(tmp_path / "out").config()["auto_map"] == own
