"""What computes experts on CUDA, as far as the kernels do not matter: working memory, and the sum over top-k.

``MarlinBackend`` and ``TritonBackend`` add the kernels. Both are vLLM's own, given a bank of slots in the place of all
experts: blocks of rows are formed over the layer's expert ids, as for a resident model, and only then is each block
given a row of a bank (``wave_blocks.py``). So block order is the resident model's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from .expert_formats import ExpertFormat, Tensors
from .vllm_compat import borrow
from .wave_blocks import Alignment
from .weight_bank import WeightBank

MAX_EXPERTS = 992
"""vLLM's alignment kernel takes fewer than 1,024 experts, rounded up to warps of 32."""


def common_obstacle(moe_config: Any) -> str | None:
    """Say why neither backend can compute a layer, None if they can.

    Args:
        moe_config: vLLM's configuration of the layer.
    """
    if moe_config.num_local_experts > MAX_EXPERTS:
        return f"{moe_config.num_local_experts} experts on a rank are more than {MAX_EXPERTS}"
    if not borrow("apply_moe_activation_supported")(moe_config.activation):
        return f"activation {moe_config.activation.value!r} is none of those that vLLM computes for them"
    return None


@dataclass(frozen=True)
class Buffers:
    """Working memory of one step.

    gate_up: flat; its first ``T * k * 2 * width`` elements are written. It has ``T * k * max(2 * width, hidden)`` or
        more, because vLLM's Marlin function also makes a view of that size for an output of its own, which is not used.
    activated: at least ``T * k * width`` elements.
    out_rows: ``[T * k, hidden]``, weighted rows of all waves, before the sum over top-k.
    """

    gate_up: torch.Tensor
    activated: torch.Tensor
    out_rows: torch.Tensor


class DeviceBackend(ABC):
    """Computes experts of one layer on CUDA.

    Args:
        expert_format: how the checkpoint holds the experts.
        moe_config: vLLM's configuration of the layer, with sizes as the kernels need them.
        width: intermediate features of an expert in the kernels' layout.

    Attributes:
        left_out: loaded tensors that are not carried on, because the checkpoint has none of them.
    """

    name: str

    def __init__(self, expert_format: ExpertFormat, moe_config: Any, width: int) -> None:
        self.expert_format = expert_format
        self.moe_config = moe_config
        self.activation = moe_config.activation
        self.shards = moe_config.w13_num_shards
        self.width = width
        self.left_out: frozenset[str] = frozenset()
        self._align = borrow("moe_align_block_size")
        self._sum = borrow("moe_sum")

    @property
    def converts(self) -> bool:
        """Whether experts as loaded are not yet what the kernels read."""
        return self.expert_format.convert is not None or bool(self.left_out)

    def convert(self, raw: Tensors) -> Tensors:
        """Experts in the checkpoint's layout to the kernels' layout.

        Args:
            raw: the fields of a chunk of experts ``[chunk, ...]`` by the names of vLLM's quant method, on the GPU.

        Returns:
            Fields ``[chunk, ...]`` by the kernels' names.
        """
        kept = {name: tensor for name, tensor in raw.items() if name not in self.left_out}
        convert = self.expert_format.convert
        return kept if convert is None else convert(kept, self.moe_config)

    def workspace_shapes(self, tokens: int, hidden: int, top_k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two workspaces of a step: activations, which vLLM lets overlap the output, and the rest.

        vLLM's own experts ask for ``max(width, hidden) + max(2 * width, hidden)`` elements a row. Waves share
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

    @abstractmethod
    def block_size(self, tokens: int, top_k: int, num_experts: int) -> int:
        """Rows of a block in a step of ``tokens``, as for a resident model of ``num_experts`` on this rank."""

    def align(self, expert_ids: torch.Tensor, num_experts: int) -> Alignment:
        """Sort a step's rows into blocks, each computed from the row of its expert's id, as for a resident model.

        Args:
            expert_ids: int32 ``[T, k]``, contiguous; ids outside ``0..num_experts - 1`` get no place.
            num_experts: experts of the layer on this rank.
        """
        tokens, top_k = expert_ids.shape
        size = self.block_size(tokens, top_k, num_experts)
        sorted_rows, block_experts, padded_rows = self._align(expert_ids, size, num_experts)
        return Alignment(sorted_rows, block_experts, padded_rows, size)

    @abstractmethod
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
            weights_on_input: whether the weights multiply the input rather than the output; vLLM's kernel frame has
                done that, and there is no more to do with them.
            buffers: working memory; of ``out_rows`` only rows of this wave's experts are written.
        """

    def combine(
        self, out_rows: torch.Tensor, expert_ids: torch.Tensor, output: torch.Tensor, all_written: bool = False
    ) -> None:
        """Sum rows over top-k.

        Args:
            out_rows: ``[T * k, hidden]``, weighted.
            expert_ids: int32 ``[T, k]``; rows of negative ids are left out, their memory was never written.
            output: ``[T, hidden]``, overwritten.
            all_written: whether every row may be summed, which saves reading the ids: none is negative but those of
                rows that only pad, whose sums nobody reads.
        """
        self._sum(out_rows.view(*expert_ids.shape, -1), output, None if all_written else expert_ids, None)
