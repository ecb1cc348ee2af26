"""The writer: what is written is what was read, whole or not there at all, and an interruption costs one shard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.checkpoint.shard import Group, TensorPlan, shards_of, write_shard
from vllm_hlwq.checkpoint.writer import FolderWriter
from vllm_hlwq.cli import app
from vllm_hlwq.codec import SEARCH, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.errors import CheckpointError

SHARD_BYTES = 100_000
CODE = BlockCoder(codebook("C", 5), 128, torch.device("cpu"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose expert stacks, dense matrices and norms all are there, with files to copy beside them."""
    out = tmp_path_factory.mktemp("source")
    checkpoints.write(checkpoints.gemma4_config(num_experts=4, top_k_experts=2), out, varied=True)
    (out / "tokenizer.json").write_text("{}")
    (out / "README.md").write_text("the original's card")
    return out


@pytest.fixture(scope="module")
def coded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, coded without an interruption."""
    out = tmp_path_factory.mktemp("coded") / "out"
    quantize(source, out, shard_bytes=SHARD_BYTES)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        quantize(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is written.


def test_every_value_is_the_codec_s_or_the_source_s(source: Path, coded: Path) -> None:
    original, reader = tensors(source), HlwqSource(coded)
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
    stated = json.loads((coded / "hlwq_config.json").read_text())
    assert stated["coded"].keys() == reader.matrices.keys()
    assert stated["kept"].keys() == original.keys() - reader.matrices.keys()
    assert stated["relative_mse"] == pytest.approx(squared / energy, rel=0.01)  # measured before rounding to BF16
    assert stated["original_bytes"] == sum(t.nbytes for t in original.values())
    assert stated["bytes"] == sum(t.nbytes for t in tensors(coded).values())


def test_shards_index_and_sums(source: Path, coded: Path) -> None:
    index = json.loads((coded / "model.safetensors.index.json").read_text())
    sums = json.loads((coded / "hlwq_sha256.json").read_text())
    files = sorted(coded.glob("*.safetensors"))
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
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(coded).values())
    config = json.loads((coded / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "polarengine", "format": "hlwq-q5", "bits": 5, "block_size": 128, "norm_dtype": "float16",
        "packing": "msb", "rotation": "sylvester", "codebook": "explicit", "modules_to_not_convert": ["norm", "router"],
    }  # fmt: skip
    assert config == json.loads((source / "config.json").read_text())
    others = {path.name for path in coded.iterdir()} - {file.name for file in files}
    assert others == {
        "config.json", "generation_config.json", "hlwq_config.json", "hlwq_sha256.json",
        "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip


def test_the_source_is_untouched_and_one_shard_needs_no_index(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    quantize(source, tmp_path / "out")
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").glob("model*")} == {"model.safetensors"}


def test_kept_parameters(source: Path, tmp_path: Path) -> None:
    patterns = ["*embed_tokens*", "*.layers.0.self_attn.[qk]_proj.weight"]
    stated = quantize(source, tmp_path / "out", keep=patterns)
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
    original, written = tensors(source), tensors(tmp_path / "out")
    assert all(torch.equal(written[name], original[name]) for name in names)
    assert "model.layers.0.self_attn.v_proj.weight__packed" in written


@pytest.mark.parametrize("pattern", ["*no_such_thing*", "*norm*"], ids=["nothing", "never coded anyway"])
def test_a_pattern_to_keep_that_matches_nothing_codable_is_refused(source: Path, tmp_path: Path, pattern: str) -> None:
    message = refusal(source, tmp_path / "out", keep=["*embed_tokens*", pattern])
    assert message.startswith(f"--keep {pattern}: matches no parameter of {source} that would be coded; ")
    assert not list(tmp_path.iterdir())


def test_a_coded_model_is_not_coded_again(coded: Path, tmp_path: Path) -> None:
    assert "is coded with HLWQ already" in refusal(coded, tmp_path / "out")
    bare = tmp_path / "bare"  # as the published files, whose config.json may be the original's
    shutil.copytree(coded, bare)
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


# Interruptions.

CHILD = "import sys; from pathlib import Path; from vllm_hlwq.checkpoint.quantize import quantize; " + (
    f"quantize(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes={SHARD_BYTES})"
)


def progress_of(work: Path) -> dict[str, Any]:
    return json.loads((work / ".hlwq_progress.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def killed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out.partial`` of a process that was killed when two shards were finished."""
    out = tmp_path_factory.mktemp("killed") / "out"
    work = out.with_name("out.partial")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(out)])
    deadline = time.monotonic() + 120
    while not ((work / ".hlwq_progress.json").is_file() and len(progress_of(work)["shards"]) >= 2):
        assert child.poll() is None, "the conversion ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    assert not (work / "config.json").exists()
    return work


