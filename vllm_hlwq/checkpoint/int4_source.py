"""Reads an INT4 checkpoint matrix by matrix, to compare it with what it was made from."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from pydantic import ValidationError

from ..checkpoint_files import REMEDY
from ..errors import CheckpointError
from ..int4_checkpoint import dequantize_weight
from .tensor_folder import TensorFolder

PARTS = ("weight_packed", "weight_scale", "weight_shape")


def is_int4(folder: TensorFolder) -> bool:
    """Does a folder hold compressed-tensors ``pack-quantized`` weights?"""
    return any(name.endswith(".weight_packed") for name in folder.tensors)


class Int4Source:
    """The INT4 matrices of a folder.

    Raises:
        CheckpointError: a matrix lacks a part, its parts disagree, or the configuration does not describe it.
    """

    def __init__(self, path: Path) -> None:
        self.folder = TensorFolder(path)
        self.arguments = self._arguments()
        self.modules = [n.removesuffix(".weight_packed") for n in self.folder.tensors if n.endswith(".weight_packed")]
        for module in self.modules:
            self._check(module)

    def _arguments(self) -> QuantizationArgs:
        path = self.folder.path / "config.json"
        try:
            groups = self.folder.config()["quantization_config"]["config_groups"]
            (group,) = groups.values()
            arguments = QuantizationArgs.model_validate(group["weights"])
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as problem:
            raise CheckpointError(f"{path}: describes no single INT4 scheme ({problem!r:.80}); {REMEDY}") from None
        if arguments.num_bits != 4:
            raise CheckpointError(f"{path}: weights are of {arguments.num_bits} bits, not 4; only INT4 is understood")
        return arguments

    def _check(self, module: str) -> None:
        tensors = self.folder.tensors
        missing = next((part for part in PARTS if f"{module}.{part}" not in tensors), None)
        if missing is not None:
            raise CheckpointError(f"{self.folder.path}: {module}.{missing} is missing; {REMEDY}")
        shape = tensors[f"{module}.weight_shape"]
        if shape.dtype != torch.int64 or shape.shape != (2,):
            raise CheckpointError(f"{shape.file}: {module}.weight_shape is not two int64 values; {REMEDY}")
        rows, columns = self.folder.tensor(f"{module}.weight_shape").tolist()
        packed, scale = tensors[f"{module}.weight_packed"].shape, tensors[f"{module}.weight_scale"].shape
        groups = columns // (self.arguments.group_size or columns or 1) if (self.arguments.group_size or 0) >= 0 else 1
        if packed != (rows, -(-columns // 8)) or scale != (rows, groups):
            raise CheckpointError(
                f"{shape.file}: {module} is {rows} x {columns} by its weight_shape, but has codes {list(packed)} and "
                f"scales {list(scale)}; {REMEDY}"
            )

    def weight(self, module: str) -> torch.Tensor:
        """The matrix ``[out, in]`` of a module, in the scale's dtype.

        Raises:
            CheckpointError: a scale is not finite.
        """
        state = {part: self.folder.tensor(f"{module}.{part}") for part in PARTS}
        if not self.arguments.symmetric:
            state["weight_zero_point"] = self.folder.tensor(f"{module}.weight_zero_point")
        if not bool(state["weight_scale"].isfinite().all()):
            raise CheckpointError(f"{self.folder.path}: {module}.weight_scale holds NaN or inf; {REMEDY}")
        return dequantize_weight(state, self.arguments)
