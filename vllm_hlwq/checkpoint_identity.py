"""Which checkpoint a folder holds, told without reading all of it.

A digest covers ``config.json`` and, of every safetensors file, its name, size and header and ``SAMPLES`` stretches of
its data, which fine-tuning changes as good as surely. Files of the hub's cache are named by their contents' SHA-256:
there the name stands for all that. What a change of few weights leaves in place is seen by the files' modification
times, which are kept apart, since a copy of a model is still that model.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SAMPLES = 64
SAMPLE_BYTES = 16 * 2**10
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CheckpointIdentity:
    """Digests in hexadecimal: ``contents`` is the same for every copy, ``times`` changes when a file is written."""

    contents: str
    times: str


def checkpoint_identity(folder: Path) -> CheckpointIdentity | None:
    """Tell a folder's checkpoint; None if it holds no safetensors file.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    contents, times = hashlib.sha256(), hashlib.sha256()
    config = folder / "config.json"
    contents.update(config.read_bytes() if config.exists() else b"")
    for file in files:
        target = Path(os.path.realpath(file))
        status = target.stat()
        of_hub = target.parent.name == "blobs" and _BLOB.fullmatch(target.name)
        digest = target.name if of_hub else _sampled(target, status.st_size, status.st_mtime_ns)
        contents.update(f"\n{file.name} {status.st_size} {digest}".encode())
        times.update(f"\n{file.name} {digest if of_hub else status.st_mtime_ns}".encode())
    return CheckpointIdentity(contents.hexdigest(), times.hexdigest())


@cache
def _sampled(file: Path, size: int, modified: int) -> str:
    """Digest of a file's header and of stretches at even distances, the last of which ends the file."""
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        descriptor = opened.fileno()
        length = min(int.from_bytes(os.pread(descriptor, 8, 0), "little"), size)
        found.update(os.pread(descriptor, 8 + length, 0))
        last = max(8 + length, size - SAMPLE_BYTES)
        for sample in range(SAMPLES):
            start = 8 + length + (last - 8 - length) * sample // (SAMPLES - 1)
            found.update(os.pread(descriptor, SAMPLE_BYTES, start))
    return found.hexdigest()
