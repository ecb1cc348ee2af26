"""``vllm bench serve`` again and again: a process that has imported it runs each benchmark in a fork of itself.

On some machines importing vLLM takes half a minute, much longer than a short benchmark.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from engine_process import failure_reason, stop_group

from vllm_hlwq.bench.server import ENVIRONMENT


class BenchmarkFailed(RuntimeError):
    """``vllm bench serve`` did not end well; the message is a line."""


class BenchProcess:
    """The process; to be ended with ``stop``."""

    def __init__(self) -> None:
        """Start it; it imports vLLM while others start."""
        self._folder = tempfile.TemporaryDirectory(prefix="bench-process-")
        self._log = Path(self._folder.name, "log")
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip

    def run(self, arguments: Sequence[str], log: Path, timeout: float) -> None:
        """Run the benchmark with arguments of ``vllm bench serve``; what it prints goes to ``log``.

        Raises:
            BenchmarkFailed: it ended with an error, or not in ``timeout`` seconds; the next run is in a new process.
        """
        answer = self._answer(json.dumps([str(log), *arguments]), timeout)
        if not answer:
            stop_group(self._process)
            why = failure_reason(self._log.read_text(errors="replace"), self._process.returncode)
            self._process = self._start()
            raise BenchmarkFailed(
                f"vllm bench serve: not done after {timeout:.0f} s (--timeout)"
                if answer is None
                else f"vllm bench serve cannot be run: {why}"
            )
        if code := int(answer):
            raise BenchmarkFailed(f"vllm bench serve: {failure_reason(log.read_text(errors='replace'), code)}")

    def _answer(self, line: str, timeout: float) -> str | None:
        """The process's answer, None if it has not come in time, empty if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, which its output says, too
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answered, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if answered else None

    def stop(self) -> None:
        """End the process."""
        stop_group(self._process)
        self._folder.cleanup()


def run_forked(run: Callable[[list[str]], object], log: str, arguments: list[str]) -> int:
    """Exit status of ``run(arguments)`` in a fork, negative for a signal, its output in a file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        run(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, a fork must not go on as the process that it left
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """A benchmark for each line of input, a JSON list of the log's path and arguments; a line of output each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print, too
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def run(arguments: list[str]) -> None:
        parser = FlexibleArgumentParser(prog="vllm bench serve")
        serve.add_cli_args(parser)
        serve.main(parser.parse_args(arguments))

    for line in sys.stdin:
        log, *arguments = json.loads(line)
        print(run_forked(run, log, arguments), file=answers, flush=True)


if __name__ == "__main__":
    main()
