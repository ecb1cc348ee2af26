"""Writes a model folder: in shards, streamed, resumable, verified, and there as a whole or not at all.

Everything is written to ``OUT.partial`` beside the wanted folder, which only takes its name when all shards have been
read back and held to their sums. An interrupted conversion leaves finished shards there; the same command takes them
up again after checking them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import CheckpointError
from .hashes import HashList
from .metadata import HASHES, parse
from .shard import Group, Produce, shard_index, shard_name, shards_of, sync, write_shard
from .tensor_folder import TensorFolder, read_json

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"
_PROGRESS = ".hlwq_progress.json"
"""Hidden, so that it is no name of a file to copy."""


class _FinishedShard(BaseModel):
    tensors: dict[str, dict[str, Any]]
    notes: dict[str, Any]


class _Progress(BaseModel):
    """What an unfinished conversion is of, and how far it has come."""

    task: dict[str, Any]
    shards: dict[str, _FinishedShard]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one, so that it is never there in part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # writing names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


class FolderWriter:
    """One conversion into one folder.

    Args:
        out: the folder to make; it must not exist, or be empty.
        task: what is converted and how, as JSON values; an unfinished conversion is only taken up by an equal task.
        groups: every tensor to write.
        shard_bytes: size at which a new shard is opened.

    Raises:
        CheckpointError: ``out`` is not empty, an unfinished conversion of something else is in its place, or another
            process is at it.
    """

    def __init__(self, out: Path, task: dict[str, Any], groups: list[Group], shard_bytes: int = SHARD_BYTES) -> None:
        self.out = out if out.name not in ("", "..") else out.resolve()
        self._task = json.loads(json.dumps(task))
        if self.out.name:  # all but the root folder
            self.work = self.out.with_name(self.out.name + ".partial")
            self._take_back()
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise CheckpointError(f"{out}: exists and is not an empty folder; choose another")
        if out.resolve().is_mount():
            raise CheckpointError(f"{out}: is a mount point, which cannot take a folder's place; choose one inside it")
        self.shards = shards_of(groups, shard_bytes)
        self._entries: dict[str, Any] = {}
        self._notes: dict[str, Any] = {}
        self._finished: dict[str, _FinishedShard] = {}
        self._held: int | None = None
        self._begin()

    def _take_back(self) -> None:
        """Make a folder an unfinished one again that an equal task had named, but not finished, when it was killed."""
        progress = self.out / _PROGRESS
        if self.out.is_symlink() or os.path.lexists(self.work) or not progress.is_file():
            return
        with suppress(CheckpointError):  # what is unreadable is not ours to take
            if read_json(progress).get("task") == self._task and not self._is_being_finished():
                self.out.replace(self.work)

    def _is_being_finished(self) -> bool:
        descriptor = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
        finally:
            os.close(descriptor)
        return False

    def _begin(self) -> None:
        """Make the working folder, or take up the one that an equal task left."""
        progress = self.work / _PROGRESS
        in_the_way = CheckpointError(f"{self.work}: is in the way of the conversion; remove it")
        if self.work.is_symlink() or (self.work.exists() and not self.work.is_dir()):
            raise in_the_way
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock()
            if progress.is_file():
                self._resume(progress)
            elif any(path.name != f"{_PROGRESS}.tmp" for path in self.work.iterdir()):
                raise in_the_way
            else:
                self._save_progress()
        except OSError as error:
            self.release()
            raise self._failed(progress, error) from None
        except CheckpointError:
            self.release()
            raise

    def _lock(self) -> None:
        """Hold the working folder against a second process; the system lets go of it with this one."""
        self._held = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.work}: another conversion is writing there; wait for it to end") from None
        except OSError:
            self.release()  # a file system without locks

    def release(self) -> None:
        """Let another process take up the working folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _resume(self, progress: Path) -> None:
        try:
            state: _Progress = parse(_Progress, read_json(progress), progress)
        except CheckpointError as error:
            raise CheckpointError(f"{self.work}: cannot be taken up ({error}); remove it") from None
        if state.task != self._task:
            raise CheckpointError(
                f"{self.work}: holds an unfinished conversion of another source or with other options; remove it"
            )
        self._finished = state.shards
        for leftover in self.work.glob("*.tmp"):
            leftover.unlink()

    def _save_progress(self) -> None:
        write_json(self.work / _PROGRESS, _Progress(task=self._task, shards=self._finished).model_dump())

    def _failed(self, path: Path, error: OSError) -> CheckpointError:
        # The record of progress is written for the sake of a shard, which is what a user knows of.
        known = error.filename not in (None, str(self.work / _PROGRESS))
        remedy = "make room or choose another folder, then run the same command: finished shards are kept"
        if not self.work.is_dir() and error.errno != errno.ENOSPC:
            remedy = "choose another folder"
        return CheckpointError(
            f"{error.filename if known else path}: cannot be written ({error.strerror or error}); {remedy}"
        )

    @property
    def notes(self) -> dict[str, Any]:
        """What ``note`` was told, over all shards, also those finished by an earlier attempt."""
        return self._notes

    def note(self, key: str, value: Any) -> None:
        """Remember a JSON value with the shard that is being written."""
        self._notes[key] = value

    def run(self, produce: Produce, advance: Callable[[Group], None]) -> None:
        """Write every shard that is not finished.

        Args:
            produce: makes the tensors of a group.
            advance: called when a group is done, also by an earlier attempt.

        Raises:
            CheckpointError: a finished shard was changed, or the disk is full.
        """
        try:
            for index, groups in enumerate(self.shards):
                path = self.work / shard_name(index, len(self.shards))
                if path.name in self._finished and path.is_file():
                    self._take_up(path)
                else:
                    self._make(path, groups, produce)
                for group in groups:
                    advance(group)
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise self._failed(path, error) from None
            raise

    def _make(self, path: Path, groups: list[Group], produce: Produce) -> None:
        before = set(self._notes)
        entries = write_shard(path, groups, produce)
        notes = {key: value for key, value in self._notes.items() if key not in before}
        self._finished[path.name] = _FinishedShard(tensors=entries, notes=notes)
        self._entries.update(entries)
        self._save_progress()

    def _take_up(self, path: Path) -> None:
        finished = self._finished[path.name]
        try:
            hashes = HashList(TensorFolder(path), finished.tensors)
            for name in hashes.entries:
                hashes.check(name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: was finished by an earlier attempt and is damaged now; remove it and run the same command "
                f"({error})"
            ) from None
        self._entries.update(finished.tensors)
        self._notes.update(finished.notes)

    def _remove_others(self) -> None:
        """Remove what an earlier attempt copied: the source may have it no longer."""
        own = {_PROGRESS, *(shard_name(index, len(self.shards)) for index in range(len(self.shards)))}
        for path in self.work.iterdir():
            if path.name not in own and not path.is_dir():
                path.unlink()

    def finish(self, files: dict[str, Any], copies: list[Path]) -> None:
        """Write the index and the other files, read all weights back, and give the folder its name.

        Args:
            files: JSON contents by file name.
            copies: files to copy beside the weights.

        Raises:
            CheckpointError: what was read back is not what was written, or the disk is full.
        """
        try:
            self._remove_others()
            for path in copies:
                shutil.copyfile(path, self.work / path.name)
            for name, content in files.items():
                write_json(self.work / name, content)
            write_text(self.work / HASHES, json.dumps(self._entries, separators=(",", ":")) + "\n")
            if len(self.shards) > 1:
                write_json(self.work / INDEX, shard_index(self.shards))
            hashes = HashList.read(TensorFolder(self.work))
            assert hashes is not None
            for name in hashes.entries:
                hashes.check(name)
            for path in (*self.work.iterdir(), self.work):
                sync(path)
            self.work.replace(self.out)
            # Last, so that a conversion cut off before the folder had its name can still be taken up.
            (self.out / _PROGRESS).unlink()
            sync(self.out)
            sync(self.out.parent)
        except OSError as error:
            raise self._failed(self.work, error) from None
        finally:
            self.release()
