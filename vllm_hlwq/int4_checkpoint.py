"""One matrix to INT4 in the compressed-tensors ``pack-quantized`` format, and back to 16 bit.

Whole checkpoints are exported by ``checkpoint/export.py`` and read by ``checkpoint/int4_source.py``. numba is imported
where it is used: vLLM's CPU workers scan all modules when they start, and fail where llvmlite is one of them.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from .codec.chunks import coding_threads, for_ranges

State = dict[str, torch.Tensor]
SCALE_FRACTIONS = tuple(1 - 0.03 * step for step in range(14))
"""Of the scale that the largest weight asks for; smaller ones clip it and serve the others better."""

ROWS_WEIGHTS = 2**19
"""Weights that a CPU's thread quantises at a time."""


def int4_arguments(group_size: int | None, symmetric: bool) -> QuantizationArgs:
    """compressed-tensors arguments of INT4 weights; ``group_size`` None means one scale per output channel."""
    return QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )


def search_scale(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The best of several symmetric scales for each group, by squared error.

    Args:
        groups: weights float32 ``[out, groups, group_size]``.
        scale: ``[out, groups]`` in the dtype that is stored, from each group's largest weight.

    Returns:
        ``[out, groups]``: candidates are rounded to the stored dtype before they are judged.
    """
    if groups.device.type == "cpu":
        from . import int4_cpu

        fractions = torch.tensor(SCALE_FRACTIONS)
        candidates = (scale.float().view(-1, 1) * fractions).to(scale.dtype)
        flat = groups.reshape(-1, groups.shape[-1])
        best = int4_cpu.search_scale(flat, candidates.float())
        return candidates.gather(1, best.unsqueeze(1)).view(scale.shape)
    best = scale
    least = torch.full(scale.shape, float("inf"), device=scale.device)
    for fraction in SCALE_FRACTIONS:
        candidate = (scale.float() * fraction).to(scale.dtype)
        wide = candidate.float().unsqueeze(-1)
        error = (groups / wide).round_().clamp_(-8, 7).mul_(wide).sub_(groups).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def quantize_weight(weight: torch.Tensor, arguments: QuantizationArgs, search: bool = False) -> State:
    """Quantise one matrix to the nearest level, with the scale as it will be stored.

    Args:
        weight: [out, in] in BF16 or FP16; ``in`` divisible by the group size and by 8.
        arguments: of ``int4_arguments``.
        search: whether symmetric scales are searched by squared error; else they follow the largest weight.

    Returns:
        ``weight_packed`` int32 [out, in / 8], ``weight_scale`` [out, groups] in the weight's dtype, ``weight_shape``,
        and for asymmetric arguments ``weight_zero_point`` int32 [out / 8, groups].

    Raises:
        ValueError: a weight is not finite, or the group size does not divide ``in``.
    """
    size = arguments.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise ValueError(f"group size {size} does not divide {weight.shape[1]} input features")
    on_cpu = weight.device.type == "cpu" and arguments.symmetric
    if not on_cpu:
        return _quantize_rows(weight, size, arguments, search)
    # Each thread does all of its rows: torch's operations are too short here to be shared out one by one.
    step = min(max(8, ROWS_WEIGHTS // weight.shape[1]), max(8, -(-weight.shape[0] // 2)))
    parts = for_ranges(
        lambda start, stop: _quantize_rows(weight[start:stop], size, arguments, search),
        weight.shape[0], step, coding_threads(),
    )  # fmt: skip
    state = {name: torch.cat([part[name] for part in parts]) for name in ("weight_packed", "weight_scale")}
    return state | {"weight_shape": torch.tensor(weight.shape)}


def _quantize_rows(weight: torch.Tensor, size: int, arguments: QuantizationArgs, search: bool) -> State:
    groups = weight.float().view(weight.shape[0], -1, size)
    least, most = groups.amin(-1), groups.amax(-1)
    if not bool((least.isfinite() & most.isfinite()).all()):
        raise ValueError("holds NaN or inf")
    scale, zero_point = calculate_qparams(least, most, arguments)
    scale = scale.to(weight.dtype)
    # An all-zero group has scale 0, or one that underflowed; any positive scale stores its zeros exactly.
    scale = torch.where(scale == 0, 1.0, scale)
    if search and arguments.symmetric:
        scale = search_scale(groups, scale)
    if weight.device.type == "cpu" and arguments.symmetric:
        from . import int4_cpu

        flat, scales = groups.reshape(-1, size), scale.float().reshape(-1)
        return {
            "weight_packed": int4_cpu.pack_codes(flat, scales).view(weight.shape[0], -1),
            "weight_scale": scale.contiguous(),
            "weight_shape": torch.tensor(weight.shape),
        }
    state = {
        "weight": weight.float(),
        "weight_scale": scale,
        "weight_zero_point": zero_point.round().to(torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=[], weights=arguments))
    return {name: tensor.contiguous().cpu() for name, tensor in packed.items()}


def dequantize_weight(state: State, arguments: QuantizationArgs) -> torch.Tensor:
    """The matrix ``[out, in]`` that ``quantize_weight``'s result stands for, in the scale's dtype."""
    state = {**state, "weight_shape": torch.Size(state["weight_shape"].tolist())}  # type: ignore[dict-item]
    weight: torch.Tensor = PackedQuantizationCompressor.decompress(
        state, QuantizationScheme(targets=[], weights=arguments)
    )["weight"]
    return weight
