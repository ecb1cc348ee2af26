"""What is in a checkpoint: every parameter, how it is stored, and what it takes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ..codec import CodebookName
from ..errors import CheckpointError
from .dequantize import refuse_hlwq_options
from .int4_source import Int4Source, is_int4
from .reader import HlwqSource, is_hlwq
from .tensor_folder import DTYPE_NAMES, TensorFolder


def inspect(path: Path, base_model: Path | None = None, codebook: CodebookName | None = None) -> dict[str, Any]:
    """Describe a checkpoint as JSON values.

    Args:
        path: an HLWQ, INT4 or 16-bit checkpoint.
        base_model: for HLWQ files whose widths only the original's shapes tell.
        codebook: for HLWQ files that store none.

    Returns:
        ``format``, ``bytes``, ``bytes_in_16_bit``, and ``parameters``: each with name, shape, how it is stored and its
        bytes. For HLWQ also bits, block size, codebook and its levels, and what must come from a base model.

    Raises:
        CheckpointError: the checkpoint cannot be read or contradicts itself.
    """
    folder = TensorFolder(path)
    if is_hlwq(path):
        return _hlwq(path, base_model, codebook)
    refuse_hlwq_options(path, base_model, codebook)
    if is_int4(folder):
        return _int4(path)
    parameters = [_plain(name, info.shape, DTYPE_NAMES[info.dtype], info.bytes) for name, info in folder.items()]
    return _summary(path, "16-bit", parameters)


def _plain(name: str, shape: tuple[int, ...], stored: str, size: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "stored": stored, "bytes": size}


def _summary(path: Path, kind: str, parameters: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "path": str(path),
        "format": kind,
        **more,
        "bytes": sum(p["bytes"] for p in parameters),
        "bytes_in_16_bit": sum(2 * math.prod(p["shape"]) for p in parameters),
        "parameters": parameters,
    }


def _hlwq(path: Path, base_model: Path | None, codebook: CodebookName | None) -> dict[str, Any]:
    source = HlwqSource(path, base_model, codebook, need_tables=False)
    note = None
    try:
        source.find_tables(codebook)
    except CheckpointError as problem:
        if codebook is not None:
            raise
        note = str(problem)
    parameters = []
    for name, parameter in source.parameters.items():
        stored = source.matrices.get(name)
        if stored is None:
            if name in source.plain:
                info = source.folder.tensors[source.plain[name]]
                parameters.append(_plain(name, info.shape, DTYPE_NAMES[info.dtype], info.bytes))
            continue
        size = sum(source.folder.tensors[key].bytes for matrix in stored for key in matrix.keys)
        parameters.append(_plain(name, parameter.shape, f"Q{stored[0].bits}", size))
    first = next(iter(source.matrices.values()))[0]
    table = first.table if first.table is not None else source.table(first.bits)
    return _summary(
        path,
        "hlwq",
        parameters,
        bits=sorted({m.bits for stored in source.matrices.values() for m in stored}),
        block_size=first.block_size,
        codebook=source.table_origin if note is None else note,
        levels=None if table is None else [round(level, 7) for level in table.tolist()],
        sums_listed=source.hashes is not None,
        missing=source.missing(),
    )


def _int4(path: Path) -> dict[str, Any]:
    source = Int4Source(path)
    size = source.arguments.group_size
    tensors = source.folder.tensors
    parameters = []
    for stem in source.stems:
        parts = sum(tensors[f"{stem}{part}"].bytes for part in source.parts(stem))
        parameters.append(_plain(f"{stem}weight", source.shapes[stem], f"INT4 g{size or 'row'}", parts))
    for name in source.plain:
        info = tensors[name]
        parameters.append(_plain(name, info.shape, DTYPE_NAMES[info.dtype], info.bytes))
    return _summary(path, "compressed-tensors", parameters, group_size=size)


def by_layer(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Experts of a layer that are stored alike, as one row with ``experts.*`` for their number."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for parameter in parameters:
        name = re.sub(r"(experts)\.\d+\.", r"\1.*.", parameter["name"])
        key = (name, str(parameter["shape"]), parameter["stored"])
        row = rows.setdefault(key, {**parameter, "name": name, "bytes": 0, "count": 0})
        row["bytes"] += parameter["bytes"]
        row["count"] += 1
    return list(rows.values())
