"""Files that are under their name only when they are whole, also where several processes write the same one.

Each writer has a temporary file of its own beside the file, which it locks. One that is not locked was left by a
process that was killed, and the next writer removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path, new: bool = False) -> Iterator[int]:
    """A file descriptor to write with, whose file takes the place of ``path`` when the block ends without an error.

    Where ``path`` is a link, what it points to is replaced.

    Args:
        path: of the file.
        new: whether something of this name is to be left alone.

    Raises:
        OSError: the file cannot be written; ``path`` is as it was, and nothing is left beside it.
    """
    path = Path(os.path.realpath(path))
    if new and os.path.lexists(path):
        raise _exists(path)
    _remove_abandoned(path)
    temporary, descriptor = _locked_file(path)
    try:
        yield descriptor
        os.fsync(descriptor)
        if new:
            _name(temporary, path)
        else:
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _name(temporary: Path, path: Path) -> None:
    """Rename a file, but never replace one."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise _exists(path) from None
        temporary.replace(path)
    else:
        temporary.unlink()


def _locked_file(path: Path) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{SUFFIX}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        with suppress(OSError):  # a file system without locks: then nothing is ever taken for abandoned either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    for temporary in path.parent.glob(f"{path.name}.*{SUFFIX}"):
        with suppress(OSError):  # written by someone else right now, or gone
            descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(descriptor)
