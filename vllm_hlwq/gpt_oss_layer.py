"""gpt-oss's container of expert weights, with the weights on the host.

The model loads its experts in a way of its own: stacks of all experts, gate and up interleaved. MXFP4 stacks and single
experts come through ``weight_loader``; 16-bit stacks are copied into the parameters directly, so the places themselves
must tell whether that happened.
"""

from __future__ import annotations

from typing import Any

import torch

from .expert_formats import ExpertFormat
from .loaded_experts import WHOLE, Shapes
from .moe_offload import OffloadedLayer
from .vllm_compat import borrow


class OffloadedGptOssRoutedExperts(OffloadedLayer, borrow("GptOssRoutedExperts")):  # type: ignore[misc]
    """In the place of ``GptOssRoutedExperts``."""

    stacked = True

    def adopt_parameters(self, num_experts: int, expert_format: ExpertFormat, stored: Shapes) -> None:
        super().adopt_parameters(num_experts, expert_format, stored)
        if self.restored:
            return
        for first_values in self._first_values().values():
            first_values.fill_(torch.nan)

    def finish_loading(self, quant_config: Any) -> Any:
        for name, first_values in {} if self.restored else self._first_values().items():
            for expert in torch.nonzero(~first_values.isnan()).flatten().tolist():
                self.loaded.note(name, WHOLE, expert)
        return super().finish_loading(quant_config)

    def _first_values(self) -> dict[str, torch.Tensor]:
        """The first value of each expert of each parameter in 16 bit: NaN until it is loaded."""
        assert self.store is not None
        fields = {name: self.store.field(name) for name in self.store.layout}
        wide = (torch.bfloat16, torch.float16, torch.float32)
        return {name: field.flatten(1)[:, 0] for name, field in fields.items() if field.dtype in wide}

    def _shape_of(self, loaded_weight: torch.Tensor, param: torch.nn.Parameter) -> tuple[int, ...]:
        """Single experts come in blocks of 16 bytes in MXFP4, and with their inputs first in 16 bit."""
        if loaded_weight.ndim == 3:
            return loaded_weight.shape[0], loaded_weight[0].numel()
        in_16_bit = param.expert_field.endswith("_weight") and param.is_floating_point()  # type: ignore[attr-defined]
        return tuple(loaded_weight.t().shape if in_16_bit else loaded_weight.shape)
