"""A server that is ended, or loses a process, in the middle of streams: what it reports and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from soak_load import Heard, Load, Prompt
from soak_processes import Leftovers, leftovers, mapped_shared_memory, role_of, the, tree, wait_for_end, wait_until_gone

from vllm_hlwq.bench.server import Server

STREAMS = 8
STREAMED_TOKENS = 100
"""Of all streams together, heard before the fault."""
STREAMING_SECONDS = 60
PATIENCE_SECONDS = 5
"""After which clients hang up. vLLM's server waits for open streams when it is told to end, and it can have cancelled
the task that would have fed them."""
END_SECONDS = 60
FAULTS = {"SIGTERM": "API server", "worker killed": "Worker", "engine killed": "EngineCore"}
"""Each fault by the role of the process that is struck: SIGTERM for the server's own, SIGKILL for the others."""


@dataclass(frozen=True)
class Fault:
    """What happened after a fault.

    Attributes:
        name: of ``FAULTS``.
        exit_code: of the server; None if it did not end.
        seconds: from the fault to the end of its last process.
        reported: lines of the log that name an error or the shutdown.
        ends: how streams ended, and how many of them.
        left: what is left.
    """

    name: str
    exit_code: int | None
    seconds: float
    reported: int
    ends: dict[str, int]
    left: Leftovers


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """A folder for the temporary files of servers that are started meanwhile."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as folder:  # short: sockets are made in it
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def strike(server: Server, name: str, prompt: Prompt, folder: Path) -> tuple[Fault, list[Heard]]:
    """Let a fault happen to a server with streams under way, and wait for what comes of it.

    Args:
        server: that runs.
        name: of ``FAULTS``.
        prompt: of the streams; long enough for them to be under way still.
        folder: where the server's temporary files go.

    Returns:
        What happened, and what clients had heard until then.
    """
    processes = tree(server)
    roles = [role_of(process) for process in processes]
    struck = the(server, FAULTS[name])
    shared = mapped_shared_memory(processes)
    log_before = len(server.log)
    load = Load(server.url, [prompt], [], [], 0)
    started: list[float] = []

    async def happen() -> None:
        async with aiohttp.ClientSession() as load.session:
            streams = [asyncio.ensure_future(load.hear(prompt)) for _ in range(STREAMS)]
            async with asyncio.timeout(STREAMING_SECONDS):
                while load.streamed < STREAMED_TOKENS:
                    await asyncio.sleep(0.01)
            started.append(time.monotonic())
            os.kill(struck.pid, signal.SIGTERM if name == "SIGTERM" else signal.SIGKILL)
            _, open_streams = await asyncio.wait(streams, timeout=PATIENCE_SECONDS)
            for stream in open_streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    asyncio.run(happen())
    exit_code = wait_for_end(server, END_SECONDS)
    wait_until_gone(processes, END_SECONDS)
    seconds = time.monotonic() - started[0]
    ends = Counter(heard.end.split(":")[0] for heard in load.heard)
    lines = server.log[log_before:].splitlines()
    reported = sum("ERROR" in line or "[shutdown]" in line for line in lines)
    left = leftovers(processes, roles, shared, folder)
    return Fault(name, exit_code, round(seconds, 1), reported, dict(ends), left), load.heard


def more_than_stock(ours: Fault, stock: Fault) -> list[str]:
    """What ours does worse than stock vLLM after the same fault, one line each."""
    found = []
    if ours.exit_code is None or (ours.exit_code == 0) != (stock.exit_code == 0):
        found.append(f"{ours.name}: exit code {ours.exit_code}, stock vLLM's {stock.exit_code}")
    if not ours.reported:
        found.append(f"{ours.name}: nothing in the log")
    for kind, what in asdict(ours.left).items():
        extra = Counter(what) - Counter(asdict(stock.left)[kind])
        if extra:
            found.append(f"{ours.name}: left behind {dict(extra)} ({kind.replace('_', ' ')})")
    return found
