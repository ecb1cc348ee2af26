"""The layer benchmark on a GPU: its quick run, whose checks of counters and outputs are part of it."""

from __future__ import annotations

import json
from pathlib import Path

import moe_layer
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


def test_planner_and_layer_are_measured(tmp_path: Path) -> None:
    assert moe_layer.main(["--parts", "plan", "layer", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "moe_layer.json").read_text())
    assert 0.5 < result["plan"]["worst_growth"] < 2
    rows = {(row["tokens"], row["slots"], row["misses"]): row for row in result["layer"]["rows"]}
    assert set(rows) >= {(1, 128, 0), (1, 32, 0), (1, 32, 8), (2048, 32, 96)}
    for (_, _, misses), row in rows.items():
        assert row["step_us"] > 0.9 * row["link_us"], "nothing beats the copy engine"
        assert row["link_us"] == pytest.approx(
            misses * result["layer"]["record_bytes"] / (1e3 * result["layer"]["copy_gb_per_s"])
        )
