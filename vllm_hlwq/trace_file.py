"""The file of a trace that still grows: saved by a thread of its own, so that no step waits for the disk.

vLLM gives a server's processes no time to end unless it is told to (``--shutdown-timeout``). So the file has to be good
at any moment, and not only after a shutdown.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

from .errors import ExpertCacheError
from .options import flag
from .routing_log import RoutingLog
from .trace import Header, State
from .vllm_compat import borrow

logger = borrow("init_logger")("vllm.expert_cache")

SAVE_SECONDS = 5.0
"""How often a growing trace is saved; what a crash can cost."""

REST_AFTER_SAVING = 20
"""Times the latest save's duration that the next one waits at least: a large trace takes longer to write."""

Identity = tuple[int, int]
Counters = dict[str, dict[str, int]]


def identity(path: Path) -> Identity | None:
    """Device and inode of a file; None if there is none."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


class TraceFile:
    """A log of routing and its file.

    Attributes:
        log: what has been recorded; grows in the worker's thread.
        state: what the next save says of it.
        own: what tells the file that the last save made from any other of its name, which is never replaced.
    """

    def __init__(self, path: Path, header: Header, log: RoutingLog, save_seconds: float = SAVE_SECONDS) -> None:
        self.path, self.log = path, log
        self.state: State = "running"
        self.own: Identity | None = None
        self._failure = ""
        self._header, self._save_seconds = header, save_seconds
        self._saved: tuple[int, State] = (0, "running")
        self._writing = threading.Lock()
        self._stopped, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to save from time to time."""
        # A daemon: an engine that is never shut down must not keep its process alive.
        self._thread = threading.Thread(target=self._save_as_it_grows, name="expert-trace", daemon=True)
        self._thread.start()

    def end(self, state: State) -> None:
        """Let the thread save what there is with another state, and stop."""
        self.state = state
        self._stopped.set()

    def wait(self) -> None:
        """Stop the thread and wait until it has tried to save."""
        self._closing.set()
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def save(self, counters: Counters | None = None) -> None:
        """Save what has come since the last save; with counters of it in any case.

        Raises:
            ExpertCacheError: it could not be written. Nothing is lost: the next save tries again.
        """
        with self._writing:
            now = (self.log.nbytes, self.state)
            if now == self._saved and counters is None:
                return
            trace = self.log.trace(self._header.model_copy(update={"state": self.state, "counters": counters}))
            try:
                trace.save(self.path, new=self.own is None or identity(self.path) != self.own)
            except OSError as error:
                raise ExpertCacheError(
                    f"{flag('trace')} {self.path} could not be written: {error.strerror or error}; what it held before "
                    "is unchanged, and it is tried again: make room, or move what is in the way"
                ) from None
            self._saved, self.own = now, identity(self.path)
        if self.state != "running":
            logger.info(
                "Expert trace: %s: %d steps, %d bytes, state %s",
                self.path, trace.num_steps, trace.nbytes, trace.header.state,
            )  # fmt: skip

    def save_or_log(self, counters: Counters | None = None) -> bool:
        """As ``save``; a failure is logged, the same one once. Whether it could be written."""
        failure = ""
        try:
            self.save(counters)
        except ExpertCacheError as error:
            failure = str(error)
        if failure and failure != self._failure:
            logger.error("Expert trace: %s", failure)
        self._failure = failure
        return not failure

    def _save_as_it_grows(self) -> None:
        rest = self._save_seconds
        while not self._stopped.wait(rest):
            started = time.monotonic()
            self.save_or_log()
            rest = max(self._save_seconds, REST_AFTER_SAVING * (time.monotonic() - started))
        while self.state != "running" and not self.save_or_log() and not self._closing.wait(self._save_seconds):
            pass
