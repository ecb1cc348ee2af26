"""The layer benchmark on a GPU: its quick run, whose checks of counters and outputs are part of it."""

from __future__ import annotations

import json
from pathlib import Path

import inside_gemm
import moe_layer
import pytest
import torch

from vllm_hlwq.bench.moe_shapes import MoeShape

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


def test_reading_from_inside_the_gemm_computes_what_resident_experts_do() -> None:
    """``measure`` raises where outputs differ by more than rounding; the kernels are the same, so no bit does."""
    shape = MoeShape(hidden=256, width=192, experts=16, top_k=4, group_size=64, activation="gelu_tanh")
    result = inside_gemm.measure(shape)
    assert result["record_bytes"] == shape.marlin_layout().record_bytes
    blocks = [(row["experts"], row["tokens"], row["blocks"]) for row in result["rows"]]
    assert blocks[:5] == [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 2, 1), (16, 4, 1)]
    assert blocks[5:] == [(16, 512, 2), (16, 2048, 8), (16, 8192, 32)]
    assert all(row["same_bits"] for row in result["rows"])
    assert all(min(row["gather_us"], row["inside_us"], row["resident_us"]) > 0 for row in result["rows"])
