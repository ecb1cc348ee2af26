"""How HLWQ files spell tensors, and which tensors of a model are coded.

A coded tensor's base key may be the parameter's name, the same with ``__`` for every ``.``, and either with or without
the trailing ``weight``; experts of a 3-D stack carry ``_e<index>``. All spellings of a tensor have one canonical form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint_files import REMEDY
from ..codec import blocks_of, packed_size
from ..errors import CheckpointError

PARTS = ("packed", "norms", "meta")
LEGACY_PARTS = ("codes", "norms", "ct_scaled", "ct")
CODEBOOK_KEY = "hlwq.codebook"
_PART = re.compile(rf"^(?P<base>.+)__(?P<part>{'|'.join(PARTS)})$")
_LEGACY = re.compile(rf"^(?P<base>.+)\.(?P<part>{'|'.join(LEGACY_PARTS)})$")
# At most six digits: a longer number is no expert, and Python limits what int() takes.
_SLICE = re.compile(r"^(?P<stack>.+)_e(?P<expert>[0-9]{1,6})$")
_UNFUSED = re.compile(r"^(?P<prefix>(?:.+\.)?experts)\.(?P<expert>[0-9]{1,6})\.(?P<proj>\w+)$")
_HALVES = {"gate_proj": 0, "up_proj": 1}
"""Where an un-fused projection's rows lie in ``gate_up_proj``."""
_EXPERT_STACK = re.compile(r"(^|\.)experts\.(\w+_proj|w[123]|w13|w2)(\.weight)?$")

NEVER_CODED = {
    "router": re.compile(r"(^|\.)(router|gate|gate_weight|shared_expert_gate|expert_gate)(\.|$)"),
    "norm": re.compile(r"norm", re.IGNORECASE),
    "bias": re.compile(r"bias(es)?$"),
    "state_space": re.compile(r"(^|\.)(A_log|dt_\w+|conv1d|D)(\.|$)"),
    "vision_tower": re.compile(r"(^|\.)(vision_\w+|visual|vit|image_\w+|audio_\w+|speech_\w+)(\.|$)"),
    "projector": re.compile(r"projector|(^|\.)(embed_vision|embed_audio|merger|mm_\w+)(\.|$)"),
}
"""What stays 16-bit whatever its shape, by the name that ``modules_to_not_convert`` gives it."""


def canonical(base: str) -> str:
    """One form for all spellings of a base key: dotted, without a trailing ``weight``."""
    dotted = base if "." in base else base.replace("__", ".")
    return dotted.removesuffix(".weight")


def kept_because(name: str, shape: tuple[int, ...], bits: int, block_size: int) -> str | None:
    """Why a floating-point tensor is left in 16 bit; None if it is coded.

    Args:
        name: parameter name.
        shape: its shape.
        bits: code width.
        block_size: weights in a block.
    """
    for reason, pattern in NEVER_CODED.items():
        if pattern.search(name):
            return reason
    if len(shape) == 3 and not _EXPERT_STACK.search(name):
        return "not a matrix or a stack of experts"
    if len(shape) not in (2, 3):
        return "not a matrix"
    row = packed_size(blocks_of(shape[-1], block_size) * block_size, bits) + 2 * blocks_of(shape[-1], block_size)
    if 0 in shape or row >= 2 * shape[-1]:
        return "no smaller when coded"
    return None


@dataclass(frozen=True)
class UnfusedName:
    """The parts of a canonical name ``<prefix>.<expert>.<proj>``."""

    prefix: str
    expert: int
    proj: str


def unfused(name: str) -> UnfusedName | None:
    """The parts of one expert's canonical name; None for any other name."""
    match = _UNFUSED.match(name)
    return UnfusedName(match["prefix"], int(match["expert"]), match["proj"]) if match else None


@dataclass
class CodedKeys:
    """The stored keys of one coded matrix, and the file of the first."""

    base: str
    legacy: bool
    file: Path
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class CodedGroup:
    """All matrices of one parameter: one under None, or a stack's by slot.

    A stack has one slot an expert, or two where gate and up are stored apart: ``2 * expert`` and ``2 * expert + 1``.
    """

    name: str
    matrices: dict[int | None, CodedKeys] = field(default_factory=dict)
    slots: int = 1


