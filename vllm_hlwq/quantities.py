"""Amounts of memory and rates as people write them: ``24GiB``, ``64GB``, ``25GB/s``."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import CheckpointError

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_AMOUNT = re.compile(r"^\s*(?P<number>\d{1,40}(?:\.\d{1,40})?)\s*(?P<unit>[A-Za-z]+)\s*$")
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}


def parse_bytes(text: str, option: str) -> int:
    """``24GiB`` or ``24 GB`` in bytes, rounded down; capitals do not matter, the unit does.

    Raises:
        CheckpointError: it is no positive number with a unit.
    """
    match = _AMOUNT.match(text)
    factor = _BY_LOWER_CASE.get(match["unit"].lower()) if match else None
    amount = int(Fraction(match["number"]) * factor) if match and factor else 0
    if amount <= 0:
        raise CheckpointError(
            f"{option} {text!r}: not an amount of memory; give a number with a unit, like 24GiB or 24GB "
            f"({', '.join(UNITS)})"
        )
    return amount


def parse_rate(text: str, option: str) -> int:
    """``25GB/s`` in bytes per second.

    Raises:
        CheckpointError: it is no positive number with a unit per second.
    """
    amount, slash, second = text.strip().rpartition("/")
    if slash and second.strip() == "s":
        try:
            return parse_bytes(amount, option)
        except CheckpointError:
            amount = ""
    raise CheckpointError(
        f"{option} {text!r}: not a rate; give a number with a unit per second, like 25GB/s or 12GiB/s"
    )
