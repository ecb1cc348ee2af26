"""vLLM's Marlin INT4 kernels as the backend on CUDA: their weight layout, and one wave of experts.

The kernels are vLLM's own and so is the conversion into their layout. What differs from vLLM's ``MarlinExperts`` is
who says where an expert's weights are: blocks of rows are formed over the layer's expert ids, as for a resident model,
and only then is each block given a row of a bank (``wave_blocks.py``). So block order, and with it every bit of the
answer in one wave, is the resident model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .marlin_shapes import marlin_obstacle
from .vllm_compat import borrow
from .wave_blocks import Alignment
from .weight_bank import WeightBank

OLDEST_CAPABILITY = (7, 5)
MAX_EXPERTS = 1023
"""vLLM's alignment kernel scans ``num_experts + 1`` entries with 1,024 threads."""

BLOCK_SIZES = (8, 16, 32, 48, 64)
FIELDS = (
    "w13_weight", "w2_weight", "w13_scale", "w2_scale", "w13_zero_point", "w2_zero_point",
    "w13_input_scale", "w2_input_scale", "w13_bias", "w2_bias",
)  # fmt: skip
"""What vLLM's conversion returns, in its order; absent ones are None. Input scales exist for INT8 activations only."""


def device_obstacle(moe_config: Any, weight_quant: Any) -> str | None:
    """Say why vLLM's Marlin kernels cannot compute a layer on the present CUDA device, None if they can.

    Args:
        moe_config: vLLM's configuration of the layer.
        weight_quant: compressed-tensors arguments of its weights.
    """
    platform = borrow("current_platform")
    if not platform.has_device_capability(OLDEST_CAPABILITY):
        have = platform.get_device_capability()
        return f"{platform.get_device_name()} has compute capability {have}, they need 7.5 (Turing) or newer"
    if borrow("get_marlin_input_dtype")() is not None:
        return "VLLM_MARLIN_INPUT_DTYPE asks for 8-bit activations, whose scales depend on the whole layer; unset it"
    if moe_config.num_local_experts > MAX_EXPERTS:
        return f"{moe_config.num_local_experts} experts on a rank are more than {MAX_EXPERTS}"
    return marlin_obstacle(moe_config.hidden_dim, moe_config.intermediate_size_per_partition, weight_quant.group_size)


