"""vLLM's Marlin kernels as a backend on CUDA: 4- and 8-bit weights, 16-bit activations.

Marlin splits sums by the position of a block among all blocks. In one wave the blocks and their order are a resident
model's, and with them every bit of the answer; over waves it may round as it does between batch shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .device_backend import Buffers, DeviceBackend, common_obstacle
from .expert_formats import ExpertFormat
from .marlin_shapes import int4_layout_obstacle, marlin_obstacle
from .vllm_compat import borrow
from .wave_blocks import Alignment
from .weight_bank import WeightBank

OLDEST_CAPABILITY = (7, 5)
BLOCK_SIZES = (8, 16, 32, 48, 64)
INT4_TYPES = ("uint4", "uint4b8")
TILE = 64
"""Expert widths are padded to a multiple of it; vLLM pads gate and up each, so only gated experts can be padded."""


def device_obstacle(expert_format: ExpertFormat, moe_config: Any) -> str | None:
    """Say why vLLM's Marlin kernels cannot compute a layer on the present CUDA device, None if they can.

    Args:
        expert_format: of the layer's experts.
        moe_config: vLLM's configuration of the layer, with sizes as the kernels need them.
    """
    if borrow("VLLM_BATCH_INVARIANT"):
        return "VLLM_BATCH_INVARIANT=1 asks for sums that no batch changes, which Marlin does not have; unset it"
    platform = borrow("current_platform")
    if not platform.has_device_capability(OLDEST_CAPABILITY):
        have = platform.get_device_capability()
        return f"{platform.get_device_name()} has compute capability {have}, they need 7.5 (Turing) or newer"
    if borrow("get_marlin_input_dtype")() is not None:
        return "VLLM_MARLIN_INPUT_DTYPE asks for 8-bit activations, whose scales depend on the whole layer; unset it"
    width = moe_config.intermediate_size_per_partition
    if not moe_config.is_act_and_mul and width % TILE:
        return f"expert width {width} is no multiple of {TILE}, and experts without a gate are not padded"
    sizes = moe_config.hidden_dim, width, expert_format.group_size
    obstacle = common_obstacle(moe_config) or marlin_obstacle(*sizes)
    if obstacle is None and expert_format.weight_type in INT4_TYPES:
        return int4_layout_obstacle(*sizes)
    return obstacle


def resident_block_size(tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a block, by the rule that ``fused_marlin_moe`` of vLLM 0.32 has for a resident model of these sizes."""
    for size in BLOCK_SIZES:
        if tokens * top_k / num_experts / size < 0.9:
            return size
    return BLOCK_SIZES[-1]


class MarlinBackend(DeviceBackend):
    """Computes quantised experts of one layer with vLLM's Marlin kernels."""

    name = "marlin"

    def __init__(self, expert_format: ExpertFormat, moe_config: Any) -> None:
        group = -1 if expert_format.group_size is None else expert_format.group_size
        width = borrow("marlin_moe_padded_intermediate")(moe_config.intermediate_size_per_partition, group)
        super().__init__(expert_format, moe_config, width)
        self.quant_type = getattr(borrow("scalar_types"), str(expert_format.weight_type))
        self._activation_config = borrow("ApplyMoEActivationConfig").from_configs(
            moe_config, borrow("FusedMoEQuantConfig").make()
        )
        self._run = borrow("_fused_marlin_moe")

    def block_size(self, tokens: int, top_k: int, num_experts: int) -> int:
        # Under expert parallelism vLLM counts on an even share of the tokens.
        share = math.ceil(tokens * num_experts / self.moe_config.num_experts)
        return resident_block_size(share, top_k, num_experts)

    def compute(
        self,
        bank: WeightBank,
        blocks: Alignment,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        weights_on_input: bool,
        buffers: Buffers,
    ) -> None:
        fields = bank.fields
        if weights_on_input:
            # They are in it: vLLM's kernel frame has multiplied it, and Marlin would do so once more.
            topk_weights = torch.ones_like(topk_weights)
        self._run(
            hidden_states=hidden_states,
            w1=fields["w13_weight"],
            w2=fields["w2_weight"],
            bias1=fields.get("w13_bias"),
            bias2=fields.get("w2_bias"),
            w1_scale=fields["w13_scale"],
            w2_scale=fields["w2_scale"],
            topk_weights=topk_weights,
            num_topk=topk_weights.shape[1],
            quant_type=self.quant_type,
            apply_router_weight_on_input=False,
            expert_map=None,
            block_size_m=blocks.block_size,
            sorted_token_ids=blocks.sorted_rows,
            expert_ids=blocks.block_rows,
            num_tokens_post_padded=blocks.padded_rows,
            activation=self.activation,
            activation_config=self._activation_config,
            w1_zeros=fields.get("w13_zero_point"),
            w2_zeros=fields.get("w2_zero_point"),
            intermediate_cache13=buffers.gate_up,
            intermediate_cache2=buffers.activated,
            output=buffers.out_rows,
        )
