"""The cache that ``generate`` takes: coded layers for full attention, transformers' own layers for the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from ..errors import KVCacheError
from .coded_vectors import BITS, VectorCoder
from .layer import CodedLayer

CODED = "full_attention"
UNCODED = {"sliding_attention", "chunked_attention", "linear_attention", "conv", "moe", "mlp"}
"""Layers whose state does not grow with the text."""


class HLWQCache(Cache):  # type: ignore[misc]
    """A KV cache with old tokens of full-attention layers in 2, 3 or 4 bits a coordinate.

        model.generate(**inputs, past_key_values=HLWQCache(model.config, bits=3))

    Args:
        config: the model's; of a multimodal model, its text model's layers are taken.
        bits: width of a code.
        residual_window: newest tokens of each layer that stay as they are; up to 31 more wait to be coded together.
        attend_coded: let attention on a CPU read codes. Without it every step decodes each layer's history, which is
            what happens on other devices.

    Raises:
        KVCacheError: bits or window out of range, or a kind of layer whose growing state would stay uncoded.
    """

    def __init__(self, config: Any, bits: int = 3, residual_window: int = 128, attend_coded: bool = True) -> None:
        if not isinstance(bits, int) or bits not in BITS:
            raise KVCacheError(f"bits={bits!r}: choose 2, 3 or 4")
        if not isinstance(residual_window, int) or isinstance(residual_window, bool) or residual_window < 0:
            raise KVCacheError(f"residual_window={residual_window!r}: give a number of tokens, 0 or more")
        self.bits = bits
        self._coders: dict[tuple[int, torch.device], VectorCoder] = {}
        types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        if isinstance(options, dict):  # up to transformers 5.18, the same for all layers
            options = [options] * len(types)
        refused = sorted(set(types) - UNCODED - {CODED})
        if refused:
            raise KVCacheError(f"layers of kind {', '.join(refused)} cannot be coded; use transformers' DynamicCache")
        super().__init__(
            layers=[
                CodedLayer(self._coder, residual_window, attend_coded)
                if kind == CODED
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**own)
                for kind, own in zip(types, options, strict=True)
            ]
        )

    def _coder(self, head_dim: int, device: torch.device) -> VectorCoder:
        key = (head_dim, device)
        if key not in self._coders:
            self._coders[key] = VectorCoder(head_dim, self.bits, device)
        return self._coders[key]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
            # transformers keeps a view of the window; after a prompt the memory below it is the whole prompt's.
            for name in ("keys", "values"):
                states = getattr(layer, name)
                if states.untyped_storage().nbytes() > 2 * states.nbytes:
                    setattr(layer, name, states.clone())
        return keys, values

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of memory held, including room that is not filled yet.

        Returns:
            ``codes``, ``norms`` and ``window`` (exact tokens) of coded layers; ``other_layers``; ``tables`` (codebook
            and rotation, the same for every length). What a single step takes and gives back is not in it.
        """
        kinds: dict[str, list[torch.Tensor]] = {"codes": [], "norms": [], "window": [], "other_layers": []}
        for layer in self.layers:
            if isinstance(layer, CodedLayer):
                for kind, tensors in layer.tensors().items():
                    kinds[kind] += tensors
            else:
                kinds["other_layers"] += _tensors_in(list(vars(layer).values()))
        kinds["tables"] = [table for coder in self._coders.values() for table in coder.tables]
        return {kind: _storage_bytes(tensors) for kind, tensors in kinds.items()}

    def nbytes(self) -> int:
        """Bytes of memory held in all, see ``bytes_by_kind``."""
        return sum(self.bytes_by_kind().values())


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
