"""Expert activations in float32 for the reference backend, by the names that vLLM gives them.

Gated activations take ``[rows, 2 * width]`` (gate half first) and return ``[rows, width]``; the others keep the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

Activation = Callable[[torch.Tensor], torch.Tensor]

gelu_tanh = partial(functional.gelu, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


def _gated(pointwise: Activation) -> Activation:
    def apply(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return pointwise(gate) * up

    return apply


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float = 7.0, alpha: float = 1.702) -> torch.Tensor:
    """gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)`` with both halves clamped at ``limit``."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _swigluoai(x: torch.Tensor) -> torch.Tensor:
    return _clamped_swiglu(x[..., 0::2], x[..., 1::2])


ACTIVATIONS: dict[str, Activation] = {
    "silu": _gated(functional.silu),
    "gelu": _gated(functional.gelu),
    "gelu_tanh": _gated(gelu_tanh),
    "relu2": _gated(_relu2),
    "swigluoai": _swigluoai,
    "silu_no_mul": functional.silu,
    "gelu_no_mul": functional.gelu,
    "gelu_tanh_no_mul": gelu_tanh,
    "relu2_no_mul": _relu2,
}
