"""Amounts and rates as people write them; what has no unit is not guessed."""

from __future__ import annotations

import pytest

from vllm_hlwq.errors import CheckpointError
from vllm_hlwq.quantities import parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("0.1KB", 100),
        ("7B", 7),
        ("2TiB", 2**41),
        ("512mib", 2**29),
        ("0.3B", None),
        ("24", None),
        ("24G", None),
        ("-1GiB", None),
        ("0GiB", None),
        ("GiB", None),
        ("1e3GiB", None),
        ("", None),
        ("24GB/s", None),
        ("9" * 5000 + "GiB", None),
        ("0." + "9" * 5000 + "GiB", None),
    ],
)
def test_amounts(text: str, wanted: int | None) -> None:
    if wanted is not None:
        assert parse_bytes(text, "--vram") == wanted
        return
    with pytest.raises(CheckpointError) as caught:
        parse_bytes(text, "--vram")
    assert str(caught.value).startswith(f"--vram {text!r}: not an amount of memory; give a number with a unit")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("25GB/s", 25 * 10**9), ("12.5 GiB / s", 25 * 2**29), ("25GB", None), ("25/s", None), ("GB/s", None), ("x", None)],
)
def test_rates(text: str, wanted: int | None) -> None:
    if wanted is not None:
        assert parse_rate(text, "--link") == wanted
        return
    with pytest.raises(CheckpointError) as caught:
        parse_rate(text, "--link")
    assert str(caught.value).startswith(f"--link {text!r}: not a rate; give a number with a unit per second")
