"""A 16-bit or HLWQ checkpoint to its INT4 sibling: compressed-tensors ``pack-quantized``, as stock vLLM loads it.

Experts become INT4, one matrix each; what stays in 16 bit is named in ``ignore``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from ..errors import CheckpointError
from ..int4_checkpoint import int4_arguments, quantize_weight
from .conversion import copy_pieces, listed, plain_group, run_with_progress, side_files, task_of, whole_tensors
from .export_plan import GroupSize, Plan, int4_group, plan_export, scale_dtype
from .int4_source import Int4Source
from .layouts import Matrix
from .reader import HlwqSource
from .shard import Group, TensorPlan
from .sources import PlainSource, WeightSource
from .writer import SHARD_BYTES, FolderWriter


class Int4Export:
    """The INT4 sibling of a checkpoint, made tensor by tensor: for a folder, or for a model that is being loaded.

    Args:
        source: a checkpoint, or the folder of a 16-bit one.
        group_size: input features that share a scale; None for one scale per output channel, ``auto`` for the largest
            that the model's shapes admit.
        symmetric: whether groups have no zero point.
        search: whether each group's scale is the best of several by squared error, not the largest weight's.
        linears: whether linear layers outside the experts become INT4 too, where Marlin takes their shape.
        device: where weights are quantised.

    Attributes:
        plan: what becomes INT4.
        groups: all tensors, by source parameter.

    Raises:
        CheckpointError: the source is incomplete, or vLLM's kernels cannot take the experts' shapes.
    """

    def __init__(
        self,
        source: WeightSource | Path,
        group_size: GroupSize = "auto",
        symmetric: bool = True,
        search: bool = True,
        linears: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.source = PlainSource(source) if isinstance(source, Path) else source
        _check_whole(self.source)
        self.plan = plan_export(self.source, group_size, linears)
        if self.plan.biases and not symmetric:
            raise CheckpointError(
                f"{self.source.path}: vLLM reads no zero points of experts with biases; export symmetric ones"
            )
        self.arguments = int4_arguments(self.plan.group_size, symmetric)
        self.device = device or torch.device("cpu")
        self.options = {
            "group_size": self.plan.group_size, "symmetric": symmetric, "search": search, "linears": linears,
            "device": self.device.type,
        }  # fmt: skip
        self.groups = [self._group(name) for name in self.source.parameters]

    def _group(self, name: str) -> Group:
        if name in self.plan.matrices:
            return int4_group(name, self.plan, self.arguments, self.source)
        if name in self.plan.biases:
            dtype = self.source.parameters[name].dtype
            return Group(name, tuple(TensorPlan(b.name, dtype, b.shape) for b in self.plan.biases[name]))
        return plain_group(self.source, name)

    def produce(self, group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        """A group's tensors in pieces: their rows, from the first on.

        Raises:
            CheckpointError: a weight is damaged.
        """
        if group.parameter in self.plan.matrices:
            for matrix in self.plan.matrices[group.parameter]:
                yield from _quantized(
                    self.source, group.parameter, matrix, self.arguments, bool(self.options["search"]), self.device
                )
        elif group.parameter in self.plan.biases:
            for bias in self.plan.biases[group.parameter]:
                yield bias.name, bias.read()
        else:
            yield from copy_pieces(self.source, group.parameter)

    def tensors(self, group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        """A group's tensors, whole, in the shapes that its files would have."""
        return whole_tensors(group, self.produce(group))

    def config(self) -> dict[str, Any]:
        """``config.json`` of the sibling."""
        return self.source.config() | {"quantization_config": quantization_config(self.plan, self.arguments)}


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
        source, group_size, symmetric, search, linears, device: as for ``Int4Export``.
        out: folder to make.
        shard_bytes: size at which a new file is begun.

    Returns:
        What was exported.

    Raises:
        CheckpointError: the source is damaged or incomplete, vLLM's kernels cannot take the experts' shapes, or
            ``out`` cannot be written.
    """
    export = Int4Export(source, group_size, symmetric, search, linears, device)
    task = task_of(export.source, "export", export.options | {"shard_bytes": shard_bytes})
    copies = side_files(export.source)
    writer = FolderWriter(out, task, export.groups, shard_bytes)
    run_with_progress(writer, export.source, export.produce, "exporting INT4")
    writer.finish({"config.json": export.config()}, copies)
    return export.plan


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
    weight = weight.to(scale_dtype(source.parameters[name].dtype)) if weight.dtype == torch.float32 else weight
    try:
        state = quantize_weight(weight, arguments, search)
    except ValueError as problem:
        raise CheckpointError(
            f"{source.path}: {name}, for {matrix.module}, {problem}; mend the weights before exporting"
        ) from None
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
