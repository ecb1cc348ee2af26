"""What of a model becomes INT4, at which group size, and the tensors that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs

from ..errors import CheckpointError
from ..marlin_shapes import linear_obstacle, marlin_obstacle
from .layouts import Matrix, Vector, expert_biases, expert_matrices, linear_matrix
from .shard import Group, TensorPlan
from .sources import WeightSource

GroupSize = int | Literal["auto"] | None
AUTOMATIC_SIZES = (128, 64, 32)
"""Fewer scales first."""


@dataclass(frozen=True)
class Plan:
    """What becomes INT4, by source parameter, and at which group size."""

    group_size: int | None
    matrices: dict[str, list[Matrix]]
    biases: dict[str, list[Vector]]
    kept_modules: set[str]


_FUSED_BY_VLLM = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linear layers that vLLM makes one of: it refuses a checkpoint that quantises some of them only."""


def _width_and_hidden(matrix: Matrix) -> tuple[int, int]:
    out, columns = matrix.shape
    if matrix.role == "down":
        return columns, out
    return (out // 2 if matrix.role == "gate_up" else out), columns


def _fused_with(module: str) -> list[str]:
    """Names of the modules, there or not, that vLLM fuses with one, itself included."""
    stem, dot, last = module.rpartition(".")
    family = next((family for family in _FUSED_BY_VLLM if last in family), (last,))
    return [f"{stem}{dot}{other}" for other in family]


def choose_group_size(experts: list[Matrix], wanted: GroupSize, path: Path) -> int | None:
    """The group size asked for, or with ``auto`` the largest that every expert's shape admits.

    Raises:
        CheckpointError: vLLM's Marlin kernels take none of them, or not the one asked for.
    """
    shapes: dict[tuple[int, int], str] = {}
    for matrix in experts:
        shapes.setdefault(_width_and_hidden(matrix), matrix.module)

    def obstacle(size: int | None) -> str | None:
        problems = ((module, marlin_obstacle(hidden, width, size)) for (width, hidden), module in shapes.items())
        return next((f"{module}: {problem}" for module, problem in problems if problem), None)

    fitting = [size for size in AUTOMATIC_SIZES if obstacle(size) is None]
    if wanted == "auto" and fitting:
        return fitting[0]
    reason = obstacle(AUTOMATIC_SIZES[-1] if wanted == "auto" else wanted)
    if wanted != "auto" and reason is None:
        return wanted
    remedy = f"--group-size {' or '.join(map(str, fitting))} fits" if fitting else "no group size helps"
    raise CheckpointError(f"{path}: vLLM's Marlin INT4 kernels cannot take {reason}; {remedy}")


def has_experts(source: WeightSource) -> bool:
    """Whether there is anything that an export makes INT4 by default."""
    return any(expert_matrices(source, name) is not None for name in source.parameters)


def plan_export(source: WeightSource, group_size: GroupSize, linears: bool) -> Plan:
    """Sort a model's parameters into INT4 matrices and the rest.

    Raises:
        CheckpointError: there are no experts, or their shapes fit no layout or kernel.
    """
    matrices = {name: found for name in source.parameters if (found := expert_matrices(source, name)) is not None}
    if not matrices:
        raise CheckpointError(f"{source.path}: holds no experts; only mixture-of-experts models are exported")
    experts = [matrix for found in matrices.values() for matrix in found]
    size = choose_group_size(experts, group_size, source.path)
    biases = {name: parts for name in source.parameters if (parts := expert_biases(source, name)) is not None}
    if linears:
        matrices.update(_linears(source, size, matrices))
    kept = {
        module
        for name, parameter in source.parameters.items()
        if name.endswith(".weight") and len(parameter.shape) >= 2 and name not in matrices
        # Where k serves as v, as in Gemma-4's global attention, vLLM still asks for all three.
        for module in _fused_with(name.removesuffix(".weight"))
    }
    return Plan(size, matrices, biases, kept)


def _linears(
    source: WeightSource, group_size: int | None, experts: Mapping[str, list[Matrix]]
) -> dict[str, list[Matrix]]:
    """Linear layers outside the experts that become INT4; of those that vLLM fuses, all or none."""
    found = {}
    for name in source.parameters:
        matrix = None if name in experts else linear_matrix(source, name)
        if matrix is not None and linear_obstacle(*matrix.shape, group_size) is None:
            found[name] = [matrix]
    return {
        name: matrix
        for name, matrix in found.items()
        if all(f"{other}.weight" in found for other in _fused_with(matrix[0].module)
               if f"{other}.weight" in source.parameters)
    }  # fmt: skip


def int4_group(name: str, plan: Plan, arguments: QuantizationArgs, source: WeightSource) -> Group:
    """The INT4 tensors that replace a source parameter: packed codes, scales, shape, and zero points if asymmetric."""
    dtype = scale_dtype(source.parameters[name].dtype)
    tensors = []
    for matrix in plan.matrices[name]:
        rows, columns = matrix.shape
        groups = columns // (plan.group_size or columns)
        tensors += [
            TensorPlan(f"{matrix.stem}weight_packed", torch.int32, (rows, columns // 8)),
            TensorPlan(f"{matrix.stem}weight_scale", dtype, (rows, groups)),
        ]
        if matrix.has_shape:
            tensors.append(TensorPlan(f"{matrix.stem}weight_shape", torch.int64, (2,)))
        if not arguments.symmetric:
            shape = (-(-rows // 8), groups)
            tensors.append(TensorPlan(f"{matrix.stem}weight_zero_point", torch.int32, shape))
    return Group(name, tuple(tensors))


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the scales of a parameter's INT4 matrices."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16
