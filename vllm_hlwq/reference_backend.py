"""The reference backend: expert arithmetic in plain torch on any device, bit-identical for every cache size.

It runs the whole product on machines without a GPU and is the oracle for the device kernels. Weights are dequantised
to the model's dtype, as a 16-bit copy of the model would hold them, and everything else is float32: each row of
(token, k) is computed with the same operations wherever its expert's weights lie, and the top-k sum runs in a fixed
order, so neither slots nor waves can change a bit.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch.nn import functional

from .activations import ACTIVATIONS
from .errors import ExpertCacheError
from .weight_bank import WeightBank


class ReferenceBackend:
    """Computes experts of one layer: BF16, FP16 or pack-quantized INT4, with or without biases."""

    name = "reference"

    def __init__(self, activation: str, weight_quant: QuantizationArgs | None) -> None:
        """Prepare a layer.

        Args:
            activation: vLLM's name of the activation.
            weight_quant: the checkpoint's quantisation arguments, None for 16-bit experts.

        Raises:
            ExpertCacheError: the activation is not known here.
        """
        if activation not in ACTIVATIONS:
            raise ExpertCacheError(
                f"expert activation {activation!r} is not known to the reference backend; "
                f"it knows {', '.join(sorted(ACTIVATIONS))}"
            )
        self.activation = ACTIVATIONS[activation]
        self.scheme = None if weight_quant is None else QuantizationScheme(targets=[], weights=weight_quant)

    def compute(
        self,
        bank: WeightBank,
        experts: torch.Tensor,
        bank_rows: torch.Tensor,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        out_rows: torch.Tensor,
    ) -> None:
        """Compute the rows of one wave's experts.

        Args:
            bank: the weights.
            experts: int64 [R], experts of the wave, local ids.
            bank_rows: integer [R], the bank row of each.
            hidden_states: [T, hidden] in the model's dtype.
            expert_ids: [T, k] on the CPU, local ids; others than ``experts`` are passed over.
            out_rows: float32 [T * k, hidden]; only rows of ``experts`` are written, unweighted.
        """
        top_k = expert_ids.shape[1]
        for expert, bank_row in zip(experts.tolist(), bank_rows.tolist(), strict=True):
            rows = torch.nonzero(expert_ids.reshape(-1) == expert).flatten().to(hidden_states.device)
            x = hidden_states[rows // top_k].float()
            x = self.activation(self._project(bank, "w13", bank_row, x))
            out_rows[rows] = self._project(bank, "w2", bank_row, x)

    @staticmethod
    def combine(out_rows: torch.Tensor, topk_weights: torch.Tensor | None, output: torch.Tensor) -> None:
        """Sum weighted rows over top-k, in float32 and in order of k.

        Args:
            out_rows: float32 [T * k, hidden].
            topk_weights: [T, k], None when the weights were applied to the input.
            output: [T, hidden] in the model's dtype, overwritten.
        """
        tokens, hidden = output.shape
        rows = out_rows.view(tokens, -1, hidden)
        total = torch.zeros(tokens, hidden, dtype=torch.float32, device=rows.device)
        for k in range(rows.shape[1]):
            part = rows[:, k]
            total += part if topk_weights is None else part * topk_weights[:, k, None].float()
        output.copy_(total)

    def _project(self, bank: WeightBank, projection: str, row: int, x: torch.Tensor) -> torch.Tensor:
        """``x [rows, in]`` through one expert's ``w13`` or ``w2``, float32 [rows, out]."""
        weight = self._weight(bank, projection, row).float()
        bias = bank.fields.get(f"{projection}_bias")
        return functional.linear(x, weight, None if bias is None else bias[row].float())

    def _weight(self, bank: WeightBank, projection: str, row: int) -> torch.Tensor:
        """One expert's weight ``[out, in]`` in the model's dtype."""
        if self.scheme is None:
            return bank.fields[f"{projection}_weight"][row]
        packed = bank.fields[f"{projection}_weight_packed"][row]
        state = {
            "weight_packed": packed,
            "weight_scale": bank.fields[f"{projection}_weight_scale"][row],
            "weight_shape": torch.Size((packed.shape[0], packed.shape[1] * 32 // self.scheme.weights.num_bits)),
        }
        zero_point = bank.fields.get(f"{projection}_weight_zero_point")
        if zero_point is not None:
            state["weight_zero_point"] = zero_point[row]
        weight: torch.Tensor = PackedQuantizationCompressor.decompress(state, self.scheme)["weight"]
        return weight
