"""One layer's cache: a window of exact tokens, everything older as codes.

It is no ``QuantizedLayer`` of transformers: that one decodes and concatenates all it has in every step. Tokens are
coded in groups, so that most steps only append: between ``window`` and ``window + GROUP - 1`` tokens are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..errors import KVCacheError
from .attention import Side
from .coded_vectors import CodedVectors, VectorCoder
from .history import History

GROUP = 32
Coders = Callable[[int, torch.device], VectorCoder]


class Recent:
    """Exact tokens of one side in a buffer ``[batch, heads, capacity, head_dim]``.

    The buffer is replaced, not rearranged, when its oldest tokens leave: who still holds a view keeps what it saw.
    """

    def __init__(self, states: torch.Tensor, capacity: int) -> None:
        batch, heads, _, head_dim = states.shape
        self.length = 0
        self.capacity = capacity
        self.buffer = states.new_empty(batch, heads, capacity, head_dim)

    def append(self, states: torch.Tensor) -> torch.Tensor:
        """All exact tokens including ``states``, which are in the buffer only if they fit."""
        stop = self.length + states.shape[2]
        if stop > self.capacity:
            return torch.cat([self.buffer[:, :, : self.length], states], dim=2)
        self.buffer[:, :, self.length : stop] = states
        self.length = stop
        return self.buffer[:, :, :stop]

    def keep(self, states: torch.Tensor) -> None:
        """Hold these tokens and no others."""
        buffer = self.buffer.new_empty(*self.buffer.shape[:2], self.capacity, self.buffer.shape[3])
        self.length = states.shape[2]
        buffer[:, :, : self.length] = states
        self.buffer = buffer


class CodedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of a full-attention layer.

    Args:
        coders: gives the coder of a width on a device; layers share them.
        window: newest tokens that stay exact.
        attend_coded: whether attention on a CPU reads the codes, see ``history.py``.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, coders: Coders, window: int, attend_coded: bool) -> None:
        super().__init__()
        self._coders = coders
        self._window = window
        self._attend_coded = attend_coded
        self._epoch = 0
        self._coded: tuple[CodedVectors, CodedVectors] | None = None
        self._recent: tuple[Recent, Recent] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        both = (key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._sizes = [(*states.shape[:2], states.shape[3]) for states in both]
        self._dtypes = [states.dtype for states in both]  # under autocast they differ
        with torch.inference_mode(False):
            self._coded = tuple(  # type: ignore[assignment]
                CodedVectors(self._coders(head_dim, self.device), batch, heads)
                for batch, heads, head_dim in self._sizes
            )
            self._recent = tuple(Recent(states, self._window + GROUP) for states in both)  # type: ignore[assignment]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[batch, heads, tokens, head_dim]`` and return all keys and values.

        What this call appends is exact in what it returns, also where it is coded afterwards. On a CPU the results
        stand for codes; elsewhere they are decoded into new memory. They are valid until the cache is cropped,
        reordered or reset.

        Raises:
            KVCacheError: shapes or dtypes differ from the first call's, gradients are wanted, or values are not finite.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._coded is not None
        assert self._recent is not None
        self._check_states(key_states, value_states)
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (
                self._append(coded, recent, states)
                for coded, recent, states in zip(self._coded, self._recent, (key_states, value_states), strict=True)
            )
        if not keys.coded:
            return keys.exact, values.exact
        if self._attend_coded and self.device.type == "cpu":
            return History(keys, self._unchanged()), History(values, self._unchanged())
        return keys.decode(), values.decode()

    def _append(self, coded: CodedVectors, recent: Recent, states: torch.Tensor) -> Side:
        exact = recent.append(states)
        side = Side(coded, coded.length, exact)
        tokens = exact.shape[2]
        leaving = max(0, tokens - self._window) // GROUP * GROUP
        if leaving:
            coded.append(exact[:, :, :leaving])
            recent.keep(exact[:, :, leaving:])
        return side

    def _unchanged(self) -> Callable[[], None]:
        epoch = self._epoch

        def check() -> None:
            if self._epoch != epoch:
                raise KVCacheError(
                    "keys or values of an earlier step are used after the cache was cropped, reordered or reset; "
                    "decode them before, or build the cache with attend_coded=False"
                )

        return check

    def _check_states(self, *both: torch.Tensor) -> None:
        for name, states, size, dtype in zip(("keys", "values"), both, self._sizes, self._dtypes, strict=True):
            if (*states.shape[:2], states.shape[3]) != size or states.dtype != dtype:
                raise KVCacheError(
                    f"{name} {list(states.shape)} {states.dtype} do not continue a cache of batch {size[0]}, "
                    f"{size[1]} heads, head_dim {size[2]} and {dtype}; reset it, or make a new one"
                )
            if states.requires_grad and torch.is_grad_enabled():
                raise KVCacheError(f"{name} want gradients, which codes do not pass on; run under torch.no_grad()")

    def get_seq_length(self) -> int:
        if self._coded is None or self._recent is None:
            return 0
        return self._coded[0].length + self._recent[0].length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._coded = self._recent = None
        self.is_initialized = False
        self._epoch += 1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: as many as a negative number says; a positive one is the length to keep."""
        length = self.get_seq_length()
        kept = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        if kept == length or self._coded is None or self._recent is None:
            return
        self._epoch += 1
        for coded, recent in zip(self._coded, self._recent, strict=True):
            recent.length = max(0, kept - coded.length)
            coded.crop(kept)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._choose(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._choose(lambda states: states[indices])

    def _choose(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._coded is None or self._recent is None:
            return
        self._epoch += 1
        with torch.inference_mode(False), torch.no_grad():
            for coded, recent in zip(self._coded, self._recent, strict=True):
                coded.choose(select)
                recent.buffer = select(recent.buffer)
        batch = self._recent[0].buffer.shape[0]
        self._sizes = [(batch, *size[1:]) for size in self._sizes]

    def offload(self) -> None:
        raise KVCacheError("a coded layer is not offloaded; build the cache without offloading")

    def prefetch(self) -> None:
        raise KVCacheError("a coded layer is not offloaded; build the cache without offloading")

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """All that is stored, by kind."""
        coded, recent = self._coded or (), self._recent or ()
        return {
            "codes": [store.codes for store in coded],
            "norms": [store.norms for store in coded],
            "window": [side.buffer for side in recent],
        }
