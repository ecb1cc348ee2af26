"""A model folder's tensors as vLLM is given them, with one matrix an expert: names, dtypes and shapes, no weight.

INT4 checkpoints are taken as they are, stacks of 16-bit experts apart, and HLWQ checkpoints stand for their INT4
export, which is what is served. A folder without weights is asked for its ``config.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .checkpoint.architecture import parameter_shapes
from .checkpoint.conversion import listed
from .checkpoint.export_plan import GroupSize, int4_group, plan_export
from .checkpoint.int4_source import is_int4
from .checkpoint.layouts import expert_matrices, linear_matrix
from .checkpoint.reader import HlwqSource, is_hlwq
from .checkpoint.sources import Parameter, PlainSource, WeightSource
from .checkpoint.tensor_folder import TensorFolder, read_json
from .checkpoint_files import INDEX, REMEDY
from .checkpoint_sizes import Tensor
from .errors import CheckpointError
from .int4_checkpoint import int4_arguments

INT4, HLWQ, PLAIN = "INT4", "HLWQ", "16 bit"
INT4_WEIGHTS = {"num_bits": 4, "type": "int"}
PATTERN = "re:"
"""What a regular expression in compressed-tensors' list of ignored modules begins with."""


@dataclass(frozen=True)
class ServedCheckpoint:
    """What vLLM would load.

    format: of the experts in the folder: ``INT4``, ``HLWQ`` or ``16 bit``.
    tensors: by name, as loaded.
    """

    format: str
    tensors: Mapping[str, Tensor]


class ShapeSource:
    """A model of which only ``config.json`` is there: parameters in 16 bit as transformers would build them.

    Raises:
        CheckpointError: transformers cannot, or the folder's index was made of other weights.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._config = config
        shapes = parameter_shapes(config)
        if not shapes:
            raise CheckpointError(
                f"{path}: holds no weights, and transformers cannot tell their shapes from config.json "
                f"(model_type {config.get('model_type')!r}); download the model"
            )
        self.parameters = {name: Parameter(shape, torch.bfloat16) for name, shape in shapes.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise CheckpointError(f"{self.path}: {name} is not there, only its shape is known")

    def config(self) -> dict[str, Any]:
        return self._config

    def folders(self) -> list[TensorFolder]:
        return []


def model_folder(model: str, revision: str | None) -> Path | None:
    """Where a model's files lie: the folder itself, or for a name of the hub what its cache holds; None if nothing."""
    if Path(model).is_dir():
        return Path(model)
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def served_checkpoint(path: Path) -> ServedCheckpoint:
    """Read headers, or where there are no weights the configuration.

    Raises:
        CheckpointError: the folder is damaged or incomplete, or its weights are of a format that is not known.
    """
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / "config.json").exists():
        return _from_configuration(path, read_json(path / "config.json"))
    folder = TensorFolder(path)
    if is_int4(folder):
        return ServedCheckpoint(INT4, folder.tensors)
    if is_hlwq(path):
        source = HlwqSource(path, need_tables=False)
        missing = source.missing()
        if missing:
            raise CheckpointError(f"{path}: {listed(missing)} not in it, so what is served is not known")
        return _exported(HLWQ, source, "auto", symmetric=True)
    return _unfused(PlainSource(path))


def _from_configuration(path: Path, config: dict[str, Any]) -> ServedCheckpoint:
    source = ShapeSource(path, {key: value for key, value in config.items() if key != "quantization_config"})
    quantization = config.get("quantization_config")
    if quantization is None:
        served = _unfused(source)
    else:
        group_size, symmetric = _int4_settings(path, quantization)
        _check_ignored(source, quantization.get("ignore") or [])
        served = _exported(INT4, source, group_size, symmetric)
    _check_index(path / INDEX, served.tensors)
    return served


def _int4_settings(path: Path, quantization: Any) -> tuple[GroupSize, bool]:
    """Group size and symmetry of INT4 experts, from a compressed-tensors configuration with one group."""
    settings = quantization if isinstance(quantization, dict) else {}
    groups = settings.get("config_groups")
    listed_groups: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    weights: list[Any] = [group.get("weights") if isinstance(group, dict) else None for group in listed_groups]
    packed = settings.get("format") == "pack-quantized" and len(weights) == 1 and isinstance(weights[0], dict)
    if packed and INT4_WEIGHTS.items() <= weights[0].items():
        return weights[0].get("group_size"), weights[0].get("symmetric", True)
    method = settings.get("quant_method", quantization)
    raise CheckpointError(
        f"{path}: holds no weights, and what they take in {method!r} is not known from config.json; download the model"
    )


def _check_ignored(source: ShapeSource, ignored: Any) -> None:
    """Hold that only experts are INT4: where other linear layers are too, a model's own code says which.

    Raises:
        CheckpointError: a linear layer outside the experts is not named among those that stay in 16 bit, or there is no
            such list.
    """
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise CheckpointError(f"{source.path}: config.json's ignore is {ignored!r:.60}, no list of names; {REMEDY}")
    exact = {name for name in ignored if not name.startswith(PATTERN)}
    try:
        patterns = [re.compile(name.removeprefix(PATTERN)) for name in ignored if name.startswith(PATTERN)]
    except re.error as error:
        raise CheckpointError(
            f"{source.path}: config.json's ignore holds {error.pattern!r:.60}, no regular expression; {REMEDY}"
        ) from None
    for name in source.parameters:
        matrix = None if expert_matrices(source, name) else linear_matrix(source, name)
        if matrix and matrix.module not in exact and not any(pattern.match(matrix.module) for pattern in patterns):
            raise CheckpointError(
                f"{source.path}: holds no weights, and config.json does not say that {matrix.module} stays in 16 bit, "
                "so sizes are not known; download the model"
            )


def _check_index(index: Path, tensors: Mapping[str, Tensor]) -> None:
    """Hold what was derived against the index of the weights that are not there.

    Raises:
        CheckpointError: the index speaks of more or fewer bytes.
    """
    if not index.exists():
        return
    total = (read_json(index).get("metadata") or {}).get("total_size")
    derived = sum(_bytes(tensor) for tensor in tensors.values())
    if total != derived:
        raise CheckpointError(
            f"{index}: speaks of {json.dumps(total)} bytes of weights, config.json of {derived}, so their shapes are "
            "not known; download the model"
        )


def _bytes(tensor: Tensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _exported(kind: str, source: WeightSource, group_size: GroupSize, symmetric: bool) -> ServedCheckpoint:
    """A 16-bit model's INT4 export."""
    plan = plan_export(source, group_size, linears=False)
    arguments = int4_arguments(plan.group_size, symmetric)
    tensors: dict[str, Tensor] = {}
    for name, parameter in source.parameters.items():
        if name in plan.matrices:
            tensors.update((tensor.name, tensor) for tensor in int4_group(name, plan, arguments, source).tensors)
        elif name in plan.biases:
            tensors.update((bias.name, Parameter(bias.shape, parameter.dtype)) for bias in plan.biases[name])
        else:
            tensors[name] = parameter
    return ServedCheckpoint(kind, tensors)


def _unfused(source: WeightSource) -> ServedCheckpoint:
    return ServedCheckpoint(PLAIN, dict(_one_matrix_each(source)))


def _one_matrix_each(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in source.parameters.items():
        matrices = expert_matrices(source, name)
        if matrices is None:
            yield name, parameter
        for matrix in matrices or ():
            yield f"{matrix.stem}weight", Parameter(matrix.shape, parameter.dtype)
