"""A checkpoint's tensors as transformers' loader takes them: by name, read or decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch

from ..checkpoint.reader import HlwqSource
from ..checkpoint.tensor_folder import DTYPE_NAMES
from .coded_weight import CodeFormat
from .coding_plan import codes_of
from .modules import NORMS, PACKED


class LazyTensor:
    """What safetensors calls a slice: a tensor that is made when it is indexed.

    Args:
        read: makes it, on any thread.
        dtype: what it will be.
        shape: likewise.
    """

    def __init__(self, read: Callable[[], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._read = read
        self._dtype = dtype
        self._shape = shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._read()
        return tensor if index is Ellipsis else tensor[index]

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self._dtype]

    def get_shape(self) -> list[int]:
        return list(self._shape)


class SourceTensors:
    """The tensors of one source.

    Args:
        source: the checkpoint.
    """

    def __init__(self, source: HlwqSource) -> None:
        self._source = source
        # transformers reads on several threads; a coder has one set of working memory, and uses all cores by itself.
        self._decoding = Lock()

    def weight(self, name: str) -> LazyTensor:
        """A parameter in 16 bit, or as the checkpoint stores it if it is not coded."""
        parameter = self._source.parameters[name]

        def read() -> torch.Tensor:
            if name in self._source.matrices:
                with self._decoding:
                    return self._source.rows(name, 0, parameter.rows).view(parameter.shape)
            # A copy: what is mapped from a file must not be written to, and a parameter is.
            return self._source.rows(name, 0, parameter.rows).reshape(parameter.shape).clone()

        return LazyTensor(read, parameter.dtype, parameter.shape)

    def codes(self, name: str, layout: CodeFormat) -> dict[str, LazyTensor]:
        """A coded parameter's codes and norms, by the names that coded modules have for them."""
        rows = self._source.parameters[name].shape[:-1]

        def read(part: int) -> torch.Tensor:
            return codes_of(self._source, name)[part]

        return {
            name + PACKED: LazyTensor(partial(read, 0), torch.uint8, (*rows, layout.row_bytes)),
            name + NORMS: LazyTensor(partial(read, 1), torch.int16, (*rows, layout.blocks)),
        }
