"""Processes that measure one engine each: started with their environment, given a task, ended with all they left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from vllm_hlwq.bench.server import ENVIRONMENT

ENGINE_RUN = Path(__file__).with_name("engine_run.py")
SAMPLE_SECONDS = 0.1
POLL_SECONDS = 0.05
ENDING_SECONDS = 60
"""For an engine to end by itself: some gigabytes of page-locked memory take a while to give back."""
_RAISED = re.compile(
    r"^(?:\[rank\d+\]: )?(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?"  # what vLLM and torch put before a traceback's lines
    r"(?:\w+\.)*(\w*(?:Error|Exception|Failed|Unsupported)\w*: \S.*)$"
)
_VALIDATION = re.compile(r"ValidationError: \d+ validation errors? for \w+$")
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
_CONSEQUENCES = ("EngineDeadError", "Engine core initialization failed", "RuntimeError: cancelled", "WorkerProc init")


def shared_processors(processes: int) -> dict[str, str]:
    """Environment of each of several processes that load models at once: its share of the processors.

    Else each has as many threads as there are processors, and at the end of every tensor's copy all of them spin for
    those that do not get to run. It is told as vLLM tells its own workers, which serve with one thread nevertheless
    (``vllm/utils/torch_utils.py``, ``startup_omp_num_threads`` and ``set_torch_threads_for_runtime``).
    """
    if processes < 2:
        return {}
    share = max(1, len(os.sched_getaffinity(0)) // processes)
    return {"OMP_NUM_THREADS": str(share), "VLLM_OMP_NUM_THREADS_SET_BY_VLLM": "1"}


class HostMemory(threading.Thread):
    """The most host memory that was in use while a process ran, over what was in use before.

    Available memory of the whole machine, because memory that a driver locks is nobody's resident set: true on a
    machine that does nothing else.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.process, self.before = process, psutil.virtual_memory().available
        self.peak = 0

    def run(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, self.before - psutil.virtual_memory().available)
            time.sleep(SAMPLE_SECONDS)


def failure_reason(log: str, returncode: int) -> str:
    """One line that says why a process failed: the first error in its log that is no consequence of another."""
    lines = log.splitlines()
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        match = _RAISED.match(line)
        if match and not any(consequence in match[1] for consequence in _CONSEQUENCES):
            # pydantic says on the next line what is wrong.
            return f"{match[1]}: {following.strip()}" if _VALIDATION.match(match[1]) and following else match[1]
    died = _DIED.search(log)
    if died:
        return died[0]
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    return f"ended with code {returncode} and no error in its log"


class Task:
    """A process of ``engine_run.py`` in a group of its own, which waits for its task."""

    def __init__(self, environment: dict[str, str], keep_log: Path | None = None, import_first: bool = False) -> None:
        """Start the process.

        Args:
            environment: beside this process's own.
            keep_log: where what it prints is written and stays; else it is removed with the task.
            import_first: whether it imports vLLM before it waits for its task.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="throughput-")
        self._out = Path(self._scratch.name) / "result.json"
        self._log = keep_log or Path(self._scratch.name) / "log"
        with self._log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, str(ENGINE_RUN), str(self._out), *["--import-first"] * import_first],
                stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **environment},
            )  # fmt: skip
        self._failure: str | None = None

    def start(self, specification: dict[str, Any]) -> None:
        """Give it its task: an engine starts, and waits until it is asked to measure."""
        self._host = HostMemory(self._process)
        self._host.start()
        self._tell(json.dumps(specification))

    def wait_until_started(self, deadline: float) -> bool:
        """Whether it has started by ``deadline``, of ``time.monotonic``; ``measure`` says why not."""
        return self._wait_for(self._out.with_name("started"), deadline)

    def measure(self, deadline: float) -> dict[str, Any]:
        """The result, or the reason why there is none by ``deadline``; waits for a start that is under way."""
        if self.wait_until_started(deadline):
            self._tell("measure")
            if self._wait_for(self._out, deadline):
                return {"status": "ok", "host_peak_bytes": self._host.peak, **json.loads(self._out.read_text())}
        return {"status": "failed", "reason": self._failure}

    def end(self, seconds: float = 0.0) -> None:
        """End the process and what it has left behind, whether or not it got a task; ``seconds`` to do so by itself."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):  # stopped below
            self._process.wait(0 if self._failure else seconds)
        stop_group(self._process)
        self._scratch.cleanup()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: what waits for it says so
            self._process.stdin.write(f"{line}\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _wait_for(self, path: Path, deadline: float) -> bool:
        """Whether the process makes a file by ``deadline``; if not, the reason is kept."""
        while not path.exists():
            if self._failure is None and (code := self._process.poll()) is not None and not path.exists():
                self._failure = failure_reason(self._log.read_text(errors="replace"), code)
            elif self._failure is None and time.monotonic() > deadline:
                self._failure = "not done in time (--timeout)"
            if self._failure is not None:
                return False
            time.sleep(POLL_SECONDS)
        return True


def run_task(
    specification: dict[str, Any], environment: dict[str, str], timeout: float, keep_log: Path | None = None
) -> dict[str, Any]:
    """Run a task in a process that is started for it: its result, or the reason why there is none."""
    (result,) = run_side_by_side({Task(environment, keep_log): specification}, timeout)
    return result


def run_side_by_side(tasks: dict[Task, dict[str, Any]], timeout: float) -> Generator[dict[str, Any], None, None]:
    """Start engines all at once, each with its specification, and ``measure_side_by_side``."""
    for task, specification in tasks.items():
        task.start(specification)
    yield from measure_side_by_side(list(tasks), timeout)


def measure_side_by_side(tasks: list[Task], timeout: float) -> Generator[dict[str, Any], None, None]:
    """Wait for engines that were started and measure them one after the other, in order; after the last, all end.

    If it is closed or interrupted before that, they are ended at once.

    What they take of the host, and of a GPU as a whole, is known only where it is one engine: else it is None.

    Args:
        tasks: all that are there.
        timeout: seconds from now for all starts, and again for each measurement.

    Yields:
        Each result as soon as it is there, so that what follows cannot cost it.
    """
    seconds = 0.0
    try:
        deadline = time.monotonic() + timeout
        for task in tasks:
            task.wait_until_started(deadline)
        for task in tasks:
            result = task.measure(time.monotonic() + timeout)
            if len(tasks) > 1 and result["status"] == "ok":
                result["host_peak_bytes"] = None
                result["start_up_seconds"] = None
                if result.get("gpu_memory") is not None:
                    result["gpu_memory"]["in_use"] = None
            yield result
        seconds = ENDING_SECONDS
    finally:
        with ThreadPoolExecutor(len(tasks)) as together:
            list(together.map(lambda task: task.end(seconds), tasks))


def stop_group(process: subprocess.Popen[str]) -> None:
    """End what a process has started and left behind, and it itself if it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended by itself
    process.wait()
