"""What all conversions share: the task that identifies one, progress, side files, and copying what stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .shard import Group, Produce, TensorPlan
from .sources import PIECE_BYTES, PlainSource, WeightSource, check_finite
from .tensor_folder import PICKLE_SUFFIXES
from .writer import FolderWriter

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *PICKLE_SUFFIXES)
OWN_FILES = ("config.json", "README.md")


def side_files(source: WeightSource) -> list[Path]:
    """Tokenizer, templates, processors and the like: every file that is no weight and no description of weights.

    Of files that the checkpoint and its base model both have, the checkpoint's.

    Raises:
        CheckpointError: one of them is a link that leads out of its folder.
    """
    files = {}
    for folder in reversed(source.folders()):
        for path in sorted(folder.path.iterdir()):
            described = path.name.endswith(".index.json") or path.name.startswith(("hlwq_", "polar_", "."))
            if path.is_file() and not described and path.name not in OWN_FILES and path.suffix not in WEIGHT_SUFFIXES:
                files[path.name] = folder.inside(path)
    return list(files.values())


def task_of(source: WeightSource, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What identifies a conversion: its kind and options, and the files it reads by size and time of change.

    Options are all that the written bytes depend on, also where they are computed: devices round differently.
    """
    files = {
        str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns]
        for folder in source.folders()
        for file in folder.files
    }
    config = json.dumps(source.config(), sort_keys=True)
    return {"kind": kind, "options": options, "files": files, "config": config}


def plain_group(source: WeightSource, name: str) -> Group:
    """A parameter that is written as it is."""
    parameter = source.parameters[name]
    return Group(name, (TensorPlan(name, parameter.dtype, parameter.shape),))


def copy_pieces(source: WeightSource, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter as it is, a piece at a time.

    Raises:
        CheckpointError: it holds NaN or inf.
    """
    parameter = source.parameters[name]
    if parameter.bytes == 0:
        return
    step = max(1, PIECE_BYTES // max(1, parameter.columns * parameter.dtype.itemsize))
    for start in range(0, parameter.rows, step):
        rows = source.rows(name, start, min(parameter.rows, start + step))
        if isinstance(source, PlainSource):  # the other sources check what they read
            check_finite(rows, source.folder, name)
        yield name, rows


def whole_tensors(group: Group, pieces: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a group out of their rows, each in the shape that is planned for it."""
    plans = {plan.name: plan for plan in group.tensors}
    for name, rows in groupby(pieces, key=itemgetter(0)):
        parts = [piece for _, piece in rows]
        yield name, (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(plans[name].shape)


def run_with_progress(writer: FolderWriter, source: WeightSource, produce: Produce, title: str) -> None:
    """Write all shards; the bar counts the parameters' bytes, and is quiet where nobody sees it.

    It moves with every piece: a stack of experts is readable, and time left would be told from whole ones only.
    """
    total = sum(p.bytes for p in source.parameters.values())
    bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
    counted: dict[str, float] = {}

    def watched(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        parameter = source.parameters.get(group.parameter)
        for name, piece in produce(group):
            yield name, piece
            if parameter is not None and group.bytes:
                done = parameter.bytes * piece.nbytes / group.bytes
                counted[group.parameter] = counted.get(group.parameter, 0) + done
                bar.update(done)

    def advance(group: Group) -> None:
        """What an earlier attempt did, and what rounding left."""
        parameter = source.parameters.get(group.parameter)
        if parameter is not None:
            bar.update(parameter.bytes - counted.get(group.parameter, 0))

    with bar:
        writer.run(watched, advance)


def listed(names: list[str]) -> str:
    """The first of several names and how many follow, with its verb: ``a and 2 more are``."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def readable(count: float) -> str:
    """Bytes for people: ``16.61 GB``, ``7.40 MB``, ``8.19 kB``, ``2 bytes``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"
