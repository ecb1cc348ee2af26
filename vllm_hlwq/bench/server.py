"""Start ``vllm serve`` as a child process on a free port, wait until it answers, and always end it.

Shared by the demo, the benchmarks and the server tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

START_UP_SECONDS = 600
SHUTDOWN_SECONDS = 30

VLLM = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "vllm"

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes most of the machine
    "VLLM_LOGGING_LEVEL": "INFO",  # the start-up line of the cache is read from the log
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # opens /collective_rpc, which the counters are read through
    "HF_HUB_OFFLINE": "1",
}


class ServerFailed(RuntimeError):
    """The server ended or did not answer in time; the message holds the end of its log."""


class Server:
    """A running ``vllm serve MODEL ARGUMENTS``, bound to the loopback address.

    Args:
        environment: variables beside this process's own and ``ENVIRONMENT``.

    Attributes:
        url: base URL, ``http://127.0.0.1:PORT``.
        log_path: file with everything the server has printed.
    """

    def __init__(self, model: Path | str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
        descriptor, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
        self.log_path = Path(name)
        with os.fdopen(descriptor, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.log_path.unlink(missing_ok=True)

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def wait_until_healthy(self) -> None:
        """Wait for ``/health``.

        Raises:
            ServerFailed: the process ended first, or ``START_UP_SECONDS`` passed.
        """
        deadline = time.monotonic() + START_UP_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with code {self.process.returncode}:\n{self.log[-4000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServerFailed(f"no answer after {START_UP_SECONDS} s:\n{self.log[-4000:]}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON and return the JSON answer; raises urllib.error.HTTPError on an error status."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample on ``/metrics`` by its name and its sorted labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}

    def expert_cache_counters(self) -> dict[str, int]:
        """Counters of the first worker, summed over layers."""
        layers = self.post("/collective_rpc", {"method": "expert_cache_counters"})["results"][0].values()
        return {name: sum(layer[name] for layer in layers) for name in next(iter(layers))}

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the whole group is killed below
                self.process.wait(SHUTDOWN_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
