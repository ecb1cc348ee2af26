"""The tables of ``docs/sizing.md`` are what the plan says today."""

from __future__ import annotations

import json

import pytest
import sizing


@pytest.mark.parametrize("shape", sizing.MODELS)
def test_the_committed_plan_is_todays(shape: str) -> None:
    committed = json.loads(sizing.RESULT.read_text())
    assert committed[sizing.MODELS[shape]] == json.loads(json.dumps(sizing.report(shape)))
