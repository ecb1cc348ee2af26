"""The committed comparison of formats: whole, in the document, and what it says of the bars set beforehand."""

from __future__ import annotations

import json

import pytest
import render

RESULT = json.loads((render.RESULTS / "quality.json").read_text())
ROWS = {row["name"]: row for row in RESULT["rows"]}


def test_the_document_has_every_row() -> None:
    text = (render.PROJECT / "docs/quality.md").read_text()
    assert all(f"| {name} |" in text for name in ROWS)
    assert len(ROWS) == 1 + 4 * 4 + 1 + 2 * 4 + 2 * 2


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_ours_has_the_least_error_at_every_width(bits: int) -> None:
    others = [ROWS[f"HLWQ Q{bits}, table {table}, gain"]["relative_mse"] for table in "ABC"]
    assert ROWS[f"HLWQ Q{bits}, ours"]["relative_mse"] < 0.9 * min(others)


def test_five_bits_as_shipped_cost_at_most_half_a_percent() -> None:
    assert ROWS["HLWQ Q5, ours, tied embedding in 16 bit"]["over_bf16"]["relative"] <= 0.005


@pytest.mark.parametrize("size", [32, 64])
def test_int4_is_no_worse_than_round_to_nearest_of_llm_compressor(size: int) -> None:
    ours = ROWS[f"INT4 g{size} from BF16, scales searched"]
    theirs = ROWS[f"llm-compressor INT4 g{size}, round to nearest"]
    assert ours["relative_mse"] < 0.9 * theirs["relative_mse"]
    bars = [bar for bar in RESULT["bars"] if bar["bar"].startswith(f"INT4 g{size}")]
    assert len(bars) == 2
    assert all(bar["holds"] for bar in bars)
