"""What the converters read: a model's parameters by name, a range of rows at a time.

``PlainSource`` reads 16-bit checkpoints, ``HlwqSource`` (reader.py) coded ones; the converters do not know which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError
from .tensor_folder import TensorFolder

PIECE_BYTES = 64 * 2**20
"""Weights in float32 that are worked on at a time."""


@dataclass(frozen=True)
class Parameter:
    """A parameter as a model sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Rows over all leading dimensions; a vector or scalar is one row."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """A model's parameters."""

    @property
    def path(self) -> Path: ...

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[stop - start, columns]`` of a parameter, leading dimensions flattened. Do not write to it."""
        ...

    def config(self) -> dict[str, Any]: ...

    def folders(self) -> list[TensorFolder]:
        """The folders that tensors come from."""
        ...


def pieces(parameter: Parameter, rows_multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``PIECE_BYTES`` in float32 that cover a parameter; they start at multiples."""
    step = max(1, PIECE_BYTES // (4 * max(1, parameter.columns) * rows_multiple)) * rows_multiple
    for start in range(0, parameter.rows, step):
        yield start, min(parameter.rows, start + step)


def check_finite(rows: torch.Tensor, folder: TensorFolder, name: str) -> None:
    """Refuse NaN and inf.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    if rows.dtype.is_floating_point:
        wide = rows if rows.dtype.itemsize > 1 else rows.float()  # 8-bit floats have no isfinite
        if not bool(wide.isfinite().all()):
            raise CheckpointError(
                f"{folder.tensors[name].file}: tensor {name} holds NaN or inf; download or make the model again"
            )


def plain_rows(folder: TensorFolder, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows ``[stop - start, columns]`` of a tensor that is stored as it is, memory-mapped.

    Raises:
        CheckpointError: one of them is not finite.
    """
    tensor = folder.tensor(name)
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), columns)[start:stop]
    check_finite(rows, folder, name)
    return rows


class PlainSource:
    """A 16-bit checkpoint.

    Args:
        path: its folder.

    Raises:
        CheckpointError: the folder cannot be read, or its weights are quantised already.
    """

    def __init__(self, path: Path) -> None:
        self.folder = TensorFolder(path)
        self.path = path
        quantization = self.folder.config().get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(f"{path}: its weights are quantised already ({method!r}); give the 16-bit original")
        self.parameters = {name: Parameter(info.shape, info.dtype) for name, info in self.folder.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        parameter = self.parameters[name]
        return self.folder.tensor(name).reshape(parameter.rows, parameter.columns)[start:stop]

    def config(self) -> dict[str, Any]:
        return self.folder.config()

    def folders(self) -> list[TensorFolder]:
        return [self.folder]
