"""Threads for compiled code that holds no lock of Python's: rows of a matrix in ranges, one range a thread at a time.

They stay between calls. A thread that torch works in would bring torch's own team along, so none of these does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hlwq")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def for_ranges(work: Callable[[int, int], object], count: int, step: int, threads: int) -> None:
    """``work(start, stop)`` for ranges of ``step`` that cover ``count``.

    Args:
        work: does not write where another range's does.
        count: rows of all ranges.
        step: rows of one.
        threads: that work at once; the caller's alone if there is one, or one range.

    Raises:
        Exception: what ``work`` raised for the first range that failed.
    """
    starts = range(0, count, step)
    ends = [min(count, start + step) for start in starts]
    if threads == 1 or len(starts) == 1:
        for start, stop in zip(starts, ends, strict=True):
            work(start, stop)
    else:
        list(_pool(threads).map(work, starts, ends))
