"""Processes that measure one engine each: started with their environment, given a task, ended with all they left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from vllm_hlwq.bench.server import ENVIRONMENT

ENGINE_RUN = Path(__file__).with_name("engine_run.py")
SAMPLE_SECONDS = 0.1
_RAISED = re.compile(
    r"^(?:\[rank\d+\]: )?(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?"  # what vLLM and torch put before a traceback's lines
    r"(?:\w+\.)*(\w*(?:Error|Exception|Failed|Unsupported)\w*: \S.*)$"
)
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
_CONSEQUENCES = ("EngineDeadError", "Engine core initialization failed", "RuntimeError: cancelled", "WorkerProc init")


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
    for line in log.splitlines():
        match = _RAISED.match(line)
        if match and not any(consequence in match[1] for consequence in _CONSEQUENCES):
            return match[1]
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

    def run(self, specification: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Give it its task; the result, or the reason why there is none within ``timeout`` seconds."""
        host = HostMemory(self._process)
        host.start()
        try:
            self._process.communicate(json.dumps(specification), timeout=timeout)
            code = self._process.returncode
            if code or not self._out.exists():
                reason = failure_reason(self._log.read_text(errors="replace"), code)
                return {"status": "failed", "reason": reason}
            return {"status": "ok", "host_peak_bytes": host.peak, **json.loads(self._out.read_text())}
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not done after {timeout:.0f} s (--timeout)"}
        finally:
            self.end()

    def end(self) -> None:
        """End the process, and what it has left behind, whether or not it got a task."""
        stop_group(self._process)
        self._scratch.cleanup()


def run_task(
    specification: dict[str, Any], environment: dict[str, str], timeout: float, keep_log: Path | None = None
) -> dict[str, Any]:
    """Run a task in a process that is started for it, as ``Task`` does."""
    return Task(environment, keep_log).run(specification, timeout)


def stop_group(process: subprocess.Popen[str]) -> None:
    """End what a process has started and left behind, and it itself if it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended by itself
    process.wait()
