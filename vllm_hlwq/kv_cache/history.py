"""What the cache gives to attention: a tensor that stands for keys or values and is decoded only if it must be.

transformers hands the whole history to attention as two tensors. These two look like them, and when torch's scaled dot
product receives both, with few queries, it is computed from the codes. transformers may repeat each key-value head for
its query heads on the way; that is noted rather than done. Any other operation gets the decoded tensor, so models
with an attention of their own work, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only

from .attention import MOST_ROWS, Side, attend

REPEAT = (torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.reshape)
"""How transformers repeats heads ``[batch, heads, tokens, width]``: a new axis, expanded, joined with the heads."""
NEW_AXIS = (slice(None), slice(None), None, slice(None), slice(None))
Step = tuple[Callable[..., Any], tuple[Any, ...]]


class History(torch.Tensor):
    """Coded and exact tokens as one tensor without memory of its own.

    Args:
        side: what it stands for.
        check: raises if the cache has changed in a way that the codes are no longer these tokens'.
        steps: views taken of it so far: the repetition of heads, begun or complete.
        shape: after them.
    """

    _side: Side
    _check: Callable[[], None]
    _steps: tuple[Step, ...]

    @staticmethod
    def __new__(
        cls: type[History],
        side: Side,
        check: Callable[[], None],
        steps: tuple[Step, ...] = (),
        shape: torch.Size | tuple[int, ...] | None = None,
    ) -> History:
        made: History = torch.Tensor._make_wrapper_subclass(
            cls, shape or side.shape, dtype=side.exact.dtype, device=side.exact.device
        )
        made._side, made._check, made._steps = side, check, steps
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"History({tuple(self.shape)}, {self._side.coded} tokens of {self._side.store.coder.bits} bits)"

    def decode(self) -> torch.Tensor:
        """The tensor it stands for."""
        self._check()
        tensor = self._side.decode()
        for function, arguments in self._steps:
            tensor = function(tensor, *arguments)
        return tensor

    def _then(self, function: Callable[..., Any], arguments: tuple[Any, ...], shape: tuple[int, ...]) -> History:
        return History(self._side, self._check, (*self._steps, (function, arguments)), shape)

    def _repeat_step(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> History | None:
        """The next of the three views that repeat heads; None for every other operation."""
        batch, heads, tokens, width = self._side.shape
        sizes = arguments[0] if len(arguments) == 1 else arguments
        if not isinstance(sizes, tuple) or len(self._steps) >= len(REPEAT) or function is not REPEAT[len(self._steps)]:
            return None
        if not self._steps:
            return self._then(function, arguments, (batch, heads, 1, tokens, width)) if sizes == NEW_AXIS else None
        repeats = sizes[2] if len(sizes) == 5 else self.shape[2]
        wanted = (
            (batch, heads, repeats, tokens, width) if len(self._steps) == 1 else (batch, heads * repeats, tokens, width)
        )
        return self._then(function, arguments, wanted) if sizes == wanted else None

    @property
    def _is_whole(self) -> bool:
        return len(self._steps) in (0, len(REPEAT))

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*arguments, **options)
        if function is scaled_dot_product_attention:
            result = _attention(*arguments, **options)
            if result is not None:
                return result
        elif arguments and isinstance(arguments[0], History) and not options:
            own, rest = arguments[0], arguments[1:]
            if function is torch.Tensor.to and rest == (own.device,):
                return own  # models that share keys between layers move them to each layer's device
            view = own._repeat_step(function, rest)
            if view is not None:
                return view
        plain, plain_options = tree_map_only(History, History.decode, (arguments, options))
        return function(*plain, **plain_options)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        plain, plain_options = tree_map_only(History, History.decode, (arguments, options or {}))
        return function(*plain, **plain_options)


METADATA: set[Any] = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_meta")
    ),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.Tensor.__repr__,
}


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """torch's scaled dot product from codes; None where it has to be computed from decoded tensors."""
    if not (isinstance(key, History) and isinstance(value, History) and key._is_whole and value._is_whole):
        return None
    if isinstance(query, History) or query.dim() != 4 or dropout_p or is_causal:
        return None
    batch, heads, tokens, width = key._side.shape
    same = query.shape[0] == batch and query.shape[3] == width and value._side.shape[:3] == (batch, heads, tokens)
    group = query.shape[1] // heads
    enabled = enable_gqa or key.shape[1] == query.shape[1]
    if not same or not enabled or group * heads != query.shape[1] or group * query.shape[2] > MOST_ROWS:
        return None
    key._check()
    value._check()
    return attend(query, key._side, value._side, attn_mask, scale)
