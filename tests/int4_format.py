"""The INT4 format by its definition, written apart from the code that is tested, and the models that are exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file

from vllm_hlwq.errors import CheckpointError

State = dict[str, torch.Tensor]

# Model, its configuration, and the group size that its shapes admit.
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "gemma4": (lambda: checkpoints.gemma4_config(num_experts=4, top_k_experts=2, attention_k_eq_v=True), 64),
    "gemma4_multimodal": (checkpoints.gemma4_multimodal_config, 64),
    "qwen3_moe": (lambda: checkpoints.qwen3_moe_config(), 128),
    "qwen3_moe_stacked": (lambda: checkpoints.qwen3_moe_config(), 128),
    "mixtral": (checkpoints.mixtral_config, 128),
    "olmoe": (checkpoints.olmoe_config, 64),
    "glm4_moe": (checkpoints.glm4_moe_config, 64),
    "gpt_oss": (checkpoints.gpt_oss_config, 64),
}


def weights(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Codes -8 to 7 of int32 words ``[rows, words]``, lowest bits first."""
    shifts = torch.arange(0, 32, 4)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8


def decoded(state: State, stem: str) -> torch.Tensor:
    """A matrix by the format's definition: codes times the stored scale of their group."""
    scale = state[f"{stem}weight_scale"].float()
    codes = nibbles(state[f"{stem}weight_packed"])
    if f"{stem}weight_zero_point" in state:
        words = state[f"{stem}weight_zero_point"]  # packed down the rows, eight of them in a word
        zero = nibbles(words.t()).t()[: len(codes)]
        codes = codes - zero.repeat_interleave(codes.shape[1] // zero.shape[1], dim=1)
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def assert_nearest(state: State, stem: str, wanted: torch.Tensor, group_size: int) -> None:
    """Each weight is the level nearest to it, its group's scale within what a search may choose."""
    found, wanted = decoded(state, stem), wanted.float()
    if f"{stem}weight_shape" in state:
        assert state[f"{stem}weight_shape"].tolist() == list(wanted.shape)
    scale = state[f"{stem}weight_scale"].float()
    assert scale.shape == (wanted.shape[0], wanted.shape[1] // group_size)
    groups = wanted.view(len(wanted), -1, group_size)
    ratio = scale / (groups.abs().amax(-1) / 7.5)
    assert ((ratio > 0.59) & (ratio < 1.02)).all()
    wide = scale.repeat_interleave(group_size, dim=1)
    torch.testing.assert_close(found, (wanted / wide).round().clamp(-8, 7) * wide, rtol=0, atol=0)


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)