def group_keys(files: Mapping[str, Path]) -> tuple[dict[str, CodedGroup], list[str]]:
    """Sort stored keys into coded parameters, by canonical name, and plain tensors.

    Args:
        files: the file of each key.

    Raises:
        CheckpointError: a matrix is stored twice under two spellings, or lacks a part.
    """
    legacy_bases = {match["base"] for match in map(_LEGACY.match, files) if match and match["part"] == "codes"}
    groups: dict[str, CodedGroup] = {}
    plain = []
    for key, file in files.items():
        match = _PART.match(key)
        legacy = None if match else _LEGACY.match(key)
        if legacy is not None and legacy["base"] not in legacy_bases:
            legacy = None  # an ordinary tensor of a module called norms, say
        found = match or legacy
        if found is None:
            plain.append(key)
            continue
        name, expert = canonical(found["base"]), None
        match = _SLICE.match(name)
        if match:
            name, expert = match["stack"].removesuffix(".weight"), int(match["expert"])
        group = groups.setdefault(name, CodedGroup(name))
        keys = CodedKeys(found["base"], legacy is not None, file)
        keys = group.matrices.setdefault(expert, keys)
        if (keys.base, keys.legacy) != (found["base"], legacy is not None):
            raise _twice(file, found["base"], keys)
        keys.parts[found["part"]] = key
    for group in groups.values():
        for keys in group.matrices.values():
            _check_parts(keys)
    return groups, plain


def _twice(file: Path, base: str, other: CodedKeys) -> CheckpointError:
    return CheckpointError(
        f"{file}: {base} and {other.base} in {other.file.name} are the same tensor, in two spellings or forms; "
        "remove one of them"
    )


def _check_parts(keys: CodedKeys) -> None:
    wanted = ("codes", "norms") if keys.legacy else PARTS
    missing = [part for part in wanted if part not in keys.parts]
    if keys.legacy and not keys.parts.keys() & {"ct", "ct_scaled"}:
        missing.append("ct_scaled")
    if missing:
        joint = "." if keys.legacy else "__"
        raise CheckpointError(f"{keys.file}: {keys.base}{joint}{missing[0]} is missing; {REMEDY}")


def fold_unfused(groups: dict[str, CodedGroup], stacks: Collection[str]) -> None:
    """Make ``experts.<N>.<proj>`` slices of ``experts.<proj>`` where the model has that stack, in place.

    Args:
        groups: of ``group_keys``.
        stacks: canonical names of the model's 3-D expert parameters; the files' own slices count too.

    Raises:
        CheckpointError: a slice is stored both ways.
    """
    known = {*stacks, *(name for name, group in groups.items() if None not in group.matrices)}
    for name in list(groups):
        parts = unfused(name)
        if parts is None or list(groups[name].matrices) != [None]:
            continue
        stack, slots, slot = f"{parts.prefix}.{parts.proj}", 1, parts.expert
        if stack not in known and parts.proj in _HALVES:
            stack, slots = f"{parts.prefix}.gate_up_proj", 2
            slot = 2 * parts.expert + _HALVES[parts.proj]
        if stack not in known:
            continue
        keys = groups.pop(name).matrices[None]
        group = groups.setdefault(stack, CodedGroup(stack, slots=slots))
        if group.slots != slots or slot in group.matrices:
            raise _twice(keys.file, keys.base, group.matrices.get(slot) or next(iter(group.matrices.values())))
        group.matrices[slot] = keys


def check_slices(group: CodedGroup) -> None:
    """Refuse a stack with a slice missing before its last, or mixed with a whole matrix of the same name."""
    some = next(iter(group.matrices.values()))
    if None in group.matrices:
        if len(group.matrices) > 1:
            raise CheckpointError(f"{some.file}: {group.name} is stored both whole and by experts; remove one of them")
        return
    last = max(slot for slot in group.matrices if slot is not None)
    missing = next((slot for slot in range(last) if slot not in group.matrices), None)
    if missing is not None:
        raise CheckpointError(
            f"{some.file}: {group.name}_e{missing // group.slots} is missing although expert {last // group.slots} "
            f"is there; {REMEDY}"
        )
