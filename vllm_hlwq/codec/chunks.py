"""Runs the codec over a matrix chunk by chunk, on all of a CPU's threads at once.

Each thread codes whole chunks with torch held to that one thread. Sharing out the operations instead would leave the
second core idle half of the time: look-ups by index run on one thread only, and each of some twenty operations a chunk
would wait for the slower half.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from .blocks import BlockCoder

Result = TypeVar("Result")


def single_threaded() -> None:
    """Hold torch to this thread. Asked first, because torch sets a new thread's number at its first use."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def for_each_chunk(
    work: Callable[[BlockCoder, int, int], Result], coder: BlockCoder, rows: int, step: int
) -> list[Result]:
    """Call ``work(coder, start, stop)`` for ranges of ``step`` rows that cover all; results in order of rows.

    Args:
        work: called on several threads of a CPU at once, each with a coder of its own.
        coder: the coder, of which each further thread gets a twin.
        rows: of the matrix.
        step: rows of a chunk.

    Raises:
        Exception: what ``work`` raised for the first chunk in order of rows that failed.
    """
    starts = range(0, rows, step)
    threads = min(torch.get_num_threads(), len(starts)) if coder.device.type == "cpu" else 1
    if threads <= 1:
        return [work(coder, start, min(rows, start + step)) for start in starts]
    free: SimpleQueue[BlockCoder] = SimpleQueue()
    for twin in coder.twins(threads):
        free.put(twin)

    def borrow_and_work(start: int) -> Result:
        borrowed = free.get()
        try:
            return work(borrowed, start, min(rows, start + step))
        finally:
            free.put(borrowed)

    try:
        with ThreadPoolExecutor(threads, "codec", single_threaded) as pool:
            return list(pool.map(borrow_and_work, starts))
    finally:
        torch.set_num_threads(torch.get_num_threads())  # threads that others start later are not to inherit the one