@pytest.fixture
def partial(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path / "out.partial")
    return tmp_path / "out.partial"


def test_the_same_command_keeps_finished_shards_and_ends_with_the_same_bytes(
    source: Path, coded: Path, partial: Path, tmp_path: Path
) -> None:
    finished = {name: (partial / name).stat().st_ino for name in progress_of(partial)["shards"]}
    (partial / "model-00009-of-00009.safetensors.tmp").write_bytes(b"half a shard")
    quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert len(finished) < len(list((tmp_path / "out").glob("*.safetensors")))
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished
    assert contents(tmp_path / "out") == contents(coded)
    assert not partial.exists()


@pytest.mark.parametrize("position", [40, -1], ids=["header", "data"])
def test_a_byte_that_changed_in_a_finished_shard_is_noticed(
    source: Path, coded: Path, partial: Path, tmp_path: Path, position: int
) -> None:
    shard = partial / min(progress_of(partial)["shards"])
    data = bytearray(shard.read_bytes())
    data[position] ^= 4
    shard.write_bytes(data)
    message = refusal(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert message.startswith(f"{shard}: was finished by an earlier attempt and is damaged now; remove it and run the")
    assert not (tmp_path / "out").exists()
    shard.unlink()
    quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(coded)


def test_a_lost_shard_is_made_again(source: Path, coded: Path, partial: Path, tmp_path: Path) -> None:
    (partial / max(progress_of(partial)["shards"])).unlink()
    quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(coded)


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"codebook_name": "A"}, {"fit": "norm"}, {"keep": ["*embed_tokens*"]}, {"shard_bytes": 1}]
)
def test_other_options_do_not_take_up_the_conversion(
    source: Path, partial: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = contents(partial)
    message = refusal(source, tmp_path / "out", **{"shard_bytes": SHARD_BYTES} | options)
    assert message.startswith(f"{partial}: holds an unfinished conversion of another source or with other options")
    assert contents(partial) == before


def test_a_source_that_changed_between_attempts_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    state = {name: torch.ones(8, 256, dtype=torch.bfloat16) for name in ("a.weight", "b.weight")}
    save_file(state | {"b.weight": torch.full((8, 256), torch.nan).bfloat16()}, model / "model.safetensors")
    assert "b.weight holds NaN" in refusal(model, tmp_path / "out", shard_bytes=1)
    assert progress_of(tmp_path / "out.partial")["shards"]
    save_file(state, model / "model.safetensors")  # mended, but a.weight may be another one too
    message = refusal(model, tmp_path / "out", shard_bytes=1)
    assert message.startswith(f"{tmp_path}/out.partial: holds an unfinished conversion of another source")
    shutil.rmtree(tmp_path / "out.partial")
    quantize(model, tmp_path / "out", shard_bytes=1)
    assert tensors(tmp_path / "out")["b.weight__norms"].isfinite().all()


def plan(name: str) -> Group:
    return Group(name, (TensorPlan(name, torch.uint8, (4,)),))


def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
    yield group.parameter, torch.arange(4, dtype=torch.uint8)


def test_an_interruption_while_the_last_files_are_written_is_taken_up(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", {}, [plan("a"), plan("b")], shard_bytes=4)
    writer.run(produce, lambda _: None)
    with pytest.raises(CheckpointError, match=r"no-such-file: cannot be written \(No such file or directory\)"):
        writer.finish({"config.json": {}}, [tmp_path / "no-such-file"])
    assert not (tmp_path / "out").exists()
    again = FolderWriter(tmp_path / "out", {}, [plan("a"), plan("b")], shard_bytes=4)
    again.run(lambda _: pytest.fail("a finished shard was made again"), lambda _: None)
    again.finish({"config.json": {}}, [])
    assert tensors(tmp_path / "out").keys() == {"a", "b"}


def test_a_shard_that_changes_after_it_was_written_is_never_taken_for_done(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", {}, [plan("a")])
    writer.run(produce, lambda _: None)
    with (tmp_path / "out.partial/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="tensor a is damaged"):
        writer.finish({}, [])
    assert not (tmp_path / "out").exists()


def test_two_conversions_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    first = FolderWriter(tmp_path / "out", {}, [plan("a")])
    with pytest.raises(CheckpointError, match=r"out\.partial: another conversion is writing there"):
        FolderWriter(tmp_path / "out", {}, [plan("a")])
    first.run(produce, lambda _: None)
    first.finish({}, [])
    assert tensors(tmp_path / "out")["a"].tolist() == [0, 1, 2, 3]


def test_an_unreadable_record_of_progress_is_refused(source: Path, partial: Path, tmp_path: Path) -> None:
    record = partial / ".hlwq_progress.json"
    for damage in ("{", "[]", '{"task": {}, "shards": {"a": 1}}'):
        record.write_text(damage)
        message = refusal(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
        assert message.startswith(f"{partial}: cannot be taken up (")
        assert message.endswith("; remove it")


# Where it may not write.


def occupied(kind: str, path: Path, elsewhere: Path) -> None:
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        elsewhere.mkdir()
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(elsewhere)
    else:
        path.mkdir()
        (path / "mine").write_text("mine")


@pytest.mark.parametrize("kind", ["file", "folder with a file", "link", "dangling link"])
@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_what_is_in_the_way_stays_and_is_named(source: Path, tmp_path: Path, kind: str, place: str) -> None:
    occupied(kind, tmp_path / place, tmp_path / "elsewhere")
    message = refusal(source, tmp_path / "out")
    assert message.startswith(f"{tmp_path / place}: ")
    assert message.endswith("remove it")
    assert {path.name for path in tmp_path.iterdir()} <= {place, "elsewhere"}
    if kind == "file":
        assert (tmp_path / place).read_text() == "mine"
    elif kind == "folder with a file":
        assert [path.name for path in (tmp_path / place).iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    quantize(source, tmp_path / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize(source, Path())
    assert contents(tmp_path / "here") == contents(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if mounted is None or mounted.returncode:
        why = "only root may" if mounted is None else mounted.stderr.strip()
        pytest.skip(f"a small file system cannot be mounted here: {why}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_clear_error_and_room_is_the_remedy(source: Path, coded: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 600_000)
    message = refusal(source, small_disk / "out", shard_bytes=SHARD_BYTES)
    assert message.startswith(f"{small_disk}/out.partial/model-0")
    assert message.endswith(
        ": cannot be written (No space left on device); make room or choose another folder, then run the same "
        "command: finished shards are kept"
    )
    assert not (small_disk / "out").exists()
    finished = progress_of(small_disk / "out.partial")["shards"]
    kept = {name: (small_disk / "out.partial" / name).stat().st_ino for name in finished}
    assert kept
    filler.unlink()
    quantize(source, small_disk / "out", shard_bytes=SHARD_BYTES)
    assert contents(small_disk / "out") == contents(coded)
    assert {name: (small_disk / "out" / name).stat().st_ino for name in kept} == kept


def test_the_command_on_a_full_disk(source: Path, small_disk: Path) -> None:
    command = ["quantize", str(source), str(small_disk / "out")]
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"hlwq: {small_disk}/out.partial/model.safetensors: cannot be written (No space")
    assert refused.stderr.count("\n") == 1
    (small_disk / "filler").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, ["verify", str(small_disk / "out")]).exit_code == 0


def test_a_mount_point_is_refused_before_the_work(source: Path, small_disk: Path) -> None:
    assert refusal(source, small_disk).startswith(f"{small_disk}: is a mount point")
