"""The tensors of a model folder: which file holds which, memory-mapped, one tensor at a time.

Reads safetensors files only, and only files that lie in the folder. Everything that is wrong with a file is said with
the file's and, where there is one, the tensor's name before the first tensor is used.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint_files import REMEDY, check_file
from ..errors import CheckpointError, ExpertCacheError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_REMEDY = "it can run any code when it is read; save the model with transformers' save_pretrained first"
POLAR_STATE = "polar_state.safetensors"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor is and what it looks like."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; ``what`` is named in errors.

    Raises:
        CheckpointError: it is no JSON object, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{what}: names {twice!r} twice; {REMEDY}")
        return found

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON ({error}); {REMEDY}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: holds no JSON object; {REMEDY}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or unreadable, holds no object, or names a key twice.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no ordinary file; {REMEDY}")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    return parse_json(text, str(path))


class TensorFolder:
    """The tensors of one folder, or of one safetensors file.

    Args:
        path: a folder with ``*.safetensors`` and perhaps an index, or a safetensors file.

    Raises:
        CheckpointError: nothing to read, a damaged or missing file, a tensor named twice or not where the index says,
            a file outside the folder, or pickles in place of safetensors.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.exists(path):  # Path.exists raises where a name is too long
            raise CheckpointError(f"{path}: does not exist; give the folder of a downloaded model")
        self.path = path if path.is_dir() else path.parent
        self.files, expected = self._discover(path)
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            self._add(file)
        for name, file_name in expected.items():
            info = self.tensors.get(name)
            if info is None or info.file.name != file_name:
                where = "no file holds it" if info is None else f"it is in {info.file.name}"
                raise CheckpointError(f"{self.path / file_name}: tensor {name} is missing there, {where}; {REMEDY}")
        if not self.tensors:
            raise CheckpointError(f"{path}: holds no tensor; {REMEDY}")

    def _discover(self, path: Path) -> tuple[list[Path], dict[str, str]]:
        """Files to read, and the file name that the index gives for each tensor."""
        if not path.is_dir():
            return [self.inside(path)], {}
        indices = sorted(path.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            names = ", ".join(index.name for index in indices)
            raise CheckpointError(f"{path}: several indices ({names}); keep the one that is meant")
        if indices:
            weight_map = read_json(self.inside(indices[0])).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{indices[0]}: has no weight_map of tensors to files; {REMEDY}")
            files = [self._listed(path, name, indices[0].name) for name in sorted(set(weight_map.values()))]
            unlisted = path / POLAR_STATE
            if unlisted.exists() and unlisted not in files:
                raise CheckpointError(f"{unlisted}: lies beside {indices[0].name}, which does not list it; remove one")
            return files, weight_map
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES]
            if pickles:
                raise CheckpointError(f"{path / pickles[0]}: a pickle, not a safetensors file; {PICKLE_REMEDY}")
            raise CheckpointError(f"{path}: holds no safetensors file; give the folder of a downloaded model")
        return [self.inside(file) for file in files], {}

    def _listed(self, folder: Path, name: str, index: str) -> Path:
        if os.path.basename(name) == name and name.endswith(PICKLE_SUFFIXES):
            raise CheckpointError(f"{folder / name}: a pickle, not a safetensors file; {PICKLE_REMEDY}")
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / index}: {name!r} is no safetensors file of this folder; {REMEDY}")
        if not os.path.exists(folder / name):
            raise CheckpointError(f"{folder / name}: listed in {index} but missing; {REMEDY}")
        return self.inside(folder / name)

    def inside(self, file: Path) -> Path:
        """Refuse links that lead out of the folder, but for the hub cache's own, from snapshots to blobs."""
        # realpath: Path.resolve raises where links go in circles.
        folder, target = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
        hub_blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
        if target.parent not in (folder, hub_blobs):
            raise CheckpointError(f"{file}: a link that leads out of its folder; copy the file there")
        return file

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file}: is no ordinary file; {REMEDY}")
        try:
            check_file(file)
        except ExpertCacheError as error:
            # A header of 640 bytes starts like a pickle too, so only what is no safetensors file is asked.
            raise self._pickle(file) or CheckpointError(str(error)) from None
        self._check_header(file)
        opened = self._opened(file)
        if "trace" in (opened.metadata() or {}):
            raise CheckpointError(
                f"{file}: a trace of routing, which `hlwq simulate` reads; give the folder of a model"
            )
        for name in opened.keys():  # noqa: SIM118 - safe_open's handle is no mapping
            view = opened.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{file}: tensor {name} has the unknown dtype {view.get_dtype()}; update vllm-hlwq"
                )
            if name in self.tensors:
                raise CheckpointError(f"{file}: tensor {name} is also in {self.tensors[name].file.name}; {REMEDY}")
            self.tensors[name] = TensorInfo(file, dtype, tuple(view.get_shape()))

    def _pickle(self, file: Path) -> CheckpointError | None:
        try:
            with file.open("rb") as raw:
                start = raw.read(4)
        except OSError as error:
            return CheckpointError(f"{file}: cannot be read ({error.strerror}); {REMEDY}")
        if not start.startswith(PICKLE_STARTS):
            return None
        return CheckpointError(f"{file}: a pickle, not a safetensors file; {PICKLE_REMEDY}")

    def _check_header(self, file: Path) -> None:
        """Refuse a header that names a tensor twice; safetensors would take one of the two."""
        with file.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            parse_json(raw.read(length), f"{file}: its header")

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: cannot be opened ({error}); {REMEDY}") from None
        return self._open[file]

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor, memory-mapped: no copy is made, and it must not be written to.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: holds no tensor {name}; {REMEDY}")
        file = self.tensors[name].file
        try:
            return self._opened(file).get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read ({error}); {REMEDY}") from None

    def close(self) -> None:
        """Forget open files; their mappings go when no tensor refers to them."""
        self._open.clear()

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        yield from self.tensors.items()

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if there is none.

        Raises:
            CheckpointError: it is a link that leads out of the folder, or no JSON object.
        """
        path = self.path / name
        return read_json(self.inside(path)) if os.path.lexists(path) else None

    def config(self) -> dict[str, Any]:
        """The folder's ``config.json``; empty if there is none."""
        return self.json("config.json") or {}
