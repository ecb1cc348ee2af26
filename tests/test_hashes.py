"""Sums that are computed ahead: what is damaged is refused when it is asked for, and not before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_hlwq.checkpoint.hashes import HashList, byte_view, describe
from vllm_hlwq.checkpoint.metadata import HASHES
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.errors import CheckpointError


@pytest.fixture
def sums(tmp_path: Path) -> HashList:
    """Of tensors ``whole`` and ``damaged``."""
    tensors = {name: torch.arange(64, dtype=torch.float32) for name in ("whole", "damaged")}
    save_file(tensors, tmp_path / "model.safetensors")
    digests = {name: hashlib.sha256(byte_view(tensor)).hexdigest() for name, tensor in tensors.items()}
    digests["damaged"] = "0" * 64
    entries = {name: describe(torch.float32, (64,), digest) for name, digest in digests.items()}
    (tmp_path / HASHES).write_text(json.dumps(entries))
    found = HashList.read(TensorFolder(tmp_path))
    assert found is not None
    return found


@pytest.mark.parametrize("ahead", [[], ["damaged"], ["damaged", "whole", "damaged"]])
def test_damage_is_told_when_the_tensor_is_asked_for_and_every_time(sums: HashList, ahead: list[str]) -> None:
    sums.check_ahead(ahead)
    sums.check("whole")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="tensor damaged is damaged, its SHA-256 is not the listed one"):
            sums.check("damaged")


def test_a_tensor_is_hashed_once(sums: HashList, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tensor = sums.folder.tensor
    monkeypatch.setattr(sums.folder, "tensor", lambda name: read.append(name) or tensor(name))
    sums.check_ahead(["whole"])
    sums.check("whole")
    sums.check_ahead(["whole"])
    sums.check("whole")
    assert read == ["whole"]
