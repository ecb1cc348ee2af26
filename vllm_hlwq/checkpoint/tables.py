"""The codebooks of a checkpoint: stored in it, named by the user, or told from how often each code occurs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..checkpoint_files import REMEDY
from ..codec import BlockCoder, CodebookName, codebook, detect
from ..codec.codebooks import DETECTION_CODES
from ..errors import CheckpointError
from .coded_matrix import StoredMatrix, bits_of
from .names import CODEBOOK_KEY
from .tensor_folder import TensorFolder

LARGEST_LEVEL = 64.0
"""Coordinates of a block of 4,096 lie within sqrt(4096) of zero, so no level beyond can be meant."""


class CodebookTables:
    """The codebooks of one checkpoint, by width, and coders for them.

    Args:
        folder: the checkpoint's files.
        path: what the user named, for errors.
        device: where blocks are coded.
        expected: whether ``config.json`` says that a table is stored.

    Raises:
        CheckpointError: the stored table is none, or the expected one is not there.
    """

    def __init__(self, folder: TensorFolder, path: Path, device: torch.device, expected: bool) -> None:
        self._folder = folder
        self._path = path
        self._device = device
        self._tables: dict[int, torch.Tensor] = {}
        self._coders: dict[tuple[bytes, int], BlockCoder] = {}
        self.origin = "stored"
        self.stored_bits: int | None = None
        info = folder.tensors.get(CODEBOOK_KEY)
        if info is None:
            if expected:
                raise CheckpointError(
                    f"{path}: config.json says that the codebook is stored, but tensor {CODEBOOK_KEY} is missing; "
                    f"{REMEDY}"
                )
            return
        table = folder.tensor(CODEBOOK_KEY)
        self.stored_bits = bits_of(table) if table.dtype == torch.float32 and table.ndim == 1 else None
        if self.stored_bits is None:
            raise CheckpointError(
                f"{info.file}: {CODEBOOK_KEY} is {list(info.shape)} of {info.dtype}, no float32 table of 4 to 256 "
                f"levels; {REMEDY}"
            )
        self._tables[self.stored_bits] = table.clone()

    def find(self, matrices: Iterable[StoredMatrix], name: CodebookName | None) -> None:
        """Take the stored codebook, or the one called ``name``, or the one that the codes' frequencies tell.

        Raises:
            CheckpointError: it cannot be told, it is given although it is stored, or it is no table.
        """
        matrices = list(matrices)
        wanting = [matrix for matrix in matrices if matrix.table is None and matrix.bits != self.stored_bits]
        if name is not None and not wanting:
            raise CheckpointError(f"{self._path}: stores its own codebook; leave --codebook {name} out")
        for matrix in wanting:
            if matrix.bits in self._tables:
                continue
            if self.stored_bits is not None:
                raise CheckpointError(
                    f"{matrix.file}: {matrix.label} has {matrix.bits}-bit codes, {CODEBOOK_KEY} is for "
                    f"{self.stored_bits} bits; {REMEDY}"
                )
            chosen = name or self._detect(wanting, matrix.bits, matrix.block_size)
            self.origin = f"{chosen}, {'given' if name else 'detected'}"
            self._tables[matrix.bits] = codebook(chosen, matrix.bits)
        for matrix in matrices:
            self.coder(matrix)  # refuses a table that is none

    def _detect(self, matrices: list[StoredMatrix], bits: int, block_size: int) -> CodebookName:
        counts = torch.zeros(2**bits, dtype=torch.int64)
        total = 0
        for matrix in matrices:
            if (matrix.bits, matrix.block_size) == (bits, block_size) and total < 4 * DETECTION_CODES:
                counts += matrix.code_counts(self._folder)
                total = int(counts.sum())
        if total < DETECTION_CODES:
            raise CheckpointError(
                f"{self._path}: stores no codebook, and {total} codes are too few to tell it by "
                f"({DETECTION_CODES} are needed); give --codebook A, B or C"
            )
        found = detect(counts, block_size)
        if found is None:
            share = (int(counts[0]) + int(counts[-1])) / total
            raise CheckpointError(
                f"{self._path}: stores no codebook, and the frequencies of its {bits}-bit codes fit no single one of "
                f"A, B and C (outermost codes: {share:.5f}); give --codebook A, B or C"
            )
        return found

    def table(self, bits: int) -> torch.Tensor | None:
        """The codebook of a width, if one was stored, given or detected."""
        return self._tables.get(bits)

    def coder(self, matrix: StoredMatrix) -> BlockCoder:
        """The coder of a matrix's table and block size.

        Raises:
            CheckpointError: the table is not ascending, not finite, or for no normalised block.
        """
        table = matrix.table if matrix.table is not None else self._tables[matrix.bits]
        key = (table.numpy().tobytes(), matrix.block_size)
        if key not in self._coders:
            what = matrix.table_key if matrix.table_key is not None else CODEBOOK_KEY
            file = self._folder.tensors[what].file if what in self._folder.tensors else self._path
            largest = float(table.abs().max())
            if largest > LARGEST_LEVEL:
                raise CheckpointError(f"{file}: {what}: level {largest:g} is none of a normalised block; {REMEDY}")
            try:
                self._coders[key] = BlockCoder(table, matrix.block_size, self._device)
            except ValueError as problem:
                raise CheckpointError(f"{file}: {what}: {problem}; {REMEDY}") from None
        return self._coders[key]
