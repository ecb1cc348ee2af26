"""A server's processes: who they are, what memory they take, and what is left of them afterwards."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from vllm_hlwq.bench.memory import anonymous_bytes
from vllm_hlwq.bench.server import Server

COURSE = 10
SHARED_MEMORY = Path("/dev/shm")
_RANDOM = re.compile(r"[0-9a-f]{8,}")
"""What differs from one name to the next of the same kind."""


def role_of(process: psutil.Process) -> str:
    """``Worker`` or ``EngineCore`` as vLLM titles its processes, the server's own, or a helper's program."""
    title = " ".join(process.cmdline())
    for role in ("Worker", "EngineCore"):
        if f"VLLM::{role}" in title:
            return role
    return "API server" if "vllm" in title and "serve" in title else "helper"


def tree(server: Server) -> list[psutil.Process]:
    """The server and everything that it has started."""
    top = psutil.Process(server.process.pid)
    return [top, *top.children(recursive=True)]


def the(server: Server, role: str) -> psutil.Process:
    """The one process of a role."""
    (found,) = [process for process in tree(server) if role_of(process) == role]
    return found


def mapped_shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """Files of ``/dev/shm`` that these processes have mapped; others' are not theirs to answer for."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):  # it has ended
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {Path(line.split(maxsplit=5)[5]) for line in lines if f"{SHARED_MEMORY}/" in line}
    return {path for path in found if path.exists()}


@dataclass
class Leftovers:
    """What outlives a server: processes by role, shared memory by kind, and temporary files of the expert cache."""

    processes: list[str]
    shared_memory: list[str]
    temporary: list[str]


def leftovers(processes: list[psutil.Process], roles: list[str], shared: set[Path], folder: Path) -> Leftovers:
    """Look for what is left of a server that has ended.

    Args:
        processes: that it had.
        roles: of them, told while they ran.
        shared: shared memory that they had mapped.
        folder: where its temporary files went.
    """
    alive = [role for process, role in zip(processes, roles, strict=True) if runs(process)]
    return Leftovers(
        sorted(alive),
        sorted(_RANDOM.sub("", path.name) for path in shared if path.exists()),
        sorted(_RANDOM.sub("", path.name) for path in folder.glob("vllm-hlwq-*")),
    )


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class MemoryWatch:
    """Samples the anonymous and shared memory of each of a server's processes until it is stopped."""

    def __init__(self, server: Server, seconds: float) -> None:
        self._processes = [(role_of(process), process.pid) for process in tree(server)]
        self._seconds = seconds
        self._samples: dict[str, list[int]] = defaultdict(list)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            for role, pid in self._processes:
                self._samples[role].append(anonymous_bytes(pid))

    def stop(self) -> dict[str, dict[str, Any]]:
        """Bytes of each role, summed up."""
        self._stopping.set()
        self._thread.join()
        return {role: summary(samples) for role, samples in self._samples.items() if samples[0]}


def summary(samples: list[int]) -> dict[str, Any]:
    """First and last of samples, medians of their middle and last third, and of each of ``COURSE`` parts."""
    third = len(samples) // 3
    parts = [samples[len(samples) * n // COURSE : len(samples) * (n + 1) // COURSE] for n in range(COURSE)]
    return {
        "first": samples[0],
        "last": samples[-1],
        "middle_third": int(median(samples[third : 2 * third])),
        "last_third": int(median(samples[-third:])),
        "course": [int(median(part)) for part in parts if part],
    }


def wait_for_end(server: Server, seconds: float) -> int | None:
    """The exit code of the server once it has ended, None if it did not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            return server.process.returncode
        time.sleep(0.1)
    return None


def wait_until_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Give processes whose parent has ended the time to end too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(runs(process) for process in processes):
        time.sleep(0.1)
