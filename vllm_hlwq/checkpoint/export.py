"""A 16-bit or HLWQ checkpoint to its INT4 sibling: compressed-tensors ``pack-quantized``, as stock vLLM loads it.

Experts become INT4, one matrix each; what stays in 16 bit is named in ``ignore``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs

from ..errors import CheckpointError
from ..int4_checkpoint import int4_arguments, quantize_weight
from ..marlin_shapes import linear_obstacle, marlin_obstacle
from .conversion import copy_pieces, listed, plain_group, run_with_progress, side_files, task_of
from .int4_source import Int4Source
from .layouts import Matrix, Vector, expert_biases, expert_matrices, linear_matrix
from .reader import HlwqSource
from .shard import Group, TensorPlan
from .sources import PlainSource, WeightSource
from .writer import SHARD_BYTES, FolderWriter

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
    dtype = _scale_dtype(source.parameters[name].dtype)
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


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def export_int4(
    source: WeightSource | Path,
    out: Path,
    group_size: GroupSize = "auto",
    symmetric: bool = True,
    search: bool = True,
    linears: bool = False,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Write the INT4 sibling of a checkpoint.

    Args:
        source: a checkpoint, or the folder of a 16-bit one.
        out: folder to make.
        group_size: input features that share a scale; None for one scale per output channel, ``auto`` for the largest
            that the model's shapes admit.
        symmetric: whether groups have no zero point.
        search: whether each group's scale is the best of several by squared error, not the largest weight's.
        linears: whether linear layers outside the experts become INT4 too, where Marlin takes their shape.
        device: where weights are quantised.
        shard_bytes: size at which a new file is begun.

    Returns:
        What was exported.

    Raises:
        CheckpointError: the source is damaged or incomplete, vLLM's kernels cannot take the experts' shapes, or
            ``out`` cannot be written.
    """
    if isinstance(source, Path):
        source = PlainSource(source)
    _check_whole(source)
    plan = plan_export(source, group_size, linears)
    if plan.biases and not symmetric:
        raise CheckpointError(f"{source.path}: vLLM reads no zero points of experts with biases; export symmetric ones")
    arguments = int4_arguments(plan.group_size, symmetric)
    groups = []
    for name in source.parameters:
        if name in plan.matrices:
            groups.append(int4_group(name, plan, arguments, source))
        elif name in plan.biases:
            dtype = source.parameters[name].dtype
            groups.append(Group(name, tuple(TensorPlan(b.name, dtype, b.shape) for b in plan.biases[name])))
        else:
            groups.append(plain_group(source, name))
    compute = device or torch.device("cpu")
    options = {
        "group_size": plan.group_size, "symmetric": symmetric, "search": search, "linears": linears,
        "shard_bytes": shard_bytes, "device": compute.type,
    }  # fmt: skip
    writer = FolderWriter(out, task_of(source, "export", options), groups, shard_bytes)

    def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        if group.parameter in plan.matrices:
            for matrix in plan.matrices[group.parameter]:
                yield from _quantized(source, group.parameter, matrix, arguments, search, compute)
        elif group.parameter in plan.biases:
            for bias in plan.biases[group.parameter]:
                yield bias.name, bias.read()
        else:
            yield from copy_pieces(source, group.parameter)

    run_with_progress(writer, source, produce, "exporting INT4")
    config = source.config()
    config["quantization_config"] = quantization_config(plan, arguments)
    writer.finish({"config.json": config}, side_files(source))
    return plan


def _check_whole(source: WeightSource) -> None:
    """Refuse a source that makes no whole model."""
    if isinstance(source, Int4Source):
        raise CheckpointError(f"{source.path}: holds INT4 weights already; give the model that they were made from")
    if not source.config():
        raise CheckpointError(f"{source.path}: has no config.json, which vLLM needs; give the folder of a whole model")
    missing = source.missing() if isinstance(source, HlwqSource) else []
    if missing:
        raise CheckpointError(f"{source.path}: {listed(missing)} not in it; give --base-model, which has what it lacks")


def _quantized(
    source: WeightSource,
    name: str,
    matrix: Matrix,
    arguments: QuantizationArgs,
    search: bool,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor]]:
    weight = matrix.read().to(device)
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"{source.path}: {name}, for {matrix.module}, holds NaN or inf; mend the weights before exporting"
        )
    weight = weight.to(_scale_dtype(source.parameters[name].dtype)) if weight.dtype == torch.float32 else weight
    state = quantize_weight(weight, arguments, search)
    if not matrix.has_shape:
        del state["weight_shape"]
    for key, tensor in state.items():
        yield f"{matrix.stem}{key}", tensor


def quantization_config(plan: Plan, arguments: QuantizationArgs) -> dict[str, Any]:
    """``quantization_config`` of an exported checkpoint, with every module that stays in 16 bit in ``ignore``."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # A tied head is no tensor of its own, but vLLM makes a module of it.
        "ignore": sorted(plan.kept_modules | {"lm_head"}),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments.model_dump(mode="json", exclude_none=True),
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
