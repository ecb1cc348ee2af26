"""What a model card says, as numbers: sizes by kind and format, errors by layer, memory by size of the expert cache.

Everything is taken from the checkpoint's files; the INT4 sibling of an HLWQ checkpoint is planned, not made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..int4_checkpoint import int4_arguments
from .conversion import listed
from .export_plan import int4_group, plan_export
from .inspect import inspect
from .int4_source import CODES, GROUP_OF, SCALES, ZERO_POINTS
from .layouts import EMBEDDING, never_int4
from .metadata import HlwqConfig, read_settings
from .reader import HlwqSource, is_hlwq
from .sources import PlainSource
from .tensor_folder import DTYPE_NAMES, TensorFolder
from .verify import verify

KINDS = ("experts", "dense MLP", "attention", "embedding", "norms, routers and other")
SIXTEEN_BIT = "16 bit"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")
_EXPERT = re.compile(r"^(?P<layer>(?:.*\.)?experts)\.(?P<expert>\d+)\.")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_forward|ffn|shared_expert", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Parameters of one kind that are stored alike."""

    kind: str
    stored: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class LayerError:
    """Relative mean squared error of one kind in one layer: the mean over its coded parameters, by their weights."""

    layer: int | None
    kind: str
    weights: int
    relative_mse: float


@dataclass(frozen=True)
class ExpertMemory:
    """What an INT4 checkpoint takes on a GPU with the expert cache.

    slot_bytes: bytes of one expert, of each mixture-of-experts layer.
    experts: of a layer.
    resident_bytes: everything but the experts.
    """

    slot_bytes: tuple[int, ...]
    experts: int
    resident_bytes: int

    def device_bytes(self, slots: int) -> int:
        """``slots`` of every layer and all that is no expert; staging banks, KV cache and activations come on top."""
        return slots * sum(self.slot_bytes) + self.resident_bytes

    @property
    def host_bytes(self) -> int:
        """All experts, which wait in host memory."""
        return self.experts * sum(self.slot_bytes)

    def choices(self) -> list[int]:
        """Cache sizes worth listing: powers of two, and all experts."""
        return [*(1 << power for power in range((self.experts - 1).bit_length())), self.experts]


@dataclass(frozen=True)
class Facts:
    """All that a card is made from.

    sizes: by format, the checkpoint's own and others', as parts.
    own_format: the checkpoint's, a key of ``sizes``.
    errors: empty if none were measured.
    memory: None if there are no experts, or no INT4 sibling.
    no_export: why there is no INT4 sibling.
    """

    path: Path
    inspected: dict[str, Any]
    own: HlwqConfig | None
    config: dict[str, Any]
    sizes: dict[str, list[Part]]
    own_format: str
    errors: list[LayerError]
    relative_mse: float | None
    group_size: int | None
    memory: ExpertMemory | None
    no_export: str | None

    def total(self, name: str) -> int:
        """Bytes of all weights in a format."""
        return sum(part.bytes for part in self.sizes[name])


def kind_of(name: str) -> str:
    """Which of ``KINDS`` a parameter is, by its name."""
    if never_int4(name):
        return KINDS[4]
    if _EXPERTS.search(name):
        return KINDS[0]
    if EMBEDDING.search(name):
        return KINDS[3]
    if _ATTENTION.search(name):
        return KINDS[2]
    return KINDS[1] if _MLP.search(name) else KINDS[4]


