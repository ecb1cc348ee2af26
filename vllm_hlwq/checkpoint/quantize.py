"""16-bit checkpoint to HLWQ checkpoint, and back to 16 bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..codec import (
    GAIN,
    NORM,
    SEARCH,
    BlockCoder,
    CodebookName,
    Refinement,
    blocks_of,
    codebook,
    packed_size,
    quantize_matrix,
)
from ..errors import CheckpointError
from .conversion import copy_pieces, plain_group, run_with_progress, side_files, task_of
from .metadata import HLWQ_CONFIG, HlwqConfig, ParameterStats, QuantizationConfig
from .names import CODEBOOK_KEY, NEVER_CODED, kept_because
from .reader import HlwqSource, is_hlwq
from .sources import Parameter, PlainSource, WeightSource, pieces
from .writer import SHARD_BYTES, FolderWriter, Group, TensorPlan

BLOCK_SIZE = 128
FITS: dict[str, Refinement] = {"norm": NORM, "gain": GAIN, "search": SEARCH}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _bases(name: str, parameter: Parameter) -> list[str]:
    """Base key of each matrix of a coded parameter."""
    if len(parameter.shape) == 2:
        return [name]
    return [f"{name}_e{expert}" for expert in range(parameter.shape[0])]


def _coded_group(name: str, parameter: Parameter, bits: int) -> Group:
    rows, blocks = parameter.shape[-2], blocks_of(parameter.columns, BLOCK_SIZE)
    tensors = []
    for base in _bases(name, parameter):
        size = packed_size(rows * blocks * BLOCK_SIZE, bits)
        tensors += [
            TensorPlan(f"{base}__packed", torch.uint8, (size,)),
            TensorPlan(f"{base}__norms", torch.float16, (rows, blocks)),
            TensorPlan(f"{base}__meta", torch.int64, (5,)),
        ]
    return Group(name, tuple(tensors))


def quantize(
    source_path: Path,
    out: Path,
    bits: int = 5,
    codebook_name: CodebookName = "C",
    fit: str = "search",
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> HlwqConfig:
    """Code a 16-bit checkpoint.

    Args:
        source_path: folder of the model.
        out: folder to make.
        bits: width of a code, 2 to 8.
        codebook_name: the table; it is stored, so C, the optimum, is right for everyone who reads it.
        fit: what is stored for a block: ``norm``, its norm; ``gain``, the least-squares factor; ``search``, that with
            codes chosen again, and wider factors tried for blocks that the table would clip.
        device: where blocks are coded.
        shard_bytes: size at which a new file is begun.

    Returns:
        What was written, with the error of each parameter.

    Raises:
        CheckpointError: the source cannot be read or holds weights that cannot be coded, or ``out`` cannot be written.
    """
    source = PlainSource(source_path)
    table = codebook(codebook_name, bits)
    coder = BlockCoder(table, BLOCK_SIZE, device or torch.device("cpu"))
    kept = {}
    for name, parameter in source.parameters.items():
        reason = kept_because(name, parameter.shape, bits, BLOCK_SIZE) if parameter.dtype in FLOATS else "not float"
        if reason is not None:
            kept[name] = reason
    coded = [name for name in source.parameters if name not in kept]
    if not coded:
        raise CheckpointError(f"{source_path}: holds no matrix that HLWQ codes; give the folder of a language model")
    groups = [
        plain_group(source, name) if name in kept else _coded_group(name, parameter, bits)
        for name, parameter in source.parameters.items()
    ]
    groups.append(Group(CODEBOOK_KEY, (TensorPlan(CODEBOOK_KEY, torch.float32, tuple(table.shape)),)))
    options = {"bits": bits, "codebook": codebook_name, "fit": fit, "shard_bytes": shard_bytes}
    writer = FolderWriter(out, task_of(source, "quantize", options), groups, shard_bytes)

    def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        if group.parameter == CODEBOOK_KEY:
            yield CODEBOOK_KEY, table
        elif group.parameter in kept:
            yield from copy_pieces(source, group.parameter)
        else:
            yield from _code(source, group, coder, FITS[fit], writer)

    run_with_progress(writer, source, produce, f"coding at {bits} bits")
    description = _describe(source, writer, groups, kept, bits, codebook_name, fit)
    config = source.config()
    config["quantization_config"] = QuantizationConfig(
        format=description.format,
        bits=bits,
        block_size=BLOCK_SIZE,
        modules_to_not_convert=sorted({reason for reason in kept.values() if reason in NEVER_CODED}),
    ).model_dump()
    files = {"config.json": config, HLWQ_CONFIG: description.model_dump()}
    writer.finish(files, side_files(source.folder))
    return description


def _code(
    source: PlainSource, group: Group, coder: BlockCoder, refinement: Refinement, writer: FolderWriter
) -> Iterator[tuple[str, torch.Tensor]]:
    name = group.parameter
    parameter = source.parameters[name]
    rows, blocks = parameter.shape[-2], blocks_of(parameter.columns, BLOCK_SIZE)
    error = energy = 0.0
    for index, base in enumerate(_bases(name, parameter)):
        offset = index * rows
        for start, stop in pieces(Parameter((rows, parameter.columns), parameter.dtype)):
            weight = source.rows(name, offset + start, offset + stop)
            try:
                coded = quantize_matrix(weight, coder, refinement, measure=True)
            except ValueError as problem:
                file = source.folder.tensors[name].file
                raise CheckpointError(
                    f"{file}: {base} {problem}, counted from row {start}; mend the weights, or keep the 16-bit model"
                ) from None
            error += coded.squared_error
            energy += float(torch.linalg.vector_norm(weight, dtype=torch.float32).double().square())
            yield f"{base}__packed", coded.packed
            yield f"{base}__norms", coded.norms
        meta = [rows, blocks, BLOCK_SIZE, rows * blocks * BLOCK_SIZE, parameter.columns]
        yield f"{base}__meta", torch.tensor(meta)
    writer.note(name, {"error": error, "energy": energy})


def _describe(
    source: PlainSource,
    writer: FolderWriter,
    groups: list[Group],
    kept: dict[str, str],
    bits: int,
    codebook_name: CodebookName,
    fit: str,
) -> HlwqConfig:
    sizes = {group.parameter: group.bytes for group in groups}
    notes = writer.notes
    energy = sum(note["energy"] for note in notes.values())
    return HlwqConfig(
        format=f"hlwq-q{bits}",
        bits=bits,
        block_size=BLOCK_SIZE,
        codebook=codebook_name,
        fit=fit,
        relative_mse=sum(note["error"] for note in notes.values()) / energy if energy else 0.0,
        original_bytes=sum(parameter.bytes for parameter in source.parameters.values()),
        bytes=sum(sizes.values()),
        coded={
            name: ParameterStats(
                shape=list(source.parameters[name].shape),
                relative_mse=note["error"] / note["energy"] if note["energy"] else 0.0,
                bytes=sizes[name],
            )
            for name, note in notes.items()
        },
        kept=kept,
    )


def open_source(
    path: Path, base_model: Path | None, codebook_name: CodebookName | None, device: torch.device | None = None
) -> WeightSource:
    """A checkpoint as a source of 16-bit weights, whether it is coded or not.

    Raises:
        CheckpointError: it cannot be read, or an option does not apply to it.
    """
    if is_hlwq(path):
        return HlwqSource(path, base_model, codebook_name, device)
    if base_model is not None or codebook_name is not None:
        option = "--base-model" if base_model is not None else "--codebook"
        raise CheckpointError(f"{path}: is not coded with HLWQ, so {option} has no meaning; leave it out")
    return PlainSource(path)


def dequantize(source: HlwqSource, out: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write the BF16 checkpoint that an HLWQ one stands for.

    Args:
        source: the coded checkpoint, with or without its base model.
        out: folder to make.
        shard_bytes: size at which a new file is begun.

    Returns:
        Parameters that neither the file nor a base model holds: the result is partial unless this is empty.

    Raises:
        CheckpointError: the source is damaged, or ``out`` cannot be written.
    """
    groups = [plain_group(source, name) for name in source.parameters]
    options: dict[str, Any] = {"shard_bytes": shard_bytes, "codebook": source.table_origin}
    writer = FolderWriter(out, task_of(source, "dequantize", options), groups, shard_bytes)
    missing = source.missing()

    def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        yield from copy_pieces(source, group.parameter)

    run_with_progress(writer, source, produce, "decoding to BF16")
    config = source.config()
    copies = {path.name: path for folder in reversed(source.folders()) for path in side_files(folder)}
    writer.finish({"config.json": config} if config else {}, list(copies.values()))
    return missing
