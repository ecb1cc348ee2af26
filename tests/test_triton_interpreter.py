"""Runs the tests in ``interpreted/`` in a Python of their own, with Triton's interpreter in the place of a GPU.

Triton chooses between compiler and interpreter when a kernel's module is imported, so both cannot be had in one
process. By hand: ``TRITON_INTERPRET=1 pytest tests/interpreted``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's tests are collected directly")
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_in_the_interpreter(module: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(module)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
