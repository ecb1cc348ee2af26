"""Which checkpoint a folder holds: copies are the same, whatever was trained or written since is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vllm_hlwq.checkpoint_identity import SAMPLE_BYTES, SAMPLES, CheckpointIdentity, checkpoint_identity

DATA_BYTES = 4 * SAMPLES * SAMPLE_BYTES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with one tensor, three quarters of which are in no sample."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensor = {"w": {"dtype": "U8", "shape": [DATA_BYTES], "data_offsets": [0, DATA_BYTES]}}
    header = json.dumps(tensor).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(DATA_BYTES))
    return folder


def identity(folder: Path) -> CheckpointIdentity:
    found = checkpoint_identity(folder)
    assert found is not None
    return found


def change(model: Path, place: int, keep_time: bool = False) -> None:
    """Write another byte into the file, at a place counted from its end."""
    file = model / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-place, os.SEEK_END)
        opened.write(b"x")
    # Past the clock's resolution, so that a written file is seen to be one.
    written = before.st_mtime_ns + (0 if keep_time else 10**9)
    os.utime(file, ns=(before.st_atime_ns, written))


def test_a_copy_is_the_same_model_written_at_another_time(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)
    os.utime(tmp_path / "copy/model.safetensors", ns=(0, 0))
    one, other = identity(model), identity(tmp_path / "copy")
    assert one.contents == other.contents
    assert one.times != other.times
    shutil.copytree(model, tmp_path / "exact")  # keeps times
    assert identity(tmp_path / "exact") == one


@pytest.mark.parametrize("place", [1, SAMPLE_BYTES, DATA_BYTES, DATA_BYTES - SAMPLE_BYTES + 1])
def test_a_change_in_a_sample_is_another_model(model: Path, place: int) -> None:
    before = identity(model)
    change(model, place)
    assert identity(model).contents != before.contents


def test_a_change_between_samples_is_told_by_its_time(model: Path) -> None:
    before = identity(model)
    change(model, DATA_BYTES - SAMPLE_BYTES)
    assert identity(model).contents == before.contents
    assert identity(model).times != before.times


def test_configuration_names_and_sizes_count(model: Path) -> None:
    seen = {identity(model).contents}
    (model / "config.json").write_text('{"a": 1}')
    seen.add(identity(model).contents)
    (model / "model.safetensors").rename(model / "other.safetensors")
    seen.add(identity(model).contents)
    with (model / "other.safetensors").open("ab") as opened:
        opened.write(b"x")
    seen.add(identity(model).contents)
    shutil.copy(model / "other.safetensors", model / "second.safetensors")
    seen.add(identity(model).contents)
    assert len(seen) == 5


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    assert checkpoint_identity(tmp_path) is None


def test_a_file_of_the_hub_is_known_by_its_name(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    found = []
    for content, name in ((b"one", "a" * 64), (b"two", "a" * 64), (b"two", "b" * 64)):
        (blobs / name).write_bytes(content)
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(blobs / name)
        found.append(identity(snapshot))
    assert found[0] == found[1]
    assert found[1].contents != found[2].contents
    assert found[1].times != found[2].times
