"""Is a checkpoint whole, and how far is it from the model it was made from?"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint_files import REMEDY
from ..codec import CodebookName
from ..errors import CheckpointError
from .conversion import listed
from .dequantize import open_source
from .hashes import HashList
from .int4_source import Int4Source
from .layouts import expert_biases, expert_matrices, linear_matrix
from .metadata import read_settings
from .reader import HlwqSource
from .sources import PlainSource, WeightSource, pieces
from .tensor_folder import TensorFolder

VANISHING = 2.0**-57
"""Mean square of weights in blocks of 128 whose norms are 2**-25, which float16 rounds to 0."""


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
        self.weights: dict[str, int] = {}

    def add(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        difference = (found.double() - wanted.double()).square().sum().item()
        self.error[name] = self.error.get(name, 0.0) + difference
        self.energy[name] = self.energy.get(name, 0.0) + wanted.double().square().sum().item()
        self.weights[name] = self.weights.get(name, 0) + wanted.numel()

    def _vanishes(self, name: str) -> bool:
        """Whether these weights are so small that their codes stand for zeros."""
        energy = self.energy[name]
        return 0 < energy <= self.weights[name] * VANISHING and self.error[name] <= 1.01 * energy

    def fill(self, report: Report) -> None:
        """Put the errors into a report.

        Raises:
            CheckpointError: a parameter is no nearer to the reference's than zeros would be.
        """
        report.identical = sum(error == 0 for error in self.error.values())
        report.errors = {n: e / self.energy[n] if self.energy[n] else math.inf for n, e in self.error.items() if e}
        unlike = next((name for name, error in report.errors.items() if error >= 1 and not self._vanishes(name)), None)
        if unlike is not None:
            raise CheckpointError(
                f"{report.path}: {unlike} has a relative mean squared error of {report.errors[unlike]:.3g} against "
                f"{report.reference}; give the model it was made from"
            )
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
    report.reference = None if reference is None else str(reference)
    if hashes is not None:
        for name in tqdm(hashes.entries, desc="checking sums", unit="tensor", disable=None, leave=False):
            hashes.check(name)
    original = PlainSource(reference) if reference else None
    errors = _Errors()
    source = open_source(path, base_model, codebook)
    if isinstance(source, HlwqSource):
        report.format = "hlwq"
        missing = source.missing()
        if missing:
            raise CheckpointError(f"{path}: {listed(missing)} not in it; give --base-model, which has what it lacks")
        if read_settings(folder).own is not None and not os.path.lexists(folder.path / "config.json"):
            raise CheckpointError(f"{folder.path / 'config.json'}: is missing, but was made with the weights; {REMEDY}")
        source.hashes = hashes  # checked above, once
    if isinstance(source, Int4Source):
        report.format = "compressed-tensors"
        source.hashes = hashes
        _walk(source, None, errors)
        if original is not None:
            _compare_int4(source, original, errors)
    else:
        _walk(source, original, errors)
    if original is not None:
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
        if parameter.bytes == 0:
            continue
        for start, stop in pieces(parameter):
            rows = source.rows(name, start, stop)
            if rows.is_floating_point() and not bool(rows.isfinite().all()):
                raise CheckpointError(f"{source.path}: {name} holds NaN or inf; make the checkpoint again")
            if original is not None:
                errors.add(name, rows, original.rows(name, start, stop))
        if isinstance(source, HlwqSource) and name not in source.matrices and errors.error.get(name):
            raise CheckpointError(
                f"{source.path}: {name} is not coded, but differs from the reference {original.path}; "  # type: ignore[union-attr]
                "give the model it was made from"
            )
    if original is not None:
        absent = next((name for name in original.parameters if name not in source.parameters), None)
        if absent is not None:
            raise CheckpointError(
                f"{source.path}: {absent} of the reference {original.path} is missing; convert it again"
            )


def _compare_int4(source: Int4Source, original: PlainSource, errors: _Errors) -> None:
    """Compare matrix by matrix, because the original may hold experts as stacks or one by one."""
    left = {*source.stems, *source.plain}
    for name, parameter in original.parameters.items():
        matrices = expert_matrices(original, name) or []
        linear = None if matrices else linear_matrix(original, name)
        if linear is not None and linear.stem in left:
            matrices = [linear]
        for matrix in matrices:
            _take(left, matrix.stem, source, original)
            found = source.matrix(matrix.stem)
            if tuple(found.shape) != matrix.shape:
                raise _unlike(source, matrix.module, tuple(found.shape), matrix.shape)
            errors.add(name, found, matrix.read())
        biases = expert_biases(original, name) or []
        for bias in biases:
            _take(left, bias.name, source, original)
            errors.add(name, source.rows(bias.name, 0, 1)[0], bias.read())
        if matrices or biases:
            continue
        _take(left, name, source, original)
        if source.parameters[name].shape != parameter.shape:
            raise _unlike(source, name, source.parameters[name].shape, parameter.shape)
        for start, stop in pieces(parameter):
            errors.add(name, source.rows(name, start, stop), original.rows(name, start, stop))
    if left:
        raise CheckpointError(f"{source.path}: {min(left)} is not in the reference; give the model it was made from")


def _take(left: set[str], key: str, source: Int4Source, original: PlainSource) -> None:
    if key not in left:
        raise CheckpointError(f"{source.path}: {key} of the reference {original.path} is missing; export it again")
    left.remove(key)


def _unlike(source: Int4Source, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{source.path}: {name} is {list(found)}, in the reference {list(wanted)}; give the model it was made from"
    )
