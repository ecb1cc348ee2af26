"""Runs the ``hlwq`` command in this process, and spoils checkpoints as other tools would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_hlwq.cli import app


def hlwq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    """Standard output of a command that succeeds and has nothing to add."""
    result = hlwq(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """The one line that a refused command prints."""
    result = hlwq(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("hlwq: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("hlwq: ").strip()


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change a checkpoint's tensors and drop its list of sums, as another tool would leave it."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")
    (folder / "hlwq_sha256.json").unlink()
    return folder
