"""One model in the forms that the command makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import succeeds
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="package")
def source(varied_source: Path) -> Path:
    return varied_source


@pytest.fixture(scope="package")
def coded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "coded"
    succeeds("quantize", source, out)
    return out


@pytest.fixture(scope="package")
def int4(coded: Path) -> Path:
    out = coded.with_name("int4")
    succeeds("export", coded, out)
    return out


@pytest.fixture(scope="package")
def bare(coded: Path) -> Path:
    """Coded tensors and the table, nothing else, as the published files: the rest is the base model's."""
    out = coded.with_name("bare")
    out.mkdir()
    state = load_file(coded / "model.safetensors")
    save_file({n: t for n, t in state.items() if "__" in n or n == "hlwq.codebook"}, out / "polar_state.safetensors")
    shutil.copyfile(coded / "config.json", out / "config.json")
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return make
