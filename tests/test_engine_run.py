"""What the benchmarks time of a real engine on a CPU: the steps that decode the whole batch, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import engine_run
import pytest

pytestmark = pytest.mark.server

BORDER = 4
"""The step in which the last of four prompts of 12 tokens is read to its end. They come in chunks of 16, of which one
goes to each prompt that has been read: 12 + 4, 1 + 8 + 7, 1 + 1 + 5 + 9, and 1 + 1 + 1 + 3."""


@pytest.fixture(scope="module")
def found(tiny_int4: Path) -> dict[str, Any]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(Path(engine_run.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "timed_steps.py"), str(tiny_int4)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_steps_begin_where_the_last_prompt_has_been_read_and_end_with_the_first(found: dict[str, Any]) -> None:
    four = found["four"]
    assert four["steps"] == 20 - BORDER
    times, counts = zip(*four["log"], strict=True)
    # The first prompt has a token at the first step, the last one at the border.
    assert [len(made) for made in counts[:BORDER]] == [1, 2, 3, 4]
    assert max(counts[BORDER - 1].values()) == BORDER
    assert max(counts[20 - 1].values()) == 20
    assert four["seconds"] == pytest.approx(times[20 - 1] - times[BORDER - 1], rel=0.1)


def test_the_steps_of_one_prompt_are_its_tokens_but_the_first(found: dict[str, Any]) -> None:
    times = [when for when, _ in found["alone"]["log"]]
    assert found["alone"]["steps"] == 8
    assert found["alone"]["seconds"] == pytest.approx(times[8] - times[0], rel=0.1)
    assert found["single"]["steps"] == 0


def test_figures_are_the_middle_repeats_and_counters_those_of_the_same_steps(found: dict[str, Any]) -> None:
    measured = found["measured"]
    assert measured["timed_steps"] == [20 - BORDER] * 3
    assert measured["counted_decode_steps"] == 20 - BORDER
    assert len(measured["step_milliseconds_each"]) == 3
    assert measured["step_milliseconds"] == median(measured["step_milliseconds_each"])
    assert measured["decode_tokens_per_second"] == pytest.approx(4e3 / measured["step_milliseconds"])


def test_a_batch_that_is_never_whole_is_refused(found: dict[str, Any]) -> None:
    assert found["short"]["steps"] < 1
    assert "of 4 prompts of 12 tokens the first was done before the last had begun" in found["refused"]
    assert "--new-tokens" in found["refused"]