def parts_of(parameters: Iterable[tuple[str, str, int, int]]) -> list[Part]:
    """Sum parameters up by kind and form; each is its name, how it is stored, its weights and its bytes."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for name, stored, weights, size in parameters:
        key = (kind_of(name), stored)
        before = sums.get(key, (0, 0))
        sums[key] = (before[0] + weights, before[1] + size)
    found = [Part(kind, stored, weights, size) for (kind, stored), (weights, size) in sums.items()]
    return sorted(found, key=lambda part: (KINDS.index(part.kind), part.stored))


def errors_by_layer(errors: Mapping[str, tuple[int, float]]) -> list[LayerError]:
    """Mean errors by layer and kind.

    Args:
        errors: weights and relative mean squared error of each parameter.
    """
    sums: dict[tuple[int | None, str], tuple[int, float]] = {}
    for name, (weights, error) in errors.items():
        match = _LAYER.search(name)
        key = (int(match[1]) if match else None, kind_of(name))
        before = sums.get(key, (0, 0.0))
        sums[key] = (before[0] + weights, before[1] + weights * error)
    found = [LayerError(layer, kind, weights, total / weights) for (layer, kind), (weights, total) in sums.items()]
    return sorted(found, key=lambda e: (-1 if e.layer is None else e.layer, KINDS.index(e.kind)))


def expert_memory(tensors: Mapping[str, int]) -> ExpertMemory | None:
    """The memory of an INT4 checkpoint from its tensors' names and bytes; None if it has no experts.

    Tensors that only describe others (``weight_shape``) are not loaded and count nowhere.
    """
    layers: dict[str, dict[str, int]] = {}
    resident = 0
    for name, size in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            resident += size
        elif name.endswith((CODES, SCALES, ZERO_POINTS, GROUP_OF)):
            experts = layers.setdefault(match["layer"], {})
            experts[match["expert"]] = experts.get(match["expert"], 0) + size
    if not layers:
        return None
    slots = tuple(max(experts.values()) for experts in layers.values())
    return ExpertMemory(slots, max(len(experts) for experts in layers.values()), resident)


def gather(path: Path, original: Path | None = None) -> Facts:
    """Read a checkpoint's facts.

    Args:
        path: folder of an HLWQ or INT4 checkpoint.
        original: folder of the 16-bit model it was made from: needed for errors that the checkpoint does not state,
            and for HLWQ files that hold only what is coded.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not coded.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no folder, and a card goes into one; give the folder of a checkpoint")
    own = read_settings(TensorFolder(path)).own if is_hlwq(path) else None
    lender = original if own is None and is_hlwq(path) else None
    found = inspect(path, lender)
    if found["format"] == "16-bit":
        raise CheckpointError(f"{path}: is not coded, so there is nothing to say; give an HLWQ or INT4 checkpoint")
    rows = [(p["name"], p["stored"], math.prod(p["shape"]), p["bytes"]) for p in found["parameters"]]
    sizes = {SIXTEEN_BIT: parts_of((name, SIXTEEN_BIT, weights, 2 * weights) for name, _, weights, _ in rows)}
    tensors: dict[str, int] = {}
    group_size = refusal = None
    if found["format"] == "hlwq":
        own_format = f"HLWQ Q{'/'.join(map(str, found['bits']))}"
        sizes[own_format] = parts_of(rows)
        try:
            group_size, tensors, parts = _planned_sibling(HlwqSource(path, lender, need_tables=False))
            sizes[_int4(group_size)] = parts
        except CheckpointError as problem:
            refusal = str(problem).removeprefix(f"{path}: ")
    else:
        group_size = found["group_size"]
        own_format = _int4(group_size)
        sizes[own_format] = parts_of(rows)
        tensors = {name: info.bytes for name, info in TensorFolder(path).items()}
    errors, relative_mse = _errors(path, own, original, lender)
    config = TensorFolder(path).config() or (TensorFolder(original).config() if original else {})
    return Facts(
        path, found, own, config, sizes, own_format, errors, relative_mse, group_size, expert_memory(tensors), refusal
    )


def _int4(group_size: int | None) -> str:
    return f"INT4 g{group_size or 'row'}"


def _planned_sibling(source: HlwqSource) -> tuple[int | None, dict[str, int], list[Part]]:
    """Group size, tensors by bytes, and parts of the INT4 sibling that ``hlwq export`` would make.

    Raises:
        CheckpointError: it would refuse.
    """
    missing = source.missing()
    if missing:
        raise CheckpointError(f"{listed(missing)} not in it, so `hlwq export` needs --base-model")
    plan = plan_export(source, "auto", linears=False)
    arguments = int4_arguments(plan.group_size, symmetric=True)
    tensors, rows = {}, []
    for name, parameter in source.parameters.items():
        weights = math.prod(parameter.shape)
        if name in plan.matrices:
            group = int4_group(name, plan, arguments, source)
            tensors.update({tensor.name: tensor.bytes for tensor in group.tensors})
            rows.append((name, _int4(plan.group_size), weights, group.bytes))
        else:
            tensors[name] = parameter.bytes
            rows.append((name, DTYPE_NAMES[parameter.dtype], weights, parameter.bytes))
    return plan.group_size, tensors, parts_of(rows)


def _errors(
    path: Path, own: HlwqConfig | None, original: Path | None, lender: Path | None
) -> tuple[list[LayerError], float | None]:
    """Errors by layer and over all: as the writer measured them, or else against the original."""
    if own is not None:
        stated = {name: (math.prod(stats.shape), stats.relative_mse) for name, stats in own.coded.items()}
        return errors_by_layer(stated), own.relative_mse
    if original is None:
        return [], None
    report = verify(path, original, lender)
    shapes = {name: parameter.shape for name, parameter in PlainSource(original).parameters.items()}
    return errors_by_layer({n: (math.prod(shapes[n]), e) for n, e in report.errors.items()}), report.relative_mse
