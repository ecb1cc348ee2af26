"""The set-up's own files lie where the environment's Python looks for them, whichever Python made it."""

from __future__ import annotations

import re
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


def set_up(python: Path, env: Path) -> subprocess.CompletedProcess[str]:
    """Let a Python make an environment, without what is installed into it."""
    script = f"import sys; sys.path.insert(0, {str(PROJECT / 'scripts')!r}); import setup_cpu, pathlib, venv\n"
    # pip takes a while and plays no part.
    script += "create = venv.create; venv.create = lambda *a, **k: create(*a, **k | {'with_pip': False})\n"
    script += f"setup_cpu.make_environment(pathlib.Path({str(env)!r}))"
    return subprocess.run([python, "-c", script], capture_output=True, text=True)


def test_an_environment_is_gone_on_with_unless_another_python_made_it(tmp_path: Path) -> None:
    env, python, installed = tmp_path / "env", tmp_path / "elsewhere/python", tmp_path / "env/installed"
    python.parent.mkdir()
    python.symlink_to(SYSTEM_PYTHON if SYSTEM_PYTHON.exists() else Path(sys._base_executable))  # type: ignore[attr-defined]
    assert set_up(python, env).returncode == 0
    settings = env / "pyvenv.cfg"
    made = settings.read_text()
    installed.touch()
    assert set_up(python, env).stdout == ""
    assert installed.exists()
    for name in ("executable", "version"):
        settings.write_text(re.sub(f"^{name} = .*", f"{name} = another", made, flags=re.MULTILINE))
        installed.touch()
        assert "was made by another Python" in set_up(python, env).stdout
        assert f"{name} = another" not in settings.read_text()
        assert not installed.exists()


def test_an_environment_is_not_made_by_its_own_python(tmp_path: Path) -> None:
    env = tmp_path / "env"
    venv.create(env, symlinks=True, with_pip=False)
    refused = set_up(env / "bin/python", env)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"setup_cpu: {env / 'bin/python'} belongs to {env} itself; run `deactivate`")
