"""Peaks of memory: a thread that samples a figure, and the figure for processes that map large files.

Anonymous memory is what a process took for itself: pages of mapped files are the kernel's, which drops them at need.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

SAMPLE_SECONDS = 0.02


class PeakSampler(threading.Thread):
    """Samples a figure until it is over.

    Args:
        sample: gives the figure.
        over: says whether to stop.

    Attributes:
        peak: the largest figure so far.
    """

    def __init__(self, sample: Callable[[], int], over: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._sample, self._over = sample, over

    def run(self) -> None:
        while not self._over():
            self.peak = max(self.peak, self._sample())
            time.sleep(SAMPLE_SECONDS)


def anonymous_bytes(pid: int) -> int:
    """Anonymous and shared memory of a process that is in RAM, in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def run_and_watch(command: list[str]) -> tuple[int, float]:
    """Run a command to its end, its output passed on; the peak of its anonymous memory in bytes, and its seconds.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.monotonic()
    process = subprocess.Popen(command)
    sampler = PeakSampler(lambda: anonymous_bytes(process.pid), lambda: process.poll() is not None)
    sampler.start()
    sampler.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return sampler.peak, time.monotonic() - start
