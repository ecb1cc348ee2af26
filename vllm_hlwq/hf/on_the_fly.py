"""Codes a 16-bit model's weights one by one while transformers loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

from ..checkpoint.names import kept_because
from ..checkpoint.quantize import FITS
from ..codec import BlockCoder, codebook, quantize_matrix
from .coded_weight import CodeFormat
from .coding_plan import can_stay_coded, tie_codes, tie_groups
from .config import BLOCK_SIZE, HLWQConfig
from .modules import NORMS, PACKED, CodedModule, make_coded

if TYPE_CHECKING:
    from collections.abc import Collection


def weights_to_code(model: Any, options: HLWQConfig) -> set[str]:
    """Names of a model's parameters that are to be coded.

    Args:
        model: as transformers has built it, without weights.
        options: the user's.
    """
    kept = set(options.modules_to_not_convert or ())

    def wanted(name: str) -> bool:
        shape = tuple(model.get_parameter(name).shape)
        named = any(f".{part}." in f".{name}." for part in kept)
        return not named and kept_because(name, shape, options.bits, BLOCK_SIZE) is None and can_stay_coded(model, name)

    ties = tie_groups(model)
    names = [
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules(remove_duplicate=False)
        for name in module._parameters
        if module._parameters[name] is not None
    ]
    return {name for name in names if all(wanted(tied) for tied in ties.get(name, {name}))}


class CodeWeight(ConversionOps):  # type: ignore[misc]
    """The step that transformers takes with a weight after it is read: code it, and put the codes in its place.

    Args:
        options: how to code.
    """

    def __init__(self, options: HLWQConfig) -> None:
        self._options = options
        self._coders: dict[torch.device, BlockCoder] = {}
        self._table = codebook(options.codebook or "C", options.bits)

    def __deepcopy__(self, memo: object) -> CodeWeight:
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Leaves nothing for transformers to set.

        Raises:
            ValueError: a weight is not finite, or a block's norm exceeds float16.
        """
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        owner, _, name = full_layer_name.rpartition(".")
        packed, norms = self._code(weight)
        make_coded(
            model.get_submodule(owner), name, CodeFormat(self._table, BLOCK_SIZE, weight.shape[-1]), packed, norms
        )
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}

    def _code(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.device not in self._coders:
            self._coders[weight.device] = BlockCoder(self._table, BLOCK_SIZE, weight.device)
        coder = self._coders[weight.device]
        matrices = weight.view(-1, *weight.shape[-2:])
        coded = [quantize_matrix(matrix, coder, FITS[self._options.fit]) for matrix in matrices]
        packed = torch.stack([matrix.packed for matrix in coded]).view(*weight.shape[:-1], -1)
        norms = torch.stack([matrix.norms for matrix in coded]).view(torch.int16).view(*weight.shape[:-1], -1)
        return packed, norms


def share_codes(model: Any, missing: set[str], names: Collection[str]) -> None:
    """Prepare modules that are tied to a coded one to share its codes.

    Args:
        model: with all weights that its checkpoint has.
        missing: names of parameters that were not loaded; in these the codes take the place of tied weights.
        names: of all weights to code.
    """
    for name, group in tie_groups(model).items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        coded = [other for other in group if isinstance(model.get_submodule(other.rpartition(".")[0]), CodedModule)]
        if name not in names or not coded or isinstance(module, CodedModule):
            continue
        shared = model.get_submodule(coded[0].rpartition(".")[0])
        make_coded(module, parameter, shared.layouts[parameter])
        missing.discard(name)
        missing.update({name + PACKED, name + NORMS})
    tie_codes(model, set(names))
