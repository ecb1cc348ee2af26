"""The model card's example for transformers runs as it is printed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_hlwq.checkpoint.card import write_card

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(PROJECT / "examples/tiny_moe/model", folder / "tiny-moe-HLWQ-Q5")
    write_card(folder / "tiny-moe-HLWQ-Q5", [])
    card = (folder / "tiny-moe-HLWQ-Q5/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return folder, code


def test_its_first_line_says_what_happens_without_it(printed: tuple[Path, str]) -> None:
    first = printed[1].splitlines()[0]
    assert first.startswith("import vllm_hlwq  #")
    assert "trust_remote_code=True" in first
    assert "RANDOM weights" in first


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    variables = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "placed",
    [
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("accelerate") is None, reason="device_map needs accelerate, not installed here"
            ),
        ),
        False,
    ],
)
def test_it_runs(placed: bool, printed: tuple[Path, str]) -> None:
    """As printed, and without ``device_map``, which needs accelerate."""
    folder, code = printed
    done = run(folder, code if placed else code.replace(', device_map="auto"', ""))
    assert done.returncode == 0, done.stderr
    text = done.stdout.strip()
    assert text.startswith("The")
    assert len(set(text.split())) > 5


def test_without_the_import_the_weights_are_random_as_it_says(printed: tuple[Path, str]) -> None:
    folder, code = printed
    plain = "\n".join(code.replace(', device_map="auto"', "").splitlines()[1:])
    done = run(folder, plain)
    assert "Unknown quantization type, got polarengine" in done.stderr
    assert done.stdout != run(folder, code.replace(', device_map="auto"', "")).stdout
