"""Interrupted conversions, and places that may not be written to: whole or not there, and no work is lost."""

from __future__ import annotations

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

import pytest
import torch
from int4_format import weights as tensors
from quantizing import SHARD_BYTES, contents, refusal
from safetensors.torch import save_file
from typer.testing import CliRunner

from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.shard import Group, TensorPlan
from vllm_hlwq.checkpoint.writer import FolderWriter
from vllm_hlwq.cli import app
from vllm_hlwq.errors import CheckpointError

CHILD = "import sys; from pathlib import Path; from vllm_hlwq.checkpoint.quantize import quantize; " + (
    f"quantize(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes={SHARD_BYTES})"
)


def progress_of(work: Path) -> dict[str, Any]:
    return json.loads((work / ".hlwq_progress.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def killed(varied_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out.partial`` of a process that was killed when two shards were finished."""
    out = tmp_path_factory.mktemp("killed") / "out"
    work = out.with_name("out.partial")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(varied_source), str(out)])
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
    varied_source: Path, varied_coded: Path, partial: Path, tmp_path: Path
) -> None:
    finished = {name: (partial / name).stat().st_ino for name in progress_of(partial)["shards"]}
    (partial / "model-00009-of-00009.safetensors.tmp").write_bytes(b"half a shard")
    quantize(varied_source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert len(finished) < len(list((tmp_path / "out").glob("*.safetensors")))
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished
    assert contents(tmp_path / "out") == contents(varied_coded)
    assert not partial.exists()


@pytest.mark.parametrize("position", [40, -1], ids=["header", "data"])
def test_a_byte_that_changed_in_a_finished_shard_is_noticed(
    varied_source: Path, varied_coded: Path, partial: Path, tmp_path: Path, position: int
) -> None:
    shard = partial / min(progress_of(partial)["shards"])
    data = bytearray(shard.read_bytes())
    data[position] ^= 4
    shard.write_bytes(data)
    message = refusal(varied_source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert message.startswith(f"{shard}: was finished by an earlier attempt and is damaged now; remove it and run the")
    assert not (tmp_path / "out").exists()
    shard.unlink()
    quantize(varied_source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(varied_coded)


def test_a_lost_shard_is_made_again(varied_source: Path, varied_coded: Path, partial: Path, tmp_path: Path) -> None:
    (partial / max(progress_of(partial)["shards"])).unlink()
    quantize(varied_source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(varied_coded)


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"codebook_name": "A"}, {"fit": "norm"}, {"keep": ["*embed_tokens*"]}, {"shard_bytes": 1}]
)
def test_other_options_do_not_take_up_the_conversion(
    varied_source: Path, partial: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = contents(partial)
    message = refusal(varied_source, tmp_path / "out", **{"shard_bytes": SHARD_BYTES} | options)
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


def kill_at(call: str, place: str, source: Path, out: Path) -> None:
    """Convert in a process that is killed when it is about to make a call for something of this name."""
    code = (
        "import os, signal, sys; from pathlib import Path; from vllm_hlwq.checkpoint.quantize import quantize\n"
        "def kill(event, arguments):\n"
        f"    if event == {call!r} and str(arguments[0]).endswith({place!r}):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(kill)\n"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("call", "place", "left"),
    [
        ("os.rename", ".hlwq_progress.json.tmp", "out.partial/.hlwq_progress.json.tmp"),  # the very first record
        ("os.remove", "out/.hlwq_progress.json", "out/.hlwq_progress.json"),  # named already, not finished
    ],
)
def test_a_kill_at_either_end_is_taken_up(
    varied_source: Path, tmp_path: Path, call: str, place: str, left: str
) -> None:
    quantize(varied_source, tmp_path / "wanted")
    kill_at(call, place, varied_source, tmp_path / "out")
    assert (tmp_path / left).exists()
    if left.startswith("out/"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            quantize(varied_source, tmp_path / "out", bits=4)
    quantize(varied_source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert not (tmp_path / "out.partial").exists()


def test_a_conversion_that_is_being_finished_is_left_alone(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", {}, [plan("a")])
    writer.run(produce, lambda _: None)
    writer.work.rename(writer.out)  # as it does last but one
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        FolderWriter(tmp_path / "out", {}, [plan("a")])
    assert (tmp_path / "out/model.safetensors").exists()
    writer.release()
    again = FolderWriter(tmp_path / "out", {}, [plan("a")])
    again.run(lambda _: pytest.fail("a finished shard was made again"), lambda _: None)
    again.finish({"config.json": {}}, [])
    assert tensors(tmp_path / "out").keys() == {"a"}


def test_what_the_source_has_no_longer_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    writer = FolderWriter(tmp_path / "out", {}, [plan("a")])
    writer.run(produce, lambda _: None)
    with pytest.raises(CheckpointError, match="no-such-file"):
        writer.finish({"config.json": {}}, [tmp_path / "old.txt", tmp_path / "no-such-file"])
    assert (tmp_path / "out.partial/old.txt").exists()
    again = FolderWriter(tmp_path / "out", {}, [plan("a")])
    again.run(produce, lambda _: None)
    again.finish({"config.json": {}}, [])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "hlwq_sha256.json", "model.safetensors",
    ]  # fmt: skip


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


def test_an_unreadable_record_of_progress_is_refused(varied_source: Path, partial: Path, tmp_path: Path) -> None:
    record = partial / ".hlwq_progress.json"
    for damage in ("{", "[]", '{"task": {}, "shards": {"a": 1}}'):
        record.write_text(damage)
        message = refusal(varied_source, tmp_path / "out", shard_bytes=SHARD_BYTES)
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
def test_what_is_in_the_way_stays_and_is_named(varied_source: Path, tmp_path: Path, kind: str, place: str) -> None:
    occupied(kind, tmp_path / place, tmp_path / "elsewhere")
    message = refusal(varied_source, tmp_path / "out")
    assert message.startswith(f"{tmp_path / place}: ")
    assert message.endswith("; choose another" if place == "out" else "remove it")
    assert {path.name for path in tmp_path.iterdir()} <= {place, "elsewhere"}
    if kind == "file":
        assert (tmp_path / place).read_text() == "mine"
    elif kind == "folder with a file":
        assert [path.name for path in (tmp_path / place).iterdir()] == ["mine"]


def test_the_root_folder_is_refused_as_any_that_is_not_empty() -> None:
    with pytest.raises(CheckpointError, match=r"^/: exists and is not an empty folder; choose another$"):
        FolderWriter(Path("/"), {}, [])


def test_an_empty_folder_is_filled(varied_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    quantize(varied_source, tmp_path / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize(varied_source, Path())
    assert contents(tmp_path / "here") == contents(tmp_path / "out")


def test_a_folder_that_cannot_be_made_needs_another_place_not_room(varied_source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    message = refusal(varied_source, tmp_path / "file/out", shard_bytes=SHARD_BYTES)
    assert message == f"{tmp_path}/file/out.partial: cannot be written (Not a directory); choose another folder"
    assert (tmp_path / "file").read_text() == "kept"


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


def test_a_full_disk_is_one_clear_error_and_room_is_the_remedy(
    varied_source: Path, varied_coded: Path, small_disk: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 600_000)
    message = refusal(varied_source, small_disk / "out", shard_bytes=SHARD_BYTES)
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
    quantize(varied_source, small_disk / "out", shard_bytes=SHARD_BYTES)
    assert contents(small_disk / "out") == contents(varied_coded)
    assert {name: (small_disk / "out" / name).stat().st_ino for name in kept} == kept


def test_the_command_on_a_full_disk(varied_source: Path, small_disk: Path) -> None:
    command = ["quantize", str(varied_source), str(small_disk / "out")]
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"hlwq: {small_disk}/out.partial/model.safetensors: cannot be written (No space")
    assert refused.stderr.count("\n") == 1
    (small_disk / "filler").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, ["verify", str(small_disk / "out")]).exit_code == 0


def test_a_mount_point_is_refused_before_the_work(varied_source: Path, small_disk: Path) -> None:
    assert refusal(varied_source, small_disk).startswith(f"{small_disk}: is a mount point")
