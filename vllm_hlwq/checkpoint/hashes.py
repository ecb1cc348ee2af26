"""The list of SHA-256 sums, dtypes and shapes that our writers put beside the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .metadata import HASHES
from .tensor_folder import DTYPE_NAMES, TensorFolder

REMEDY = "download or convert the checkpoint again"


def byte_view(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes without a copy, if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def describe(dtype: torch.dtype, shape: tuple[int, ...], digest: str) -> dict[str, Any]:
    """An entry of the list."""
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "sha256": digest}


class HashList:
    """Sums of a folder's tensors; each is computed at most once."""

    def __init__(self, folder: TensorFolder, entries: dict[str, Any]) -> None:
        self.folder = folder
        self.entries = entries
        self._checked: set[str] = set()
        self._ahead: dict[str, Future[None]] = {}
        self._check_names()

    @classmethod
    def read(cls, folder: TensorFolder) -> HashList | None:
        """The list of a folder; None if it has none.

        Raises:
            CheckpointError: the list is unreadable, or names other tensors, dtypes or shapes than the files hold.
        """
        entries = folder.json(HASHES)
        return None if entries is None else cls(folder, entries)

    def _check_names(self) -> None:
        path = self.folder.path / HASHES
        for name, info in self.folder.items():
            entry = self.entries.get(name)
            if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
                raise CheckpointError(f"{info.file}: tensor {name} is not in {path.name}; {REMEDY}")
            if entry != describe(info.dtype, info.shape, entry["sha256"]):
                raise CheckpointError(
                    f"{info.file}: tensor {name} is {DTYPE_NAMES[info.dtype]} {list(info.shape)}, "
                    f"{path.name} says {entry.get('dtype')} {entry.get('shape')}; {REMEDY}"
                )
        absent = next((name for name in self.entries if name not in self.folder.tensors), None)
        if absent is not None:
            raise CheckpointError(f"{path}: lists tensor {absent}, which no file holds; {REMEDY}")

    @cached_property
    def _hashing(self) -> ThreadPoolExecutor:
        """Made when it is needed: who only asks what a folder holds, and then forks, has no thread."""
        return ThreadPoolExecutor(1, "hashing")

    def check_ahead(self, names: Iterable[str]) -> None:
        """Begin to compute the sums of tensors that will be asked for next, beside what the caller does until then."""
        for name in names:
            if name not in self._checked and name not in self._ahead:
                self._ahead[name] = self._hashing.submit(self._compare, name)

    def check(self, name: str) -> None:
        """Compare a tensor's bytes with its sum, the first time it is asked for.

        Raises:
            CheckpointError: they differ.
        """
        if name in self._checked:
            return
        begun = self._ahead.get(name)
        if begun is None:
            self._compare(name)
        else:
            begun.result()
        self._checked.add(name)

    def _compare(self, name: str) -> None:
        digest = hashlib.sha256(byte_view(self.folder.tensor(name))).hexdigest()
        if digest != self.entries[name]["sha256"]:
            file: Path = self.folder.tensors[name].file
            raise CheckpointError(f"{file}: tensor {name} is damaged, its SHA-256 is not the listed one; {REMEDY}")
