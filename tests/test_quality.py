"""The committed comparison of formats: whole, in the document, and what it says of the bars set beforehand."""

from __future__ import annotations

import json

import codec_ideas
import pytest
import render
import torch

from vllm_hlwq.codec import codebook

RESULT = json.loads((render.RESULTS / "quality.json").read_text())
IDEAS = {
    row["idea"]: row["relative_mse"] for row in json.loads((render.RESULTS / "codec_ideas.json").read_text())["ideas"]
}
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


@pytest.mark.parametrize("bits", ["3", "4", "5", "6"])
@pytest.mark.parametrize("weights", ["normal", "tiny model"])
def test_the_codec_s_search_is_near_the_least_error(bits: str, weights: str) -> None:
    least = IDEAS["every factor: the least there is"][weights][bits]
    kept = IDEAS["twelve starts, one more round"][weights][bits]
    assert least < kept < (1.06 if bits == "6" else 1.015) * least
    free = IDEAS["64 weights in a block, padding free"][weights][bits]
    assert free < IDEAS["64 weights in a block, padding coded as zeros"][weights][bits] / 6


def rotated_blocks() -> torch.Tensor:
    return torch.randn(24, 128, generator=torch.Generator().manual_seed(4))


def test_no_factor_beats_the_pass_over_all_of_them() -> None:
    """A dense grid comes near the least error and never below it."""
    rotated, table = rotated_blocks(), codebook("C", 4)
    least = codec_ideas.every_factor(rotated, table)
    norms = rotated.norm(dim=1) / 128**0.5
    errors = [
        codec_ideas.error_of(rotated, codec_ideas.levels_at(rotated, norms * multiple, table))
        for multiple in torch.linspace(0.5, 1.5, 500)
    ]
    dense = codec_ideas.relative(rotated, torch.stack(errors).amin(0))
    assert least <= dense * (1 + 1e-5)
    assert least == pytest.approx(dense, rel=2e-3)


def test_ideas_keep_their_order_on_any_blocks() -> None:
    rotated, table = rotated_blocks(), codebook("C", 5)
    kept = codec_ideas.relative(rotated, codec_ideas.error_of(rotated, codec_ideas.searched(rotated, table)))
    assert kept == pytest.approx(codec_ideas.IDEAS["twelve starts, one more round"][1](rotated, table), rel=2e-3)
    assert codec_ideas.every_factor(rotated, table) < codec_ideas.single_changes(rotated, table) < kept
