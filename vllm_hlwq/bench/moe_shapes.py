"""Sizes of the mixture-of-experts layers that benchmarks imitate. Needs nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..host_store import RecordLayout


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a layer with gated INT4 experts; ``activation`` by the name that vLLM has for it."""

    hidden: int
    width: int
    experts: int
    top_k: int
    group_size: int
    activation: str

    def checkpoint_layout(self) -> RecordLayout:
        """An expert's record as checkpoints hold it: 8 codes an int32 along the inputs, BF16 scales."""
        matrices = {"w13": (2 * self.width, self.hidden), "w2": (self.hidden, self.width)}
        codes = {f"{name}_weight_packed": ((out, inputs // 8), torch.int32) for name, (out, inputs) in matrices.items()}
        scales = {
            f"{name}_weight_scale": ((out, inputs // self.group_size), torch.bfloat16)
            for name, (out, inputs) in matrices.items()
        }
        return RecordLayout(codes | scales)

    def marlin_layout(self) -> RecordLayout:
        """An expert's record as vLLM's Marlin kernels read it: tiles of 16 inputs, 8 codes an int32, BF16 scales."""
        fields = {}
        for name, inputs, outputs in (("w13", self.hidden, 2 * self.width), ("w2", self.width, self.hidden)):
            fields[f"{name}_weight_packed"] = ((inputs // 16, outputs * 2), torch.int32)
            fields[f"{name}_weight_scale"] = ((inputs // self.group_size, outputs), torch.bfloat16)
        return RecordLayout(fields)


SHAPES = {
    "gemma-4-26b-a4b": MoeShape(2816, 704, experts=128, top_k=8, group_size=64, activation="gelu_tanh"),
    "qwen3-30b-a3b": MoeShape(2048, 768, experts=128, top_k=8, group_size=128, activation="silu"),
}
"""With the group size that the export chooses for them."""
