"""The tables of ``docs/sizing.md`` are what the plan says today."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sizing


@pytest.mark.parametrize("shape", sizing.MODELS)
def test_the_committed_plan_is_todays(shape: str) -> None:
    committed = json.loads(sizing.RESULT.read_text())
    # In a process of its own: vLLM's fallback to transformers, once used, changes transformers' model classes.
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sizing; print(json.dumps(sizing.report({shape!r})))"],
        cwd=Path(sizing.__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert committed[sizing.MODELS[shape]] == json.loads(done.stdout.splitlines()[-1])
