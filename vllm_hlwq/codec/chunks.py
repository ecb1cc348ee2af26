"""Runs the codec over a matrix chunk by chunk, on all of a CPU's threads at once.

Each thread codes whole chunks with torch held to that one thread. Sharing out the operations instead would leave the
second core idle half of the time: look-ups by index run on one thread only, and each of some twenty operations a chunk
would wait for the slower half. The threads stay: an expert's matrix is coded in the time that it takes to start some.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from queue import SimpleQueue
from threading import Barrier
from typing import TypeVar

import torch

from .blocks import BlockCoder

Result = TypeVar("Result")
LEAST_ROWS = 64
"""Of a chunk: fewer are not worth another thread."""


_cpus: ContextVar[frozenset[int]] = ContextVar("_cpus", default=frozenset())


@contextmanager
def on_cpus(cpus: Collection[int]) -> Iterator[None]:
    """Code on these CPUs, one thread each, whatever the caller's thread is bound to; if there are none, as before.

    For vLLM's CPU workers: they bind their thread to one core, which threads that it starts inherit, and leave cores
    out that nothing else needs while a model loads. The caller's thread is bound as before afterwards.
    """
    bound, token = os.sched_getaffinity(0), _cpus.set(frozenset(cpus))
    try:
        os.sched_setaffinity(0, cpus or bound)
        yield
    finally:
        os.sched_setaffinity(0, bound)
        _cpus.reset(token)


def coding_threads() -> int:
    """How many threads code at once: torch's own number, or that of ``on_cpus``."""
    return len(_cpus.get()) or torch.get_num_threads()


def _single_threaded() -> None:
    """Hold torch to this thread. Asked first, because torch sets a new thread's number at its first use."""
    torch.get_num_threads()
    _set_num_threads(1)


_set_num_threads: Callable[[int], None] = torch._C.set_num_threads
"""``torch.set_num_threads``, which vLLM's CPU workers replace by a warning."""


@cache
def _pool(threads: int, cpus: frozenset[int]) -> ThreadPoolExecutor:
    """Threads that are all there, so that torch's number can be set back for those that others start later.

    Each set of ``cpus`` has its own, since they stay bound as their caller was.
    """
    before = torch.get_num_threads()
    pool, present = ThreadPoolExecutor(threads, "codec", _single_threaded), Barrier(threads)
    try:
        list(pool.map(lambda _: present.wait(), range(threads)))
    except BaseException:  # an interrupt between two starts: who waits for the rest would keep the process from ending
        present.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        _set_num_threads(before)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def for_ranges(work: Callable[[int, int], Result], rows: int, step: int, threads: int) -> list[Result]:
    """``work(start, stop)`` for ranges of ``step`` rows that cover all; results in order of rows.

    Args:
        work: called on several threads at once, in the caller's inference and grad mode; in the caller's thread, if
            there is one thread or one range.
        rows: of all ranges.
        step: rows of one.
        threads: that work at once.

    Raises:
        Exception: what ``work`` raised for the first range in order of rows that failed.
    """
    ranges = [(start, min(rows, start + step)) for start in range(0, rows, step)]
    threads = min(threads, len(ranges))
    if threads <= 1:
        return [work(*each) for each in ranges]
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def work_as_caller(start: int, stop: int) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(start, stop)

    pool, running = _pool(threads, _cpus.get()), []
    try:
        for each in ranges:
            running.append(pool.submit(work_as_caller, *each))
        wait(running)  # all of them, also after one has failed: they work in the caller's memory
    except BaseException:  # an interrupt: the next call works in the same memory
        for future in running:
            future.cancel()
        while not all(future.done() for future in running):
            with suppress(KeyboardInterrupt):  # who interrupts once may do so twice
                wait(running)
        raise
    return [future.result() for future in running]


def for_each_chunk(
    work: Callable[[BlockCoder, int, int], Result], coder: BlockCoder, rows: int, step: int
) -> list[Result]:
    """As ``for_ranges``, on all of a CPU's threads, with ``work(coder, start, stop)``.

    Args:
        work: called on several threads of a CPU at once, each with a coder of its own.
        coder: the coder, of which each further thread gets a twin.
        rows: of the matrix.
        step: rows of a chunk, at most; on a CPU a matrix of many rows makes two chunks or more.
    """
    on_cpu = coder.device.type == "cpu"
    if on_cpu:
        step = min(step, max(LEAST_ROWS, -(-rows // 2)))  # whatever the threads: sums follow the chunks
    threads = min(coding_threads(), -(-rows // step)) if on_cpu else 1
    free: SimpleQueue[BlockCoder] = SimpleQueue()
    for twin in coder.twins(threads):
        free.put(twin)

    def borrow_and_work(start: int, stop: int) -> Result:
        borrowed = free.get()
        try:
            return work(borrowed, start, stop)
        finally:
            free.put(borrowed)

    return for_ranges(borrow_and_work, rows, step, threads)
