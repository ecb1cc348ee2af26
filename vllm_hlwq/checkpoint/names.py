"""How HLWQ files spell tensors, and which tensors of a model are coded.

A coded tensor's base key may be the parameter's name, the same with ``__`` for every ``.``, and either with or without
the trailing ``weight``; experts of a 3-D stack carry ``_e<index>``. All spellings of a tensor have one canonical form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..codec import blocks_of, packed_size
from ..errors import CheckpointError

PARTS = ("packed", "norms", "meta")
LEGACY_PARTS = ("codes", "norms", "ct_scaled", "ct")
CODEBOOK_KEY = "hlwq.codebook"
_PART = re.compile(rf"^(?P<base>.+)__(?P<part>{'|'.join(PARTS)})$")
_LEGACY = re.compile(rf"^(?P<base>.+)\.(?P<part>{'|'.join(LEGACY_PARTS)})$")
_SLICE = re.compile(r"^(?P<stack>.+)_e(?P<expert>\d+)$")
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


@dataclass
class CodedKeys:
    """The stored keys of one coded matrix."""

    base: str
    legacy: bool
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class CodedGroup:
    """All matrices of one parameter: one under None, or a stack's slices by expert."""

    name: str
    matrices: dict[int | None, CodedKeys] = field(default_factory=dict)


def group_keys(keys: Iterable[str], where: str) -> tuple[dict[str, CodedGroup], list[str]]:
    """Sort stored keys into coded parameters, by canonical name, and plain tensors.

    Raises:
        CheckpointError: a matrix is stored twice under two spellings, or lacks a part.
    """
    keys = list(keys)
    legacy_bases = {match["base"] for match in map(_LEGACY.match, keys) if match and match["part"] == "codes"}
    groups: dict[str, CodedGroup] = {}
    plain = []
    for key in keys:
        match = _PART.match(key)
        legacy = None if match else _LEGACY.match(key)
        if legacy is not None and legacy["base"] not in legacy_bases:
            legacy = None  # an ordinary tensor of a module called norms, say
        found = match or legacy
        if found is None:
            plain.append(key)
            continue
        _add(groups, key, found["base"], found["part"], legacy is not None, where)
    for group in groups.values():
        for coded in group.matrices.values():
            _check_parts(coded, where)
    return groups, plain


def _add(groups: dict[str, CodedGroup], key: str, base: str, part: str, legacy: bool, where: str) -> None:
    name, expert = canonical(base), None
    match = _SLICE.match(name)
    if match:
        name, expert = match["stack"].removesuffix(".weight"), int(match["expert"])
    coded = groups.setdefault(name, CodedGroup(name)).matrices.setdefault(expert, CodedKeys(base, legacy))
    if coded.base != base or part in coded.parts:
        raise CheckpointError(
            f"{where}: {base} and {coded.base} are the same tensor under two spellings; remove one of them"
        )
    coded.parts[part] = key


def _check_parts(coded: CodedKeys, where: str) -> None:
    wanted = ("codes", "norms") if coded.legacy else PARTS
    missing = [part for part in wanted if part not in coded.parts]
    if coded.legacy and not coded.parts.keys() & {"ct", "ct_scaled"}:
        missing.append("ct_scaled")
    if missing:
        joint = "." if coded.legacy else "__"
        raise CheckpointError(f"{where}: {coded.base}{joint}{missing[0]} is missing; download the checkpoint again")


def check_slices(group: CodedGroup, where: str) -> None:
    """Refuse a stack with a slice missing before its last, or mixed with a whole matrix of the same name."""
    if None in group.matrices:
        if len(group.matrices) > 1:
            raise CheckpointError(f"{where}: {group.name} is stored both whole and by experts; remove one of them")
        return
    experts = sorted(expert for expert in group.matrices if expert is not None)
    missing = next((index for index, expert in enumerate(experts) if index != expert), None)
    if missing is not None:
        raise CheckpointError(
            f"{where}: {group.name}_e{missing} is missing although expert {experts[-1]} is there; "
            "download the checkpoint again"
        )
