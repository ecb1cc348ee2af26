"""Which weights of a model stay coded, told before anything is loaded: from the checkpoint's names to the model's.

transformers' own renamings and conversions say where each tensor goes. Codes of rows can be stacked and concatenated by
rows like the weights; where a model's conversion does anything else, or its layer cannot compute from codes, the
weights are decoded while they load.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint.reader import HlwqSource
from .coded_weight import CodeFormat
from .modules import NORMS, PACKED, can_be_coded, make_coded


@dataclass
class CodingPlan:
    """What stays coded.

    sources: what codes stand for, by name of the checkpoint's parameter.
    layouts: the same by name of the model's.
    """

    sources: dict[str, CodeFormat] = field(default_factory=dict)
    layouts: dict[str, CodeFormat] = field(default_factory=dict)


def layout_of(source: HlwqSource, name: str) -> CodeFormat | None:
    """What the codes of a checkpoint's parameter stand for; None if its matrices differ in that."""
    found = [
        CodeFormat(source.coder(matrix).table.cpu(), matrix.block_size, matrix.in_features)
        for matrix in source.matrices[name]
    ]
    return found[0] if all(other.same(found[0]) for other in found[1:]) else None


class Destinations:
    """Where transformers puts a checkpoint's tensors in a model.

    Args:
        model: without weights.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._shapes = model.state_dict()

    def find(self, name: str) -> tuple[str, bool]:
        """A tensor's name in the model, and whether it gets there as rows: as it is, stacked, or joined by rows."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, rename_source_key

        found, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._shapes)
        if pattern is None or found not in self._shapes:
            return found, True
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        last = self._shapes[found].ndim - 1
        return found, all(
            type(step) in (MergeModulelist, Concatenate) and 0 <= step.dim < last for step in converter.operations
        )


def plan(model: Any, source: HlwqSource) -> CodingPlan:
    """What of a model can stay coded as the checkpoint codes it.

    Args:
        model: as transformers has built it, without weights.
        source: the checkpoint.
    """
    destinations = Destinations(model)
    parts: dict[str, list[str]] = defaultdict(list)
    excluded = set()
    for name in source.parameters:
        target, by_rows = destinations.find(name)
        parts[target].append(name)
        if not by_rows or name not in source.matrices:
            excluded.add(target)
    ties = tie_groups(model)
    found = CodingPlan()
    for target, names in parts.items():
        tied = ties.get(target, {target})
        if tied & excluded or not all(can_stay_coded(model, other) for other in tied):
            continue
        layouts = [layout_of(source, name) for name in names]
        first = layouts[0]
        if first is None or any(other is None or not other.same(first) for other in layouts):
            continue
        if first.in_features != destinations._shapes[target].shape[-1]:
            continue  # the loader refuses the decoded weight by name
        found.sources.update(dict.fromkeys(names, first))
        found.layouts.update(dict.fromkeys(tied, first))
    return found


def tie_groups(model: Any) -> dict[str, set[str]]:
    """For each parameter that is tied to others, all of them."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        group = groups.setdefault(source, {source})
        group.add(target)
        groups[target] = group
    return groups


def can_stay_coded(model: Any, name: str) -> bool:
    """Does the module that has a parameter of this name compute from codes of it?"""
    owner, _, parameter = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    return parameter in module._parameters and can_be_coded(module, parameter)


def apply(model: Any, layouts: dict[str, CodeFormat]) -> None:
    """Make room for codes in a model without weights, and tie codes where weights were tied."""
    for name, layout in layouts.items():
        owner, _, parameter = name.rpartition(".")
        make_coded(model.get_submodule(owner), parameter, layout)
    tie_codes(model, set(layouts))


def tie_codes(model: Any, coded: set[str]) -> None:
    """Tell transformers of codes that two modules share, in place of the weights."""
    ties = {}
    for target, source in model.all_tied_weights_keys.items():
        parts = (PACKED, NORMS) if target in coded else ("",)
        ties.update({target + part: source + part for part in parts})
    model.all_tied_weights_keys = ties
    model._tied_weights_keys = dict(ties)  # what tie_weights() starts from when a user calls it


def codes_of(source: HlwqSource, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter's codes uint8 ``[..., rows, row_bytes]`` and norms int16 ``[..., rows, blocks]``, copied."""
    shape = source.parameters[name].shape
    packed, norms = zip(*((coded.packed, coded.norms) for coded in source.coded(name)), strict=True)
    return (
        torch.cat(packed).view(*shape[:-1], -1),
        torch.cat(norms).view(torch.int16).view(*shape[:-1], -1),
    )
