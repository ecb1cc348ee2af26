"""The set-up's own files lie where the environment's Python looks for them, whichever Python made it."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
SYSTEM_PYTHON = Path("/usr/bin/python{}.{}".format(*sys.version_info))
PYTHONS = sorted({Path(sys.executable).resolve(), *(path.resolve() for path in [SYSTEM_PYTHON] if path.exists())})
"""Debian's own has other ideas than most of where packages lie."""


@pytest.mark.parametrize("python", PYTHONS, ids=str)
def test_every_python_of_the_environment_asks_for_amx(python: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    script = f"import sys; sys.path.insert(0, {str(PROJECT / 'scripts')!r}); import setup_cpu, pathlib\n"
    script += f"setup_cpu.allow_amx(pathlib.Path({str(tmp_path / 'env')!r}))"
    subprocess.run([python, "-c", script], check=True)
    loaded = subprocess.run(
        [tmp_path / "env/bin/python", "-c", "import sys; print('vllm_cpu_amx' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout == "True\n"
