"""How counters cross from worker processes to /metrics: files in memory, in the format of Prometheus's own client.

Every rank writes its values into small mapped files of a folder, and whoever serves /metrics adds them up when it is
asked, with the client's ``MultiProcessCollector``. So nothing is sent, no process waits for another, and with several
API servers, where vLLM itself works this way, the folder is vLLM's. The folder's path follows from the configuration's
``instance_id``, which is the same in all processes of an engine, and is not hashed as ``additional_config`` is.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from .metrics import Metric

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Set when several processes serve /metrics, to the folder whose files they add up: by vLLM, or by the user."""


PREFIX = "vllm-hlwq-metrics-"

FILE_BYTES = 2**20
"""What a file takes from the beginning: all series of 64 layers apart, three times."""

YOUNG_SECONDS = 60.0
"""How long a folder may be without its owner's lock, which is taken after it is made."""

_held: dict[Path, int] = {}


def folder_of(instance_id: str) -> Path:
    """Where the ranks of an engine write; the folder is there only if the engine's metrics are exposed."""
    return Path(tempfile.gettempdir()) / f"{PREFIX}{instance_id}"


def create_folder(vllm_config: Any) -> Path:
    """Make the folder of a new engine, before its processes start; it goes when this process exits.

    It is a link to ``PROMETHEUS_MULTIPROC_DIR`` where that is set. If another engine has the name, the configuration
    gets a new id. What processes left that were killed is removed.
    """
    _remove_abandoned()
    shared = os.environ.get(MULTIPROCESS_VARIABLE)
    while True:
        folder = folder_of(vllm_config.instance_id)
        try:
            if shared:
                folder.symlink_to(os.path.abspath(shared), target_is_directory=True)
            else:
                folder.mkdir(mode=0o700)
                with suppress(OSError):  # a file system without locks: then nothing is ever taken for abandoned either
                    _held[folder] = _locked(folder)
        except FileExistsError:
            vllm_config.instance_id = uuid.uuid4().hex
        else:
            break
    atexit.register(_remove, folder, os.getpid())
    return folder


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder against ``_remove_abandoned``, here and in forks, until it is closed.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process's, held by it, or gone
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < YOUNG_SECONDS:
                continue
            if folder.is_symlink():
                if not folder.exists():
                    folder.unlink()
            else:
                descriptor = _locked(folder)
                try:
                    shutil.rmtree(folder)
                finally:
                    os.close(descriptor)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork inherits exit handlers
        return
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
        if folder in _held:
            os.close(_held.pop(folder))


def _allocated(path: Path) -> MmapedDict:
    """A file whose bytes are all there: a write to a mapped byte that the disk has no room for would end the process.

    Raises:
        OSError: there is no room; no file is left.
    """
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return MmapedDict(str(path))


class MetricFiles:
    """The files of one rank. One thread writes.

    Args:
        folder: where they lie.
        labels: labels of every series.

    Raises:
        OSError: the folder has no room for them.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        # Not the client's own name, which is the process: the folder can be vLLM's.
        name = f"hlwq-{uuid.uuid4().hex}.db"
        counters, gauges = folder / f"counter_{name}", folder / f"gauge_sum_{name}"
        self._files = {"counter": _allocated(counters)}
        try:
            self._files["gauge"] = _allocated(gauges)
        except OSError:
            self._files["counter"].close()
            counters.unlink()
            raise

    def write(self, values: Mapping[tuple[Metric, str], float]) -> None:
        """Set the value of each metric and layer; a series whose layer is empty gets no such label."""
        for (metric, layer), value in values.items():
            labels = {**self._labels, "layer": layer} if layer else self._labels
            names, of_names = list(labels), list(labels.values())
            key = mmap_key(metric.name, metric.exposed_name, names, of_names, metric.documentation)
            self._files[metric.kind].write_value(key, float(value), 0.0)

    def close(self) -> None:
        """Unmap the files; what was written stays until the folder goes."""
        for file in self._files.values():
            file.close()
