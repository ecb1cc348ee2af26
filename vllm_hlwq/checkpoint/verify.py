"""Is a checkpoint whole, and how far is it from the model it was made from?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..codec import CodebookName
from ..errors import CheckpointError
from .hashes import HashList
from .int4_source import Int4Source, is_int4
from .layouts import expert_matrices, linear_matrix
from .reader import HlwqSource, is_hlwq
from .sources import PlainSource, WeightSource, pieces
from .tensor_folder import TensorFolder


@dataclass
class Report:
    """What ``verify`` found; there is one only if nothing is wrong."""

    path: str
    format: str
    tensors: int
    bytes: int
    hashes_checked: bool
    reference: str | None = None
    relative_mse: float | None = None
    identical: int = 0
    """Parameters equal to the reference's in every value."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative mean squared error of every other parameter."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


class _Errors:
    """Sums of squares by parameter."""

    def __init__(self) -> None:
        self.error: dict[str, float] = {}
        self.energy: dict[str, float] = {}

    def add(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        difference = (found.double() - wanted.double()).square().sum().item()
        self.error[name] = self.error.get(name, 0.0) + difference
        self.energy[name] = self.energy.get(name, 0.0) + wanted.double().square().sum().item()

    def fill(self, report: Report) -> None:
        report.identical = sum(error == 0 for error in self.error.values())
        report.errors = {n: e / self.energy[n] if self.energy[n] else float("inf") for n, e in self.error.items() if e}
        total = sum(energy for name, energy in self.energy.items() if self.error[name])
        report.relative_mse = sum(self.error.values()) / total if total else 0.0


def verify(
    path: Path, reference: Path | None = None, base_model: Path | None = None, codebook: CodebookName | None = None
) -> Report:
    """Check a checkpoint: files, sums where they are listed, shapes, completeness, finite values.

    Args:
        path: an HLWQ, INT4 or 16-bit checkpoint.
        reference: the 16-bit model it was made from, to measure the error against.
        base_model: for HLWQ files that hold only what is coded.
        codebook: for HLWQ files that store none.

    Returns:
        What was found; with a reference the relative mean squared error of each parameter that differs.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    folder = TensorFolder(path)
    hashes = HashList.read(folder)
    size = sum(info.bytes for _, info in folder.items())
    report = Report(str(path), "16-bit", len(folder.tensors), size, hashes is not None)
    if hashes is not None:
        for name in tqdm(hashes.entries, desc="checking sums", unit="tensor", disable=None, leave=False):
            hashes.check(name)
    original = PlainSource(reference) if reference else None
    errors = _Errors()
    if is_hlwq(path):
        source: WeightSource = HlwqSource(path, base_model, codebook)
        report.format = "hlwq"
        missing = source.missing()  # type: ignore[attr-defined]
        if missing:
            raise CheckpointError(f"{path}: {missing[0]} is not in it, nor {len(missing) - 1} more; give --base-model")
        _walk(source, original, errors)
    elif base_model is not None or codebook is not None:
        raise CheckpointError(f"{path}: is not coded with HLWQ; leave --base-model and --codebook out")
    elif is_int4(folder):
        report.format = "compressed-tensors"
        _walk_int4(Int4Source(path), original, errors)
    else:
        _walk(PlainSource(path), original, errors)
    if original is not None:
        report.reference = str(reference)
        errors.fill(report)
    return report


def _walk(source: WeightSource, original: PlainSource | None, errors: _Errors) -> None:
    """Read every parameter, and compare it with the original's."""
    for name, parameter in tqdm(source.parameters.items(), desc="reading", unit="tensor", disable=None, leave=False):
        if original is not None:
            wanted = original.parameters.get(name)
            if wanted is None or wanted.shape != parameter.shape:
                shape = "absent" if wanted is None else str(list(wanted.shape))
                raise CheckpointError(
                    f"{source.path}: {name} is {list(parameter.shape)}, in the reference {original.path} {shape}; "
                    "give the model it was made from"
                )
        for start, stop in pieces(parameter):
            rows = source.rows(name, start, stop)
            if rows.is_floating_point() and not bool(rows.isfinite().all()):
                raise CheckpointError(f"{source.path}: {name} holds NaN or inf; make the checkpoint again")
            if original is not None:
                errors.add(name, rows, original.rows(name, start, stop))
    if original is not None:
        absent = next((name for name in original.parameters if name not in source.parameters), None)
        if absent is not None:
            raise CheckpointError(
                f"{source.path}: {absent} of the reference {original.path} is missing; convert it again"
            )


def _walk_int4(source: Int4Source, original: PlainSource | None, errors: _Errors) -> None:
    if original is None:
        for module in source.modules:
            source.weight(module)
        return
    compared = set()
    for name in original.parameters:
        matrices = expert_matrices(original, name)
        linear = linear_matrix(original, name) if matrices is None else None
        for matrix in matrices or ([linear] if linear else []):
            if f"{matrix.module}.weight_packed" in source.folder.tensors:
                found = source.weight(matrix.module)
                if tuple(found.shape) != matrix.shape:
                    raise CheckpointError(
                        f"{source.folder.path}: {matrix.module} is {list(found.shape)}, in the reference "
                        f"{list(matrix.shape)}; give the model it was made from"
                    )
                errors.add(name, found, matrix.read())
                compared.add(matrix.module)
            elif f"{matrix.module}.weight" not in source.folder.tensors:
                raise CheckpointError(
                    f"{source.folder.path}: {matrix.module} of the reference is missing; export again"
                )
        if name in source.folder.tensors:
            rows = original.parameters[name].columns
            errors.add(name, source.folder.tensor(name).reshape(-1, rows), original.rows(name, 0, 2**62))
    unknown = next((module for module in source.modules if module not in compared), None)
    if unknown is not None:
        raise CheckpointError(
            f"{source.folder.path}: {unknown} is not in the reference; give the model it was made from"
        )
