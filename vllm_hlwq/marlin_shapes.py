"""Which INT4 shapes vLLM's Marlin kernels take: asked by the export and the layer before they make anything."""

from __future__ import annotations

SUPPORTED_GROUP_SIZES = (32, 64, 128, None)
HIDDEN_MULTIPLE = 128
"""Rows of a Marlin tile along the reduction; vLLM never pads the hidden size, it is the layer's input and output."""
CODES_PER_WORD = 8
"""INT4 codes in a stored int32."""
LINEAR_OUT_MULTIPLE = 64
"""Columns of a Marlin tile; a linear layer's outputs are not padded."""


def linear_obstacle(out_features: int, in_features: int, group_size: int | None) -> str | None:
    """Say why Marlin cannot take an INT4 linear layer of a shape, None if it can; arguments as below."""
    if out_features % LINEAR_OUT_MULTIPLE:
        return f"{out_features} outputs are no multiple of {LINEAR_OUT_MULTIPLE}"
    if in_features % HIDDEN_MULTIPLE:
        return f"{in_features} inputs are no multiple of {HIDDEN_MULTIPLE}"
    if group_size is not None and in_features % group_size:
        return f"group size {group_size} does not divide {in_features} inputs"
    return None


def int4_layout_obstacle(hidden_size: int, expert_width: int, group_size: int | None) -> str | None:
    """Say why vLLM 0.32 would lay out an INT4 expert's scales wrongly, None if it does not; arguments as below.

    Its conversion tells one scale per channel from several by the expert width also for gate and up, whose inputs are
    the hidden features: with a group as wide as the expert it takes their many scales for one each.
    """
    if group_size == expert_width < hidden_size:
        return (
            f"group size {group_size} is the whole expert width, which vLLM's conversion confuses: use smaller groups"
        )
    return None


def marlin_obstacle(hidden_size: int, expert_width: int, group_size: int | None) -> str | None:
    """Say why Marlin cannot take INT4 experts of a shape, None if it can.

    Args:
        hidden_size: the layer's input and output features.
        expert_width: intermediate features of one expert on one tensor-parallel rank.
        group_size: input features that share a scale; None for one scale per output channel.

    Source: ``check_moe_marlin_supports_config`` of vLLM 0.32 with tile padding, as compressed-tensors uses it.
    """
    if group_size not in SUPPORTED_GROUP_SIZES:
        return f"group size {group_size} is none of 32, 64, 128 and per channel"
    if hidden_size % HIDDEN_MULTIPLE:
        return f"hidden size {hidden_size} is no multiple of {HIDDEN_MULTIPLE}"
    if group_size is None and expert_width % CODES_PER_WORD:
        return f"expert width {expert_width} is no multiple of {CODES_PER_WORD}"
    if group_size is not None and expert_width % group_size:
        return f"group size {group_size} does not divide the expert width {expert_width}"
    return None
