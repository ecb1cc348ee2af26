"""vLLM's Triton kernel as a backend on CUDA: BF16 and FP16 experts.

The kernel computes each block by itself and sums over the inputs in one order, so a row's bits depend neither on the
bank that its expert lies in nor on the wave: they are a resident model's for every number of slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from .device_backend import Buffers, DeviceBackend
from .expert_formats import ExpertFormat
from .vllm_compat import borrow
from .wave_blocks import Alignment
from .weight_bank import WeightBank

COMPUTE_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Of the model's dtype, as vLLM's ``TritonExperts`` chooses it."""


class TritonBackend(DeviceBackend):
    """Computes 16-bit experts of one layer with vLLM's Triton kernel, in the blocks of a resident model."""

    name = "triton"

    def __init__(self, expert_format: ExpertFormat, moe_config: Any) -> None:
        super().__init__(expert_format, moe_config, moe_config.intermediate_size_per_partition)
        quant_config = borrow("FusedMoEQuantConfig").make()
        self._settings_name = quant_config.config_name(moe_config.in_dtype)
        self._stock = borrow("TritonExperts")(moe_config, quant_config)
        self._find_launch = borrow("try_get_optimal_moe_config")
        self._run = borrow("invoke_fused_moe_triton_kernel")

    def _launch(self, tokens: int, top_k: int) -> dict[str, int]:
        """Tile sizes of the kernel that vLLM has, tuned or by default, for all experts of this rank resident."""
        experts, hidden = self.moe_config.num_local_experts, self.moe_config.hidden_dim
        launch: dict[str, int] = self._find_launch(
            (experts, self.shards * self.width, hidden),
            (experts, hidden, self.width),
            top_k,
            self._settings_name,
            tokens,
        )
        return launch

    def block_size(self, tokens: int, top_k: int, num_experts: int) -> int:
        return self._launch(tokens, top_k)["BLOCK_SIZE_M"]

    def compute(
        self,
        bank: WeightBank,
        blocks: Alignment,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        weights_on_input: bool,
        buffers: Buffers,
    ) -> None:
        # Weights on the input were applied by vLLM's kernel frame already; it allows them for top-1 only.
        tokens, top_k = topk_weights.shape
        rows = tokens * top_k
        columns = self.shards * self.width
        gate_up = buffers.gate_up[: rows * columns].view(rows, columns)
        activated = buffers.activated.view(-1)[: rows * self.width].view(rows, self.width)
        launch = self._launch(tokens, top_k)
        self._multiply(bank, "w13", blocks, launch, hidden_states, gate_up.view(tokens, top_k, -1), top_k, None)
        self._stock.activation(self.activation, activated, gate_up)
        out_rows = buffers.out_rows.view(tokens, top_k, -1)
        weights = None if weights_on_input else topk_weights
        self._multiply(bank, "w2", blocks, launch, activated, out_rows, 1, weights)

    def _multiply(
        self,
        bank: WeightBank,
        projection: str,
        blocks: Alignment,
        launch: dict[str, int],
        rows: torch.Tensor,
        products: torch.Tensor,
        rows_share: int,
        topk_weights: torch.Tensor | None,
    ) -> None:
        """One projection of a wave's blocks.

        Args:
            bank: the weights.
            projection: ``w13`` or ``w2``.
            blocks: over the rows of ``products``.
            launch: the kernel's tile sizes.
            rows: ``[T * k / rows_share, in]``.
            products: ``[T, k, out]``; only rows of the blocks are written.
            rows_share: consecutive products of one row.
            topk_weights: float32 ``[T, k]``, multiplied with the products in float32; None for none.
        """
        self._run(
            A=rows,
            B=bank.fields[f"{projection}_weight"],
            C=products,
            A_scale=None,
            B_scale=None,
            topk_weights=topk_weights,
            sorted_token_ids=blocks.sorted_rows,
            expert_ids=blocks.block_rows,
            num_tokens_post_padded=blocks.padded_rows,
            mul_routed_weight=topk_weights is not None,
            top_k=rows_share,
            config=launch,
            compute_type=COMPUTE_TYPES[rows.dtype],
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            B_bias=bank.fields.get(f"{projection}_bias"),
        )
