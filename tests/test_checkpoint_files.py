"""Damaged checkpoint files are named, with the tensor where it can be known, whatever byte is cut or flipped."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_hlwq.checkpoint_files import check_checkpoint_files, check_file
from vllm_hlwq.errors import ExpertCacheError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"first": torch.arange(64.0), "second": torch.arange(128.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_checkpoint_and_a_hub_name_pass(checkpoint: Path) -> None:
    check_checkpoint_files(str(checkpoint))
    check_checkpoint_files("some-owner/some-model")


def test_the_tensor_that_is_cut_off_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ExpertCacheError, match=r"model\.safetensors: truncated: tensor second ends at byte"):
        check_checkpoint_files(str(checkpoint))


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    index = {"weight_map": {"first": "model.safetensors", "third": "model-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExpertCacheError, match=r"model-00002\.safetensors: listed in .* but missing"):
        check_checkpoint_files(str(checkpoint))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
def test_an_unreadable_index_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ExpertCacheError, match="not a readable index"):
        check_checkpoint_files(str(checkpoint))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_anywhere_is_always_found(checkpoint: Path, data: st.DataObject) -> None:
    whole = (checkpoint / "model.safetensors").read_bytes()
    path = checkpoint / "cut.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ExpertCacheError, match=r"cut\.safetensors: "):
        check_file(path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_header_byte_gives_our_error_or_a_loadable_file(checkpoint: Path, data: st.DataObject) -> None:
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header_end - 1))] ^= data.draw(st.integers(1, 255))
    path = checkpoint / "flipped.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(ExpertCacheError):
        check_file(path)
        load_file(path)
