"""An INT4 checkpoint as a source of 16-bit weights: the way back, and what the export is measured by.

Experts that the checkpoint names gate_proj, up_proj and down_proj are given out as the 3-D stacks that transformers
holds in memory and loads under those names whatever the model's own files look like.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from pydantic import ValidationError

from ..checkpoint_files import REMEDY
from ..errors import CheckpointError
from ..int4_checkpoint import dequantize_weight
from .hashes import HashList
from .sources import Parameter, check_finite
from .tensor_folder import TensorFolder

CODES, SCALES, SHAPE, ZERO_POINTS = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
GROUP_OF = "weight_g_idx"
"""The group of each column, where groups were formed in an order of the columns (``actorder``)."""

_EXPERT = re.compile(r"^(?P<prefix>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<proj>gate_proj|up_proj|down_proj)\.$")


def is_int4(folder: TensorFolder) -> bool:
    """Does a folder hold compressed-tensors ``pack-quantized`` weights?"""
    return any(name.endswith(CODES) for name in folder.tensors)


class Int4Source:
    """The parameters of an INT4 checkpoint.

    ``stems`` are what the names of each INT4 matrix's tensors begin with: ``model.layers.0.mlp.experts.3.up_proj.``;
    ``plain`` are the other tensors.

    Raises:
        CheckpointError: a matrix lacks a part, its parts disagree, an expert lacks a matrix, or the configuration does
            not describe the weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = TensorFolder(path)
        self.hashes = HashList.read(self.folder)
        self.arguments = self._arguments()
        self.stems = [name.removesuffix(CODES) for name in self.folder.tensors if name.endswith(CODES)]
        self.shapes = {stem: self._check(stem) for stem in self.stems}
        of_matrices = {f"{stem}{part}" for stem in self.stems for part in self.parts(stem)}
        self.plain = [name for name in self.folder.tensors if name not in of_matrices]
        tensors = self.folder.tensors
        self.parameters = {name: Parameter(tensors[name].shape, tensors[name].dtype) for name in self.plain}
        self._stems_of: dict[str, list[str]] = {}
        self._name_parameters()

    def _arguments(self) -> QuantizationArgs:
        path = self.folder.path / "config.json"
        try:
            quantization = self.folder.config()["quantization_config"]
            (group,) = quantization["config_groups"].values()
            arguments = QuantizationArgs.model_validate(group["weights"])
            transforms = quantization.get("transform_config")
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as problem:
            reason = " ".join(repr(problem).split())
            raise CheckpointError(f"{path}: describes no single INT4 scheme ({reason:.80}); {REMEDY}") from None
        if transforms not in (None, {}, {"config_groups": {}}):
            raise CheckpointError(f"{path}: transform_config says that weights are rotated, which is not understood; "
                                  "use the 16-bit original")  # fmt: skip
        if arguments.num_bits != 4:
            raise CheckpointError(f"{path}: weights are of {arguments.num_bits} bits, not 4; only INT4 is understood")
        return arguments

    def _check(self, stem: str) -> tuple[int, int]:
        """Hold the parts of a matrix against one another; return its shape."""
        tensors = self.folder.tensors
        missing = next((part for part in self.parts(stem) if f"{stem}{part}" not in tensors), None)
        if missing is not None:
            raise CheckpointError(f"{self.path}: {stem}{missing} is missing; {REMEDY}")
        if f"{stem}{GROUP_OF}" in tensors and GROUP_OF not in self.parts(stem):
            raise CheckpointError(
                f"{self.path}: {stem}{GROUP_OF} orders columns, but config.json has no actorder 'group'; {REMEDY}"
            )
        rows, columns = self._stated_shape(stem)
        size = self.arguments.group_size or -1
        groups = -(-columns // size) if size > 0 else 1
        expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
            CODES: (torch.int32, (rows, -(-columns // 8))),
            SCALES: (None, (rows, groups)),
            ZERO_POINTS: (torch.int32, (-(-rows // 8), groups)),
            GROUP_OF: (torch.int32, (columns,)),
        }
        for part in self.parts(stem):
            info = tensors[f"{stem}{part}"]
            dtype, shape = expected.get(part, (info.dtype, info.shape))
            right = info.dtype.is_floating_point if dtype is None else info.dtype == dtype
            if not right or info.shape != shape:
                raise CheckpointError(
                    f"{info.file}: {stem}{part} is {list(info.shape)} of {info.dtype}, but {rows} x {columns} weights "
                    f"have {list(shape)} of {dtype or 'a floating-point type'}; {REMEDY}"
                )
        return rows, columns

    def _stated_shape(self, stem: str) -> tuple[int, int]:
        if SHAPE not in self.parts(stem):
            codes = self.folder.tensors[f"{stem}{CODES}"]
            if len(codes.shape) != 2:
                raise CheckpointError(f"{codes.file}: {stem}{CODES} is no matrix; {REMEDY}")
            return codes.shape[0], codes.shape[1] * 8
        info = self.folder.tensors[f"{stem}{SHAPE}"]
        if info.dtype != torch.int64 or info.shape != (2,):
            raise CheckpointError(f"{info.file}: {stem}{SHAPE} is not two int64 values; {REMEDY}")
        rows, columns = self.folder.tensor(f"{stem}{SHAPE}").tolist()
        return rows, columns

    def parts(self, stem: str) -> list[str]:
        """What is stored of a matrix; no shape in the layout of vLLM's gpt-oss loader."""
        shape = [SHAPE] if stem.endswith(".") else []
        ordered = self.arguments.actorder == ActivationOrdering.GROUP
        return [CODES, SCALES, *shape, *[ZERO_POINTS] * (not self.arguments.symmetric), *[GROUP_OF] * ordered]

    def _name_parameters(self) -> None:
        """Name the parameter that each matrix is, or is a part of."""
        experts: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        for stem in self.stems:
            match = _EXPERT.match(stem)
            if match is None:
                self._stems_of[f"{stem}weight"] = [stem]
                self.parameters[f"{stem}weight"] = Parameter(self.shapes[stem], self._dtype(stem))
            else:
                experts[match["prefix"]][int(match["expert"])][match["proj"]] = stem
        for prefix, by_expert in experts.items():
            gated = any("gate_proj" in found for found in by_expert.values())
            stacks = {"gate_up_proj": ("gate_proj", "up_proj")} if gated else {"up_proj": ("up_proj",)}
            for name, projections in {**stacks, "down_proj": ("down_proj",)}.items():
                self._add_stack(f"{prefix}.{name}", prefix, projections, by_expert)

    def _add_stack(
        self, name: str, prefix: str, projections: tuple[str, ...], by_expert: dict[int, dict[str, str]]
    ) -> None:
        stems: list[str] = []
        for expert in range(max(by_expert) + 1):
            for projection in projections:
                stem = by_expert[expert].get(projection) if expert in by_expert else None
                if stem is None:
                    raise CheckpointError(f"{self.path}: {prefix}.{expert}.{projection}.{CODES} is missing; {REMEDY}")
                if self.shapes[stem] != self.shapes[(stems or [stem])[0]]:
                    raise CheckpointError(
                        f"{self.path}: {stem}weight is {list(self.shapes[stem])}, {stems[0]}weight "
                        f"{list(self.shapes[stems[0]])}; {REMEDY}"
                    )
                stems.append(stem)
        rows, columns = self.shapes[stems[0]]
        self._stems_of[name] = stems
        self.parameters[name] = Parameter((max(by_expert) + 1, rows * len(projections), columns), self._dtype(stems[0]))

    def _dtype(self, stem: str) -> torch.dtype:
        return self.folder.tensors[f"{stem}{SCALES}"].dtype

    def _tensor(self, name: str) -> torch.Tensor:
        """A stored tensor, held to its sum where sums are listed."""
        if self.hashes is not None:
            self.hashes.check(name)
        return self.folder.tensor(name)

    def matrix(self, stem: str) -> torch.Tensor:
        """One INT4 matrix ``[out, in]``, in the scale's dtype.

        Raises:
            CheckpointError: a scale is not finite, columns are not of groups of one size, or a tensor is not what its
                sum says.
        """
        state = {part: self._tensor(f"{stem}{part}") for part in self.parts(stem)}
        state[SHAPE] = torch.tensor(self.shapes[stem])
        if not bool(state[SCALES].isfinite().all()):
            raise CheckpointError(f"{self.path}: {stem}{SCALES} holds NaN or inf; {REMEDY}")
        if GROUP_OF in state:
            self._check_groups(stem, state[GROUP_OF])
        return dequantize_weight(state, self.arguments)

    def _check_groups(self, stem: str, group_of: torch.Tensor) -> None:
        """Refuse groups that have not all the same number of columns; -1 throughout means that columns are in order."""
        columns = self.shapes[stem][1]
        size = self.arguments.group_size or columns
        wanted = torch.arange(columns) // size
        if not bool((group_of == -1).all()) and not torch.equal(group_of.sort().values.long(), wanted):
            raise CheckpointError(f"{self.path}: {stem}{GROUP_OF} gives no groups of {size} columns each; {REMEDY}")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stems = self._stems_of.get(name)
        if stems is None:
            plain = self._tensor(name).reshape(-1, self.parameters[name].columns)[start:stop]
            check_finite(plain, self.folder, name)
            return plain
        rows = self.shapes[stems[0]][0]
        return torch.cat(
            [
                self.matrix(stems[index])[max(start - index * rows, 0) : stop - index * rows]
                for index in range(start // rows, -(-stop // rows))
            ]
        )

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self.folder.config().items() if key != "quantization_config"}

    def folders(self) -> list[TensorFolder]:
        return [self.folder]
