"""Reads HLWQ checkpoints: ours, the published ``polar_state`` files, and their predecessors.

A coded file may hold only what is coded; the rest then comes from a base model. Whatever a file lacks or contradicts
is refused by name before a weight is used, and where the file lists SHA-256 sums each tensor is held to its sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files import REMEDY
from ..codec import BlockCoder, CodebookName, CodedMatrix, codebook, dequantize_matrix, detect
from ..codec.codebooks import DETECTION_CODES
from ..errors import CheckpointError
from .coded_matrix import StoredMatrix, legacy_matrix, packed_matrix
from .hashes import HashList
from .metadata import HLWQ_CONFIG, LEGACY_CONFIG
from .names import CODEBOOK_KEY, CodedGroup, canonical, check_slices, group_keys
from .sources import Parameter, PlainSource
from .tensor_folder import TensorFolder, read_json

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def is_hlwq(path: Path) -> bool:
    """Does a folder or file hold HLWQ-coded tensors? Raises CheckpointError if it cannot be read."""
    groups, _ = group_keys(TensorFolder(path).tensors, str(path))
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
        self.folder = TensorFolder(path)
        self.base = PlainSource(base_model) if base_model else None
        self.hashes = HashList.read(self.folder)
        groups, plain = group_keys(self.folder.tensors, str(path))
        if not groups:
            raise CheckpointError(f"{path}: holds no HLWQ-coded tensor; make one with `hlwq quantize`")
        for group in groups.values():
            check_slices(group, str(path))
        self.settings = self._settings()
        self._tables: dict[int, torch.Tensor] = {}
        self._coders: dict[tuple[bytes, int], BlockCoder] = {}
        self.table_origin = "stored"
        self._known_shapes = self._shapes_by_canonical_name()
        self.matrices: dict[str, list[StoredMatrix]] = {}
        self.parameters: dict[str, Parameter] = {}
        self._plain = [key for key in plain if key != CODEBOOK_KEY]
        self._take_coded(groups.values())
        self._take_plain()
        if need_tables:
            self.find_tables(codebook_name)

    # What the files say

    def _settings(self) -> dict[str, Any]:
        """Block size and the rest, from whichever of the JSON files is there; later ones win."""
        merged: dict[str, Any] = {}
        for name in (LEGACY_CONFIG, HLWQ_CONFIG):
            if (self.folder.path / name).is_file():
                merged.update(read_json(self.folder.path / name))
        merged.update(self.folder.config().get("quantization_config") or {})
        return merged

    def config(self) -> dict[str, Any]:
        config = self.folder.config() or (self.base.config() if self.base else {})
        return {key: value for key, value in config.items() if key != "quantization_config"}

    def folders(self) -> list[TensorFolder]:
        return [self.folder, *(self.base.folders() if self.base else [])]

    def _shapes_by_canonical_name(self) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """Parameter names, and shapes where known, by canonical name: from the base model, or from our own list."""
        if self.base is not None:
            return {canonical(name): (name, p.shape) for name, p in self.base.parameters.items()}
        coded = self.settings.get("coded")
        return {canonical(name): (name, None) for name in coded} if isinstance(coded, dict) else {}

    # Coded tensors

    def _take_coded(self, groups: Iterable[CodedGroup]) -> None:
        for group in groups:
            name, shape = self._parameter_name(group)
            experts = sorted(group.matrices, key=lambda expert: -1 if expert is None else expert)
            stored: list[StoredMatrix] = []
            for expert in experts:
                keys = group.matrices[expert]
                make = legacy_matrix if keys.legacy else packed_matrix
                stored.append(make(self.folder, keys, self.settings, shape[-1] if shape else None))
            first = stored[0]
            for matrix in stored[1:]:
                if (matrix.rows, matrix.in_features, matrix.bits, matrix.block_size) != (
                    first.rows, first.in_features, first.bits, first.block_size,
                ):  # fmt: skip
                    raise CheckpointError(
                        f"{self.path}: {matrix.label} is {matrix.rows} x {matrix.in_features} at {matrix.bits} bits, "
                        f"{first.label} {first.rows} x {first.in_features} at {first.bits}; {REMEDY}"
                    )
            found = (first.rows, first.in_features)
            if experts[0] is not None:
                found = (len(stored), *found)  # type: ignore[assignment]
                self._check_expert_count(group.name, len(stored))
            if shape is not None and found != shape:
                raise CheckpointError(
                    f"{self.path}: {first.label} stands for {list(found)}, the base model's {name} is {list(shape)}; "
                    "give the base model that was coded"
                )
            if name in self.matrices:
                raise CheckpointError(f"{self.path}: {first.label} and another tensor are both {name}; remove one")
            self.matrices[name] = stored
            self.parameters[name] = Parameter(found, torch.bfloat16)

    def _parameter_name(self, group: CodedGroup) -> tuple[str, tuple[int, ...] | None]:
        known = self._known_shapes.get(group.name)
        if known is None and self.base is not None:
            # A tied embedding is stored once, under either name.
            tied = self.config().get(
                "tie_word_embeddings", self.config().get("text_config", {}).get("tie_word_embeddings")
            )
            if tied and group.name.endswith("lm_head"):
                known = next((v for k, v in self._known_shapes.items() if k.endswith("embed_tokens")), None)
            if known is None:
                raise CheckpointError(
                    f"{self.path}: {group.name} is coded, but the base model {self.base.path} has no such parameter; "
                    "give the base model that was coded"
                )
        if known is not None:
            return known
        return (group.name if None not in group.matrices else f"{group.name}.weight"), None

    def _check_expert_count(self, name: str, found: int) -> None:
        config = self.folder.config()
        for part in (config.get("text_config") or {}, config):
            for key in EXPERT_COUNTS:
                if isinstance(part.get(key), int) and part[key] != found:
                    raise CheckpointError(
                        f"{self.path}: {name} has {found} experts, {key} is {part[key]}: "
                        f"{name}_e{min(found, part[key])} on are missing or too many; {REMEDY}"
                    )

    def _take_plain(self) -> None:
        for key in self._plain:
            name = self._known_shapes.get(canonical(key), (key, None))[0] if key not in self.matrices else key
            if name in self.matrices:
                raise CheckpointError(f"{self.path}: {key} is stored both coded and plain; remove one of them")
            info = self.folder.tensors[key]
            self.parameters[key] = Parameter(info.shape, info.dtype)
        if self.base is not None:
            for name, parameter in self.base.parameters.items():
                self.parameters.setdefault(name, parameter)

    # Codebooks

    def find_tables(self, name: CodebookName | None) -> None:
        """Take the stored codebook, or the one called ``name``, or the one that the codes' frequencies tell.

        Raises:
            CheckpointError: it cannot be told, or both stored and given.
        """
        if CODEBOOK_KEY in self.folder.tensors:
            if name is not None:
                raise CheckpointError(f"{self.path}: stores its own codebook; leave --codebook {name} out")
            self._check_hash(CODEBOOK_KEY)
            table = self.folder.tensor(CODEBOOK_KEY)
            if table.dtype != torch.float32 or table.ndim != 1:
                raise CheckpointError(f"{self.path}: {CODEBOOK_KEY} is no float32 vector; {REMEDY}")
            self._tables[len(table).bit_length() - 1] = table.clone()
        for parameter, stored in self.matrices.items():
            matrix = stored[0]
            if matrix.table is not None or matrix.bits in self._tables:
                continue
            if CODEBOOK_KEY in self.folder.tensors:
                raise CheckpointError(
                    f"{self.path}: {parameter} has {matrix.bits}-bit codes, its codebook does not; {REMEDY}"
                )
            chosen = name or self._detect(matrix.bits, matrix.block_size)
            self.table_origin = f"{chosen}, {'given' if name else 'detected'}"
            self._tables[matrix.bits] = codebook(chosen, matrix.bits)

    def _detect(self, bits: int, block_size: int) -> CodebookName:
        counts = torch.zeros(2**bits, dtype=torch.int64)
        for stored in self.matrices.values():
            for matrix in stored:
                if matrix.bits == bits and matrix.table is None and int(counts.sum()) < 4 * DETECTION_CODES:
                    counts += matrix.code_counts(self.folder)
        total = int(counts.sum())
        if total < DETECTION_CODES:
            raise CheckpointError(
                f"{self.path}: stores no codebook, and {total} codes are too few to tell it by "
                f"({DETECTION_CODES} are needed); give --codebook A, B or C"
            )
        found = detect(counts, block_size)
        if found is None:
            raise CheckpointError(
                f"{self.path}: stores no codebook, and the frequencies of its {bits}-bit codes fit none of A, B and C "
                f"(outermost codes: {(int(counts[0]) + int(counts[-1])) / total:.5f}); give --codebook A, B or C"
            )
        return found

    def table(self, bits: int) -> torch.Tensor | None:
        """The codebook of a width, if one was stored, given or detected."""
        return self._tables.get(bits)

    def coder(self, matrix: StoredMatrix) -> BlockCoder:
        """The coder of a matrix's table and block size."""
        table = matrix.table if matrix.table is not None else self._tables[matrix.bits]
        key = (table.numpy().tobytes(), matrix.block_size)
        if key not in self._coders:
            try:
                self._coders[key] = BlockCoder(table, matrix.block_size, self.device)
            except ValueError as problem:
                raise CheckpointError(f"{self.path}: {matrix.label}: {problem}; {REMEDY}") from None
        return self._coders[key]

    # Weights

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.matrices:
            if name in self.folder.tensors:
                self._check_hash(name)
                tensor = self.folder.tensor(name)
                return tensor.reshape(-1, self.parameters[name].columns)[start:stop]
            assert self.base is not None
            return self.base.rows(name, start, stop)
        stored = self.matrices[name]
        per_matrix = stored[0].rows
        out = torch.empty(stop - start, stored[0].in_features, dtype=torch.bfloat16)
        for index in range(start // per_matrix, (stop - 1) // per_matrix + 1):
            low, high = max(start, index * per_matrix), min(stop, (index + 1) * per_matrix)
            for key in stored[index].keys:
                self._check_hash(key)
            self._decode(
                stored[index], low - index * per_matrix, high - index * per_matrix, out[low - start : high - start]
            )
        return out

    def _decode(self, matrix: StoredMatrix, start: int, stop: int, out: torch.Tensor) -> None:
        norms = matrix.norms(self.folder)[start:stop]
        wide = norms.float()
        if not bool(((wide >= 0) & wide.isfinite()).all()):
            raise CheckpointError(f"{self.path}: {matrix.label}: a norm is NaN, infinite or negative; {REMEDY}")
        coder = self.coder(matrix)
        packed = matrix.packed_rows(self.folder, start, stop)
        dequantize_matrix(CodedMatrix(packed, norms, matrix.in_features), coder, out=out)

    def _check_hash(self, key: str) -> None:
        if self.hashes is not None:
            self.hashes.check(key)

    def missing(self) -> list[str]:
        """Parameters of the model, other than experts, that have no source; empty with a base model.

        Known from the list in our own files, or from what transformers makes of ``config.json``.
        """
        if self.base is not None:
            return []
        kept = self.settings.get("kept")
        if isinstance(kept, dict):
            return sorted(name for name in kept if name not in self.parameters)
        from .architecture import parameter_shapes

        shapes = parameter_shapes(self.folder.config())
        held = {canonical(name) for name in self.parameters}
        if not shapes:
            return [] if self._plain else ["the norms and routers"]
        return sorted(name for name in shapes if "experts" not in name and canonical(name) not in held)
