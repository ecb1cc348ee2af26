"""Which codebook a file that stores none was coded with, from ten million codes on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hlwq_files import Coded, table, write_state

from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.errors import CheckpointError

LINEAR = "layer.q_proj"


def gaussian_state(folder: Path, name: str | None, rows: int) -> Path:
    """Codes of normal blocks by table ``name``, or uniform ones."""
    generator = np.random.default_rng(7)
    if name is None:
        codes = generator.integers(0, 32, (rows, 1, 128), dtype=np.uint8)
    else:
        blocks = generator.standard_normal((rows, 1, 128), dtype=np.float32)
        z = blocks / np.linalg.norm(blocks, axis=-1, keepdims=True) * np.float32(math.sqrt(128))
        levels = table(name)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, z).astype(np.uint8)
    coded = Coded(codes, np.ones((rows, 1), np.float16), torch.empty(0, 128))
    return write_state(folder, coded.packed(LINEAR))


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_the_codebook_is_told_from_ten_million_codes(name: str, tmp_path: Path) -> None:
    source = HlwqSource(gaussian_state(tmp_path, name, 78_125))
    assert source.table_origin == f"{name}, detected"
    assert source.table(5).numpy() == pytest.approx(table(name), abs=6e-7)


def test_too_few_codes_tell_no_codebook(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .*9999872 codes are too few .* give --codebook A, B or C"):
        HlwqSource(gaussian_state(tmp_path, "A", 78_124))


def test_codes_that_fit_no_codebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fit no single one of A, B and C .*0\.062\d+.* give --codebook"):
        HlwqSource(gaussian_state(tmp_path, None, 78_125))