def block_size(tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a block, by the rule that ``fused_marlin_moe`` of vLLM 0.32 has for a resident model of these sizes."""
    for size in BLOCK_SIZES:
        if tokens * top_k / num_experts / size < 0.9:
            return size
    return BLOCK_SIZES[-1]


@dataclass(frozen=True)
class Buffers:
    """Working memory of one step.

    gate_up: flat; its first ``T * k * 2 * width`` elements are written. It has ``T * k * max(2 * width, hidden)`` or
        more, because vLLM also makes a view of that size for an output of its own, which is not used here.
    activated: at least ``T * k * width`` elements.
    out_rows: ``[T * k, hidden]``, weighted rows of all waves, before the sum over top-k.
    """

    gate_up: torch.Tensor
    activated: torch.Tensor
    out_rows: torch.Tensor


class MarlinBackend:
    """Computes INT4 experts of one layer with vLLM's Marlin kernels.

    Args:
        weight_quant: compressed-tensors arguments of the checkpoint's weights, 4 bits, symmetric or not.
        moe_config: vLLM's configuration of the layer.
    """

    name = "marlin"

    def __init__(self, weight_quant: Any, moe_config: Any) -> None:
        self.weight_quant = weight_quant
        self.moe_config = moe_config
        self.activation = moe_config.activation
        self.shards = 2 if moe_config.is_act_and_mul else 1
        types = borrow("scalar_types")
        self.quant_type = types.uint4b8 if weight_quant.symmetric else types.uint4
        group = -1 if weight_quant.group_size is None else weight_quant.group_size
        self.width = borrow("marlin_moe_padded_intermediate")(moe_config.intermediate_size_per_partition, group)
        self._run = borrow("_fused_marlin_moe")
        self._align = borrow("moe_align_block_size")
        self._sum = borrow("moe_sum")

    def convert(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Experts in the checkpoint's layout to the kernels' layout.

        Args:
            raw: the fields of a chunk of experts ``[chunk, ...]`` by their compressed-tensors names, on the GPU.

        Returns:
            Fields ``[chunk, ...]`` by names of ``FIELDS``; the width is padded to Marlin's tile.
        """
        converted = borrow("convert_to_wna16_moe_kernel_format")(
            backend=borrow("WNA16MoEBackend").MARLIN,
            # All that vLLM's conversion reads of a layer.
            layer=SimpleNamespace(intermediate_size_per_partition=self.moe_config.intermediate_size_per_partition),
            quant_config=self.weight_quant,
            input_dtype=None,
            w13=raw["w13_weight_packed"],
            w2=raw["w2_weight_packed"],
            w13_scale=raw["w13_weight_scale"],
            w2_scale=raw["w2_weight_scale"],
            w13_qzeros=raw.get("w13_weight_zero_point"),
            w2_qzeros=raw.get("w2_weight_zero_point"),
            w13_bias=raw.get("w13_bias"),
            w2_bias=raw.get("w2_bias"),
        )
        return {name: tensor for name, tensor in zip(FIELDS, converted, strict=True) if tensor is not None}

    def workspace_shapes(self, tokens: int, hidden: int, top_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two workspaces of a step: activations, which vLLM lets overlap the output, and the rest.

        vLLM's ``MarlinExperts`` asks for ``max(width, hidden) + max(2 * width, hidden)`` elements a row. Waves share
        one output, so gate-up must not overlap it: ``3 * width + hidden`` elements, at most ``width`` more.
        """
        rows = tokens * top_k
        return (rows, self.width), (rows, self.shards * self.width + hidden)

    def buffers(self, workspace13: torch.Tensor, workspace2: torch.Tensor, rows: int) -> Buffers:
        """Cut the workspaces, or larger ones, into the buffers of a step of ``rows = T * k``."""
        hidden = self.moe_config.hidden_dim
        gate_up = rows * self.shards * self.width
        flat = workspace2.view(-1)[: gate_up + rows * hidden]
        return Buffers(flat, workspace13, flat[gate_up:].view(rows, hidden))

    def align(self, expert_ids: torch.Tensor, num_experts: int) -> Alignment:
        """Sort a step's rows into blocks, each computed from the row of its expert's id, as for a resident model.

        Args:
            expert_ids: int32 ``[T, k]``, contiguous; ids outside ``0..num_experts - 1`` get no place.
            num_experts: experts of the layer on this rank.
        """
        tokens, top_k = expert_ids.shape
        # Under expert parallelism vLLM counts on an even share of the tokens.
        share = math.ceil(tokens * num_experts / self.moe_config.num_experts)
        size = block_size(share, top_k, num_experts)
        sorted_rows, block_experts, padded_rows = self._align(expert_ids, size, num_experts)
        return Alignment(sorted_rows, block_experts, padded_rows, size)

    def compute(
        self,
        bank: WeightBank,
        blocks: Alignment,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        weights_on_input: bool,
        buffers: Buffers,
    ) -> None:
        """Compute one wave.

        Args:
            bank: weights in the kernels' layout.
            blocks: the wave's blocks and no others.
            hidden_states: ``[T, hidden]``, BF16 or FP16, contiguous.
            topk_weights: float32 ``[T, k]``.
            weights_on_input: whether the weights multiply the input rather than the output.
            buffers: working memory; of ``out_rows`` only rows of this wave's experts are written.
        """
        fields = bank.fields
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
            apply_router_weight_on_input=weights_on_input,
            expert_map=None,
            block_size_m=blocks.block_size,
            sorted_token_ids=blocks.sorted_rows,
            expert_ids=blocks.block_rows,
            num_tokens_post_padded=blocks.padded_rows,
            activation=self.activation,
            w1_zeros=fields.get("w13_zero_point"),
            w2_zeros=fields.get("w2_zero_point"),
            intermediate_cache13=buffers.gate_up,
            intermediate_cache2=buffers.activated,
            output=buffers.out_rows,
        )

    def combine(self, out_rows: torch.Tensor, expert_ids: torch.Tensor, output: torch.Tensor) -> None:
        """Sum rows over top-k.

        Args:
            out_rows: ``[T * k, hidden]``, weighted.
            expert_ids: int32 ``[T, k]``; rows of negative ids are left out, their memory was never written.
            output: ``[T, hidden]``, overwritten.
        """
        self._sum(out_rows.view(*expert_ids.shape, -1), output, expert_ids, None)
