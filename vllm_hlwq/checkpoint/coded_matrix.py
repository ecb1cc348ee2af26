"""One coded matrix as it lies in a file: where its codes and norms are, checked against one another.

Every form is given out as MSB-first packed codes by rows, so that decoding knows only one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint_files import REMEDY
from ..codec import blocks_of, pack, packed_size, unpack
from ..codec.packing import unpack_half_block_nibbles
from ..errors import CheckpointError
from .architecture import parameter_shapes
from .names import CodedKeys, canonical
from .tensor_folder import TensorFolder

DEFAULT_BLOCK_SIZE = 128
MAX_BLOCK_SIZE = 4096


@dataclass
class StoredMatrix:
    """Where a coded matrix is and what it stands for; ``form`` is ``msb``, ``codes``, ``nibbles`` or ``lsb``."""

    label: str
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
                f"{self.label}: code {int(codes.max())} is beyond its {2**self.bits} levels; {REMEDY}"
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


def _fail(folder: TensorFolder, label: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{folder.path}: {label}: {problem}; {REMEDY}")


def _columns(folder: TensorFolder, label: str, stated: int | None, known: int | None, blocks: int, size: int) -> int:
    columns = stated if stated is not None else known
    if columns is None:
        shapes = {canonical(name): shape for name, shape in parameter_shapes(folder.config()).items()}
        columns = shapes.get(canonical(label), (None,))[-1]
    if columns is None:
        raise CheckpointError(
            f"{folder.path}: {label}: its width before padding to {blocks * size} is not stored; "
            "give --base-model, whose shapes tell it"
        )
    if known is not None and columns != known:
        raise CheckpointError(
            f"{folder.path}: {label} has {columns} columns, the base model {known}; give the base model that was coded"
        )
    if columns < 1 or blocks_of(columns, size) != blocks:
        raise _fail(folder, label, f"{columns} columns do not make {blocks} blocks of {size}")
    return columns


def packed_matrix(
    folder: TensorFolder, keys: CodedKeys, settings: dict[str, Any], known_columns: int | None
) -> StoredMatrix:
    """A matrix stored as ``__packed``, ``__norms`` and ``__meta``.

    Args:
        folder: where it is stored.
        keys: its keys.
        settings: of the checkpoint's JSON files, for what it does not say itself.
        known_columns: columns of the parameter in the base model, if there is one.

    Raises:
        CheckpointError: the three tensors contradict one another or ``known_columns``.
    """
    del settings  # this form says everything itself
    label = keys.base
    packed, norms = folder.tensors[keys.parts["packed"]], folder.tensors[keys.parts["norms"]]
    meta_info = folder.tensors[keys.parts["meta"]]
    if meta_info.dtype != torch.int64 or meta_info.shape not in ((4,), (5,)):
        raise _fail(folder, f"{label}__meta", f"is {list(meta_info.shape)} of {meta_info.dtype}, not 4 or 5 of int64")
    meta = folder.tensor(keys.parts["meta"]).tolist()
    rows, blocks, size, total = meta[:4]
    if min(meta) < 1 or size > MAX_BLOCK_SIZE or size & (size - 1) or rows * blocks * size != total:
        raise _fail(folder, f"{label}__meta", f"{meta} is not [rows, blocks, block size, their product, columns]")
    if packed.dtype != torch.uint8 or len(packed.shape) != 1 or packed.shape[0] * 8 % total:
        raise _fail(folder, f"{label}__packed", f"{list(packed.shape)} of {packed.dtype} are no {total} codes in bytes")
    bits = packed.shape[0] * 8 // total
    if not 2 <= bits <= 8:
        raise _fail(folder, f"{label}__packed", f"{packed.shape[0]} bytes for {total} codes are {bits} bits a code")
    if norms.dtype != torch.float16 or math.prod(norms.shape) != rows * blocks or norms.shape[0] != rows:
        raise _fail(
            folder, f"{label}__norms", f"{list(norms.shape)} of {norms.dtype}, not [{rows}, {blocks}] of float16"
        )
    columns = _columns(folder, label, meta[4] if len(meta) == 5 else None, known_columns, blocks, size)
    stored = [keys.parts[part] for part in ("packed", "norms", "meta")]
    return StoredMatrix(label, stored, stored[0], stored[1], "msb", rows, blocks, size, columns, bits)


def legacy_matrix(
    folder: TensorFolder, keys: CodedKeys, settings: dict[str, Any], known_columns: int | None
) -> StoredMatrix:
    """A matrix stored as ``.codes``, ``.norms`` and ``.ct`` or ``.ct_scaled``; arguments and errors as above."""
    label = keys.base
    codes, norms = folder.tensors[keys.parts["codes"]], folder.tensors[keys.parts["norms"]]
    table_key = keys.parts.get("ct_scaled") or keys.parts["ct"]
    table = folder.tensor(table_key).float().view(-1).clone()
    bits = len(table).bit_length() - 1
    if len(table) != 1 << bits or not 2 <= bits <= 8:
        raise _fail(folder, table_key, f"{len(table)} levels are no power of two from 4 to 256")
    size = settings.get("block_size", DEFAULT_BLOCK_SIZE)
    if not isinstance(size, int) or not 1 < size <= MAX_BLOCK_SIZE or size & (size - 1):
        raise _fail(folder, label, f"block size {size!r} is no power of two up to {MAX_BLOCK_SIZE}")
    if len(codes.shape) != 2 or norms.dtype != torch.float16 or 0 in codes.shape:
        raise _fail(folder, label, f"codes {list(codes.shape)} are no matrix, or norms {norms.dtype} are not float16")
    rows, width = codes.shape
    if math.prod(norms.shape) % rows or not math.prod(norms.shape):
        raise _fail(folder, f"{label}.norms", f"{list(norms.shape)} is not a number of blocks for each of {rows} rows")
    blocks = math.prod(norms.shape) // rows
    padded = blocks * size
    forms = {(torch.int8, padded): "codes", (torch.uint8, padded): "codes"}
    if bits <= 4:
        forms[torch.uint8, padded // 2] = "nibbles"
    if bits == 5:
        forms[torch.uint8, padded * 5 // 8] = "lsb"
    form = forms.get((codes.dtype, width))
    if form is None:
        raise _fail(
            folder, f"{label}.codes", f"{width} bytes of {codes.dtype} a row hold no {padded} codes of {bits} bits"
        )
    columns = _columns(folder, label, None, known_columns, blocks, size)
    if "ct_scaled" in keys.parts:
        table = table * math.sqrt(size)
    stored = [keys.parts[part] for part in keys.parts]
    return StoredMatrix(
        label, stored, keys.parts["codes"], keys.parts["norms"], form, rows, blocks, size, columns, bits, table
    )
