"""One coded matrix as it lies in a file: where its codes and norms are, checked against one another.

Every form is given out as MSB-first packed codes by rows, so that decoding knows only one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoint_files import REMEDY
from ..codec import blocks_of, pack, packed_size, unpack
from ..codec.packing import unpack_half_block_nibbles
from ..errors import CheckpointError
from .expected import ExpectedModel
from .names import PARTS, CodedKeys
from .tensor_folder import TensorFolder

DEFAULT_BLOCK_SIZE = 128
DEFAULT_BITS = 5
MIN_BLOCK_SIZE = 8
"""So that a row's codes fill whole bytes at any width."""
MAX_BLOCK_SIZE = 4096


def bits_of(table: torch.Tensor) -> int | None:
    """Bits of a table's codes; None if its length is no power of two from 4 to 256."""
    bits = len(table).bit_length() - 1
    return bits if 2 <= bits <= 8 and len(table) == 1 << bits else None


@dataclass
class StoredMatrix:
    """Where a coded matrix is and what it stands for; ``form`` is ``msb``, ``codes``, ``nibbles`` or ``lsb``."""

    label: str
    file: Path
    keys: list[str]
    codes_key: str
    norms_key: str
    form: str
    rows: int
    blocks: int
    block_size: int
    in_features: int
    bits: int
    table: torch.Tensor | None = field(default=None, repr=False)
    table_key: str | None = None

    @property
    def row_codes(self) -> int:
        return self.blocks * self.block_size

    def norms(self, folder: TensorFolder) -> torch.Tensor:
        return folder.tensor(self.norms_key).view(self.rows, self.blocks)

    def codes(self, folder: TensorFolder, start: int, stop: int) -> torch.Tensor:
        """Codes uint8 ``[rows, blocks * block_size]`` of a range of rows."""
        stored = folder.tensor(self.codes_key)
        if self.form == "msb":
            return unpack(self.packed_rows(folder, start, stop), (stop - start) * self.row_codes, self.bits).view(
                stop - start, self.row_codes
            )
        chunk = stored[start:stop]
        if self.form == "nibbles":
            return unpack_half_block_nibbles(chunk.contiguous(), self.block_size).view(stop - start, self.row_codes)
        if self.form == "lsb":
            count = (stop - start) * self.row_codes
            return unpack(chunk.reshape(-1), count, self.bits, "lsb").view(stop - start, self.row_codes)
        return chunk.to(torch.uint8)

    def packed_rows(self, folder: TensorFolder, start: int, stop: int) -> torch.Tensor:
        """Codes of a range of rows, packed MSB-first."""
        if self.form == "msb":
            row = packed_size(self.row_codes, self.bits)
            return folder.tensor(self.codes_key)[start * row : stop * row]
        codes = self.codes(folder, start, stop)
        if codes.numel() and int(codes.max()) >= 2**self.bits:
            raise CheckpointError(
                f"{self.file}: {self.codes_key} holds code {int(codes.max())}, beyond {2**self.bits} levels; {REMEDY}"
            )
        return pack(codes, self.bits)

    def code_counts(self, folder: TensorFolder) -> torch.Tensor:
        """How often each code occurs in blocks that are not all zero: int64 ``[2 ** bits]``."""
        alive = self.norms(folder) != 0
        counts = torch.zeros(2**self.bits, dtype=torch.int64)
        step = max(1, 2**22 // self.row_codes)
        for start in range(0, self.rows, step):
            stop = min(self.rows, start + step)
            codes = self.codes(folder, start, stop).view(-1, self.block_size)[alive[start:stop].reshape(-1)]
            counts += torch.bincount(codes.reshape(-1).int(), minlength=2**self.bits)[: 2**self.bits]
        return counts


class MatrixReader:
    """Finds out what stored tensors stand for.

    Args:
        folder: where they are.
        bits: code width that the checkpoint states, if it does.
        block_size: block size that it states, if it does.
        expected: the model's shapes.
    """

    def __init__(self, folder: TensorFolder, bits: int | None, block_size: int | None, expected: ExpectedModel) -> None:
        self._folder = folder
        self._bits = bits
        self._block_size = block_size
        self._expected = expected

    def read(self, name: str, keys: CodedKeys, columns: int | None) -> StoredMatrix:
        """One matrix of a parameter.

        Args:
            name: canonical name of the parameter.
            keys: the matrix's own keys.
            columns: of the parameter in the base model or our own list, if one of them has it.

        Raises:
            CheckpointError: its tensors contradict one another, the checkpoint's settings or ``columns``.
        """
        matrix, stated = self._legacy(keys) if keys.legacy else self._packed(keys)
        matrix.in_features = self._columns(name, matrix, stated, columns)
        return matrix

    def _fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._folder.tensors[key].file}: {key} {problem}; {REMEDY}")

    def _check_block_size(self, key: str, size: int) -> None:
        if size & (size - 1) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
            raise self._fail(key, f"has block size {size}, no power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}")
        if self._block_size not in (None, size):
            raise self._fail(key, f"has block size {size}, the checkpoint's JSON says {self._block_size}")

    def _columns(self, name: str, matrix: StoredMatrix, stated: int | None, known: int | None) -> int:
        columns = stated if stated is not None else known
        if columns is None:
            columns = self._expected.columns(name)
        padded = f"{matrix.blocks} blocks of {matrix.block_size}"
        if columns is None:
            raise CheckpointError(
                f"{matrix.file}: {matrix.label} is stored as {padded}, but not how wide it was before padding; "
                "give --base-model, whose shapes tell it"
            )
        if known is not None and columns != known:
            raise CheckpointError(
                f"{matrix.file}: {matrix.label} has {columns} columns, in the model {known}; "
                "give the base model that was coded"
            )
        if columns < 1 or blocks_of(columns, matrix.block_size) != matrix.blocks:
            raise self._fail(matrix.codes_key, f"is stored as {padded}, which {columns} columns do not make")
        return columns

    def _packed(self, keys: CodedKeys) -> tuple[StoredMatrix, int | None]:
        """``__packed``, ``__norms`` and ``__meta``, and the columns that ``__meta`` states."""
        stored = [keys.parts[part] for part in PARTS]
        codes_key, norms_key, meta_key = stored
        packed, norms, meta_info = (self._folder.tensors[key] for key in stored)
        if meta_info.dtype != torch.int64 or meta_info.shape not in ((4,), (5,)):
            raise self._fail(meta_key, f"is {list(meta_info.shape)} of {meta_info.dtype}, not 4 or 5 of int64")
        meta = self._folder.tensor(meta_key).tolist()
        rows, blocks, size, total = meta[:4]
        if min(meta) < 1 or rows * blocks * size != total:
            raise self._fail(meta_key, f"is {meta}, not [rows, blocks, block size, their product, columns]")
        self._check_block_size(meta_key, size)
        if packed.dtype != torch.uint8 or len(packed.shape) != 1:
            raise self._fail(codes_key, f"is {list(packed.shape)} of {packed.dtype}, not a row of bytes")
        bits = self._bits or DEFAULT_BITS
        if packed.shape[0] != packed_size(total, bits):
            raise self._fail(
                codes_key,
                f"is {packed.shape[0]} bytes; the {total} codes of {bits} bits that {meta_key} states "
                f"take {packed_size(total, bits)}",
            )
        if norms.dtype != torch.float16 or norms.shape != (rows, blocks):
            raise self._fail(
                norms_key, f"is {list(norms.shape)} of {norms.dtype}, by {meta_key} [{rows}, {blocks}] of float16"
            )
        matrix = StoredMatrix(keys.base, packed.file, stored, codes_key, norms_key, "msb", rows, blocks, size, 0, bits)
        return matrix, meta[4] if len(meta) == 5 else None

    def _legacy(self, keys: CodedKeys) -> tuple[StoredMatrix, int | None]:
        """``.codes``, ``.norms`` and ``.ct`` or ``.ct_scaled``; they never state their columns."""
        codes_key, norms_key = keys.parts["codes"], keys.parts["norms"]
        codes, norms = self._folder.tensors[codes_key], self._folder.tensors[norms_key]
        table_key = keys.parts.get("ct_scaled") or keys.parts["ct"]
        if not self._folder.tensors[table_key].dtype.is_floating_point:
            raise self._fail(table_key, f"is of {self._folder.tensors[table_key].dtype}, not float32")
        table = self._folder.tensor(table_key).float().view(-1).clone()
        bits = bits_of(table)
        if bits is None:
            raise self._fail(table_key, f"has {len(table)} levels, no power of two from 4 to 256")
        size = self._block_size or DEFAULT_BLOCK_SIZE
        self._check_block_size(codes_key, size)
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise self._fail(codes_key, f"is {list(codes.shape)}, no matrix")
        rows, width = codes.shape
        count = math.prod(norms.shape)
        if norms.dtype != torch.float16 or norms.shape not in ((count,), (rows, count // rows)) or not count:
            raise self._fail(
                norms_key, f"is {list(norms.shape)} of {norms.dtype}, no float16 for each block of {rows} rows"
            )
        blocks = count // rows
        padded = blocks * size
        forms = {(torch.int8, padded): "codes", (torch.uint8, padded): "codes"}
        if bits <= 4:
            forms[torch.uint8, padded // 2] = "nibbles"
        if bits == 5:
            forms[torch.uint8, padded * 5 // 8] = "lsb"
        form = forms.get((codes.dtype, width))
        if form is None or count % rows:
            raise self._fail(
                codes_key,
                f"is {list(codes.shape)} of {codes.dtype}; that holds no {padded} codes of {bits} bits a row, "
                f"which {norms_key} and {table_key} ask for",
            )
        if "ct_scaled" in keys.parts:
            table = table * math.sqrt(size)
        matrix = StoredMatrix(
            keys.base, codes.file, list(keys.parts.values()), codes_key, norms_key, form, rows, blocks, size, 0, bits,
            table, table_key,
        )  # fmt: skip
        return matrix, None
