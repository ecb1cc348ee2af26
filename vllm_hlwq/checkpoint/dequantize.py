"""Coded checkpoints to the 16-bit ones that they stand for, and the way to open any checkpoint as a source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..codec import CodebookName
from ..errors import CheckpointError
from .conversion import copy_pieces, listed, plain_group, run_with_progress, side_files, task_of, whole_tensors
from .int4_source import Int4Source, is_int4
from .reader import HlwqSource, is_hlwq
from .shard import Group
from .sources import PlainSource, WeightSource
from .tensor_folder import TensorFolder
from .writer import SHARD_BYTES, FolderWriter


def open_source(
    path: Path,
    base_model: Path | None = None,
    codebook_name: CodebookName | None = None,
    device: torch.device | None = None,
) -> HlwqSource | Int4Source | PlainSource:
    """A checkpoint as a source of 16-bit weights, however it is stored.

    Args:
        path: an HLWQ, INT4 or 16-bit checkpoint.
        base_model: for HLWQ files that hold only what is coded.
        codebook_name: for HLWQ files that store no table.
        device: where HLWQ is decoded.

    Raises:
        CheckpointError: it cannot be read, or an option does not apply to it.
    """
    if is_hlwq(path):
        return HlwqSource(path, base_model, codebook_name, device)
    refuse_hlwq_options(path, base_model, codebook_name)
    return Int4Source(path) if is_int4(TensorFolder(path)) else PlainSource(path)


def refuse_hlwq_options(path: Path, base_model: Path | None, codebook_name: CodebookName | None) -> None:
    """Refuse what only HLWQ checkpoints have a use for.

    Raises:
        CheckpointError: one of them was given.
    """
    for option, value in (("--base-model", base_model), ("--codebook", codebook_name)):
        if value is not None:
            raise CheckpointError(f"{path}: is not coded with HLWQ, so {option} has no meaning; leave it out")


class SixteenBitExport:
    """The 16-bit checkpoint that a coded one stands for, made tensor by tensor for a model that is being loaded.

    Raises:
        CheckpointError: the source is incomplete.
    """

    def __init__(self, source: HlwqSource) -> None:
        if missing := source.missing():
            raise CheckpointError(
                f"{source.path}: {listed(missing)} not in it; give --base-model, which has what it lacks"
            )
        self.source = source
        self.groups = [plain_group(source, name) for name in source.parameters]

    def tensors(self, group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        """A group's tensors, whole."""
        return whole_tensors(group, copy_pieces(self.source, group.parameter))

    def config(self) -> dict[str, Any]:
        return self.source.config()


def dequantize(source: WeightSource, out: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write the 16-bit checkpoint that a coded one stands for.

    Args:
        source: an HLWQ checkpoint, with or without its base model, or an INT4 one.
        out: folder to make.
        shard_bytes: size at which a new file is begun.

    Returns:
        Parameters that neither the file nor a base model holds: the result is partial unless this is empty.

    Raises:
        CheckpointError: the source is damaged or 16-bit already, or ``out`` cannot be written.
    """
    options: dict[str, Any] = {"shard_bytes": shard_bytes}
    missing = []
    if isinstance(source, HlwqSource):
        options |= {"codebook": source.table_origin, "device": source.device.type}
        missing = source.missing()
    elif isinstance(source, Int4Source):
        _refuse_vllm_layout(source)
    else:
        raise CheckpointError(f"{source.path}: is neither HLWQ nor INT4, so there is nothing to decode")
    groups = [plain_group(source, name) for name in source.parameters]
    copies = side_files(source)
    writer = FolderWriter(out, task_of(source, "dequantize", options), groups, shard_bytes)

    def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        yield from copy_pieces(source, group.parameter)

    run_with_progress(writer, source, produce, "decoding to 16 bit")
    config = source.config()
    writer.finish({"config.json": config} if config else {}, copies)
    return missing


def _refuse_vllm_layout(source: Int4Source) -> None:
    """Refuse experts in the layout of vLLM's gpt-oss loader: no 16-bit model has parameters of those names."""
    stem = next((stem for stem in source.stems if stem.endswith("_")), None)
    if stem is not None:
        raise CheckpointError(
            f"{source.path}: {stem}weight_packed is laid out for vLLM only; use the model that it was made from"
        )
