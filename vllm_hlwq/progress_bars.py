"""Progress of what the cache does to experts while an engine starts, in bytes: conversion, page-locking, files.

Shown where vLLM shows the progress of its own loading: on one rank, unless ``use_tqdm_on_load`` is off, a line at a
time, because what workers print is prefixed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from tqdm import tqdm

Work = Literal["Converting", "Page-locking", "Reading", "Saving"]

LINE = "{desc}: {percentage:3.0f}% | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"
SECONDS_BETWEEN_LINES = 1.0


class ProgressBars:
    """One bar for each kind of work; its size is what has been announced when it begins.

    Args:
        shown: whether anything is printed.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._expected: Counter[Work] = Counter()
        self._bars: dict[Work, Any] = {}

    def expect(self, work: Work, nbytes: int) -> None:
        """Announce work."""
        self._expected[work] += nbytes

    def advance(self, work: Work, nbytes: int) -> None:
        """Note that work is done; of one thread at a time."""
        if not self._shown:
            return
        if work not in self._bars:
            self._bars[work] = tqdm(
                total=self._expected[work] or None, desc=f"{work} experts", unit="B", unit_scale=True,
                bar_format=LINE, mininterval=SECONDS_BETWEEN_LINES,
            )  # fmt: skip
        bar = self._bars[work]
        bar.update(nbytes)
        if bar.total is not None and bar.n >= bar.total:
            del self._bars[work], self._expected[work]
            bar.close()

    def close(self) -> None:
        """End bars whose work came out smaller than announced."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()


SILENT = ProgressBars(shown=False)
