"""Reads HLWQ checkpoints: ours, the published ``polar_state`` files, and their predecessors.

A coded file may hold only what is coded; the rest then comes from a base model. Whatever a file lacks or contradicts
is refused by name before a weight is used, and where the file lists SHA-256 sums each tensor is held to its sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files import REMEDY
from ..codec import BlockCoder, CodebookName, CodedMatrix, dequantize_matrix
from ..errors import CheckpointError
from .coded_matrix import MatrixReader, StoredMatrix
from .expected import ExpectedModel
from .hashes import HashList
from .metadata import AUTO_MAP, read_settings
from .names import CODEBOOK_KEY, CodedGroup, canonical, check_slices, fold_unfused, group_keys
from .sources import Parameter, PlainSource, check_finite, plain_rows
from .tables import CodebookTables
from .tensor_folder import TensorFolder


def _groups(folder: TensorFolder) -> tuple[dict[str, CodedGroup], list[str]]:
    return group_keys({name: info.file for name, info in folder.items()})


def is_hlwq(path: Path) -> bool:
    """Does a folder or file hold HLWQ-coded tensors? Raises CheckpointError if it cannot be read."""
    groups, _ = _groups(TensorFolder(path))
    return bool(groups)


class HlwqSource:
    """An HLWQ checkpoint as a source of 16-bit weights.

    Args:
        path: its folder, or a single safetensors file.
        base_model: folder of the 16-bit model that lends what the checkpoint lacks.
        codebook_name: the table, for files that store none; None to detect it.
        device: where blocks are decoded.
        need_tables: whether weights will be read, and so codebooks are needed.

    Raises:
        CheckpointError: a damaged, incomplete or contradictory checkpoint, or a table that cannot be told.
    """

    def __init__(
        self,
        path: Path,
        base_model: Path | None = None,
        codebook_name: CodebookName | None = None,
        device: torch.device | None = None,
        need_tables: bool = True,
    ) -> None:
        self.path = path
        self.device = device or torch.device("cpu")
        self.result_device = torch.device("cpu")
        """Where decoded rows are given out."""
        self.folder = TensorFolder(path)
        self.base = PlainSource(base_model) if base_model else None
        self.hashes = HashList.read(self.folder)
        groups, plain = _groups(self.folder)
        if not groups:
            raise CheckpointError(f"{path}: holds no HLWQ-coded tensor; make one with `hlwq quantize`")
        settings = read_settings(self.folder)
        self._expected = ExpectedModel(path, self.config(), self.base, settings.own)
        if self.hashes is not None and CODEBOOK_KEY in self.folder.tensors:
            self.hashes.check(CODEBOOK_KEY)
        self.tables = CodebookTables(self.folder, path, self.device, settings.codebook_stored)
        bits = settings.bits or self.tables.stored_bits
        self._reader = MatrixReader(self.folder, bits, settings.block_size, self._expected)
        self.matrices: dict[str, list[StoredMatrix]] = {}
        self.parameters: dict[str, Parameter] = {}
        self.plain: dict[str, str] = {}
        fold_unfused(groups, self._expected.stacks)
        self._held = {*groups, *map(canonical, plain)}
        self._take_coded(groups.values())
        self._take_plain(key for key in plain if key != CODEBOOK_KEY)
        self._expected.check_unfused(self.parameters, self.folder.path)
        if self.base is not None:
            for name, parameter in self.base.parameters.items():
                self.parameters.setdefault(name, parameter)
        if need_tables:
            self.find_tables(codebook_name)

    @property
    def table_origin(self) -> str:
        """``stored``, or which codebook was given or detected."""
        return self.tables.origin

    def config(self) -> dict[str, Any]:
        config = self.folder.config() or (self.base.config() if self.base else {})
        own = {"auto_map": config.get("auto_map") == AUTO_MAP, "quantization_config": True}
        return {key: value for key, value in config.items() if not own.get(key)}

    def folders(self) -> list[TensorFolder]:
        return [self.folder, *(self.base.folders() if self.base else [])]

    def _take_coded(self, groups: Iterable[CodedGroup]) -> None:
        for group in groups:
            check_slices(group)
            is_stack = None not in group.matrices
            name, shape = self._expected.parameter(group.name, is_stack, self._held)
            slots = sorted(group.matrices, key=lambda slot: -1 if slot is None else slot)
            columns = shape[-1] if shape else None
            stored = [self._reader.read(group.name, group.matrices[slot], columns) for slot in slots]
            first = stored[0]
            for matrix in stored[1:]:
                if (matrix.rows, matrix.in_features, matrix.bits, matrix.block_size) != (
                    first.rows, first.in_features, first.bits, first.block_size,
                ):  # fmt: skip
                    raise CheckpointError(
                        f"{matrix.file}: {matrix.label} is {matrix.rows} x {matrix.in_features} at {matrix.bits} bits, "
                        f"{first.label} {first.rows} x {first.in_features} at {first.bits}; {REMEDY}"
                    )
            found: tuple[int, ...] = (first.rows, first.in_features)
            if is_stack:
                if len(stored) % group.slots:
                    last = stored[-1]
                    raise CheckpointError(f"{last.file}: the up_proj beside {last.label} is missing; {REMEDY}")
                found = (len(stored) // group.slots, first.rows * group.slots, first.in_features)
                self._expected.check_expert_count(group.name, found[0], first.file)
            self._check_shape(first.file, first.label, found, name, shape)
            if name in self.matrices:
                raise CheckpointError(f"{first.file}: {first.label} and another tensor are both {name}; remove one")
            self.matrices[name] = stored
            self.parameters[name] = Parameter(found, torch.bfloat16)

    def _check_shape(
        self, file: Path, label: str, found: tuple[int, ...], name: str, wanted: tuple[int, ...] | None
    ) -> None:
        if wanted is not None and found != wanted:
            raise CheckpointError(
                f"{file}: {label} stands for {list(found)}, the model's {name} is {list(wanted)}; "
                "download the checkpoint again, or give the base model that was coded"
            )

    def _take_plain(self, keys: Iterable[str]) -> None:
        for key in keys:
            tied = self._expected.tied(canonical(key), self._held)
            name = tied[0] if tied else key
            info = self.folder.tensors[key]
            if name in self.parameters:
                raise CheckpointError(f"{info.file}: {key} and another tensor are both {name}; remove one")
            same = self.base.parameters.get(name) if self.base else None
            self._check_shape(info.file, key, info.shape, name, same.shape if same else None)
            self.plain[name] = key
            self.parameters[name] = Parameter(info.shape, info.dtype)

    def find_tables(self, name: CodebookName | None) -> None:
        """Take the stored codebook, or the one called ``name``, or the one that the codes' frequencies tell.

        Raises:
            CheckpointError: it cannot be told, it is given although it is stored, or it is no table.
        """
        self.tables.find((matrix for stored in self.matrices.values() for matrix in stored), name)

    def table(self, bits: int) -> torch.Tensor | None:
        """The codebook of a width, if one was stored, given or detected."""
        return self.tables.table(bits)

    def coder(self, matrix: StoredMatrix) -> BlockCoder:
        """The coder of a matrix's table and block size."""
        return self.tables.coder(matrix)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self.matrices:
            return self._decoded_rows(self.matrices[name], start, stop)
        if name in self.plain:
            self._check_hashes([self.plain[name]])
            return plain_rows(self.folder, self.plain[name], start, stop)
        assert self.base is not None
        rows = self.base.rows(name, start, stop)
        check_finite(rows, self.base.folder, name)
        return rows

    def _decoded_rows(self, stored: list[StoredMatrix], start: int, stop: int) -> torch.Tensor:
        per_matrix = stored[0].rows
        out = torch.empty(stop - start, stored[0].in_features, dtype=torch.bfloat16, device=self.result_device)
        for index in range(start // per_matrix, (stop - 1) // per_matrix + 1):
            offset = index * per_matrix
            low, high = max(start, offset), min(stop, offset + per_matrix)
            coded = self._coded_rows(stored[index], low - offset, high - offset)
            dequantize_matrix(coded, self.coder(stored[index]), out=out[low - start : high - start])
        return out

    def coded(self, name: str) -> Iterator[CodedMatrix]:
        """The matrices of a coded parameter, a stack's by expert and then gate before up, with codes MSB-first.

        Do not write to them: they may be the files' own memory.
        """
        for matrix in self.matrices[name]:
            yield self._coded_rows(matrix, 0, matrix.rows)

    def _coded_rows(self, matrix: StoredMatrix, start: int, stop: int) -> CodedMatrix:
        self._check_hashes(matrix.keys)
        norms = matrix.norms(self.folder)[start:stop]
        wrong = torch.nonzero(~((norms >= 0) & norms.isfinite()))
        if len(wrong):
            row, block = wrong[0].tolist()
            file, value = self.folder.tensors[matrix.norms_key].file, norms[row, block].item()
            raise CheckpointError(
                f"{file}: {matrix.norms_key} is {value} for block {block} of row {start + row}, not a norm; {REMEDY}"
            )
        return CodedMatrix(matrix.packed_rows(self.folder, start, stop), norms, matrix.in_features)

    def _check_hashes(self, keys: list[str]) -> None:
        """Hold tensors that belong together to their sums, and begin with those that are likely to be read next."""
        if self.hashes is not None:
            for key in keys:
                self.hashes.check(key)
            self.hashes.check_ahead(self._following.get(keys[0], ()))

    @cached_property
    def _following(self) -> dict[str, list[str]]:
        """By the first of the stored tensors that are read together: those of the next such."""
        together: list[list[str]] = []
        for name in self.parameters:
            together += [matrix.keys for matrix in self.matrices.get(name, ())]
            if name in self.plain:
                together.append([self.plain[name]])
        return {keys[0]: following for keys, following in pairwise(together)}

    def missing(self) -> list[str]:
        """Parameters of the model that have no source; empty with a base model."""
        return self._expected.missing(self.parameters)
