"""16-bit checkpoint to HLWQ checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

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
from .metadata import AUTO_FILE, AUTO_MAP, HLWQ_CONFIG, HlwqConfig, ParameterStats, QuantizationConfig
from .names import CODEBOOK_KEY, NEVER_CODED, kept_because
from .reader import is_hlwq
from .shard import Group, TensorPlan
from .sources import Parameter, PlainSource, pieces
from .tensor_folder import DTYPE_NAMES
from .writer import SHARD_BYTES, FolderWriter

BLOCK_SIZE = 128
FITS: dict[str, Refinement] = {"norm": NORM, "gain": GAIN, "search": SEARCH}
KEPT_BY_NAME = "named by --keep"
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
    keep: Sequence[str] = (),
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
        keep: shell-style patterns of the names of parameters to leave in 16 bit, beside those that always are.

    Returns:
        What was written, with the error of each parameter.

    Raises:
        CheckpointError: the source cannot be read or holds weights that cannot be coded, a pattern of ``keep`` matches
            nothing that would be coded, or ``out`` cannot be written.
    """
    if is_hlwq(source_path):
        raise CheckpointError(f"{source_path}: is coded with HLWQ already; give the 16-bit original")
    source = PlainSource(source_path)
    table = codebook(codebook_name, bits)
    coder = BlockCoder(table, BLOCK_SIZE, device or torch.device("cpu"))
    kept = _kept(source, bits, keep)
    if len(kept) == len(source.parameters):
        if keep:
            raise CheckpointError(f"--keep {' '.join(keep)}: leaves nothing of {source_path} to code; keep less")
        raise CheckpointError(f"{source_path}: holds no matrix to code; give the folder of a language model")
    groups = [
        plain_group(source, name) if name in kept else _coded_group(name, parameter, bits)
        for name, parameter in source.parameters.items()
    ]
    groups.append(Group(CODEBOOK_KEY, (TensorPlan(CODEBOOK_KEY, torch.float32, tuple(table.shape)),)))
    options = {
        "bits": bits, "codebook": codebook_name, "fit": fit, "keep": sorted(keep), "shard_bytes": shard_bytes,
        "device": coder.device.type,
    }  # fmt: skip
    copies = side_files(source)
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
    own_code = "auto_map" in config
    if not own_code:
        config["auto_map"] = AUTO_MAP
    config["quantization_config"] = QuantizationConfig(
        format=description.format,
        bits=bits,
        block_size=BLOCK_SIZE,
        modules_to_not_convert=_not_converted(kept),
    ).model_dump()
    files = {"config.json": config, HLWQ_CONFIG: description.model_dump()}
    writer.finish(files, copies + ([] if own_code else [AUTO_FILE]))
    return description


def _kept(source: PlainSource, bits: int, keep: Sequence[str]) -> dict[str, str]:
    """Parameters that stay as they are, and why."""
    kept = {}
    unused = dict.fromkeys(keep)
    for name, parameter in source.parameters.items():
        if parameter.dtype in FLOATS:
            reason = kept_because(name, parameter.shape, bits, BLOCK_SIZE)
        else:
            reason = f"stored as {DTYPE_NAMES[parameter.dtype]}"
        if reason is None:
            matching = [pattern for pattern in keep if fnmatchcase(name, pattern)]
            for pattern in matching:
                unused.pop(pattern, None)
            reason = f"{KEPT_BY_NAME} {matching[0]}" if matching else None
        if reason is not None:
            kept[name] = reason
    if unused:
        raise CheckpointError(
            f"--keep {next(iter(unused))}: matches no parameter of {source.path} that would be coded; "
            "`hlwq inspect` lists their names"
        )
    return kept


def _not_converted(kept: dict[str, str]) -> list[str]:
    """Kinds of modules that are never coded, and the names of those kept by request."""
    kinds = {reason for reason in kept.values() if reason in NEVER_CODED}
    by_name = {name.removesuffix(".weight") for name, reason in kept.items() if reason.startswith(KEPT_BY_NAME)}
    return sorted(kinds | by_name)


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
