"""Which quantisation a layer's experts have, and the vLLM quant method that declares and loads their tensors.

The methods are vLLM's own classes under their own names (its weight loader branches on the class name), changed in
three points: weights are created in the host store, nothing is moved to the device after loading, and the step goes
through the expert cache. vLLM's choice of a kernel is not asked for: it depends on the machine, and where no kernel
of vLLM's fits (INT4 on a CPU without AMX) it refuses checkpoints that the reference backend computes.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from .errors import ExpertCacheError
from .expert_formats import SIXTEEN_BIT, ExpertFormat, compressed_tensors_int4
from .vllm_compat import borrow

SUPPORTED_QUANTISATIONS = "BF16, FP16 and compressed-tensors pack-quantized INT4 (group or channel scales)"

StockMethod: Any = borrow("FusedMoEMethodBase")
StockUnquantized: Any = borrow("UnquantizedFusedMoEMethod")
StockWNA16: Any = borrow("CompressedTensorsWNA16MoEMethod")


class HostLoadedMethod:
    """Mixed into vLLM's quant methods: weights start and stay in host memory, the step goes to the expert cache."""

    requires_device_loading = False
    supports_pre_processed_weights = False
    supports_eplb = False
    is_monolithic = False
    expert_format: ExpertFormat
    moe_kernel: Any
    moe_quant_config: Any

    def create_weights(self, layer: Any, num_experts: int, **arguments: Any) -> None:
        """Declare the checkpoint tensors without memory, then let the layer give them places in its host store."""
        layer.choose_backend(self.expert_format)
        with torch.device("meta"):
            super().create_weights(layer=layer, num_experts=num_experts, **arguments)  # type: ignore[misc]
        layer.adopt_parameters(num_experts, self.expert_format)

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size: int, *_: Any) -> tuple[int, int]:
        """Keep the model's sizes: the rounding rules of vLLM's kernels do not concern ours."""
        return hidden_size, intermediate_size

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build banks and kernel; called once by vLLM's loader when all weights are in."""
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = layer.finish_loading(self.moe_quant_config)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """16-bit activations and no scales: what a backend needs to know of the weights, it takes from the bank."""
        return borrow("FusedMoEQuantConfig").make()

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run one step: hidden states ``[T, hidden]``, weights and ids ``[T, k]`` to ``[T, hidden]``."""
        w13, w2 = layer.expert_cache.weight_views()
        output: torch.Tensor = self.moe_kernel.apply(
            x,
            w1=w13,
            w2=w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        return output


class UnquantizedFusedMoEMethod(HostLoadedMethod, StockUnquantized):  # type: ignore[misc]
    """BF16 or FP16 experts."""

    expert_format = SIXTEEN_BIT

    def __init__(self, moe: Any) -> None:
        StockMethod.__init__(self, moe)  # StockUnquantized.__init__ asks for a kernel of vLLM's


class CompressedTensorsWNA16MoEMethod(HostLoadedMethod, StockWNA16):  # type: ignore[misc]
    """Pack-quantized INT4 experts, symmetric or asymmetric, with group or channel scales."""

    def __init__(self, weight_quant: Any, moe: Any) -> None:
        # Not StockWNA16.__init__: it asks for a kernel of vLLM's. What create_weights reads is set here.
        StockMethod.__init__(self, moe)
        self.expert_format = compressed_tensors_int4(weight_quant)
        self.weight_quant = weight_quant
        self.symmetric = weight_quant.symmetric
        self.num_bits = weight_quant.num_bits
        self.packed_factor = Fraction(32, weight_quant.num_bits)
        self.strategy = weight_quant.strategy
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
        types = "WNA16_SUPPORTED_TYPES_MAP" if self.symmetric else "WNA16_ZP_SUPPORTED_TYPES_MAP"
        self.quant_type = borrow(types)[self.num_bits]


def make_quant_method(layer: Any, quant_config: Any, prefix: str) -> Any:
    """Make the quant method of a layer's experts.

    Args:
        layer: the RoutedExperts being built.
        quant_config: vLLM's quantisation configuration of the model, or None.
        prefix: the layer's name.

    Raises:
        ExpertCacheError: no backend computes experts of this quantisation.
    """
    if quant_config is None:
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if not isinstance(quant_config, borrow("CompressedTensorsConfig")):
        raise _unsupported(prefix, quant_config.get_name())
    scheme = _compressed_tensors_scheme(layer, quant_config, prefix)
    if scheme is None:
        return UnquantizedFusedMoEMethod(layer.moe_config)
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    if not quant_config._is_wNa16_group_channel(weights, inputs) or weights.num_bits != 4 or weights.type != "int":
        activations = "16-bit" if inputs is None else f"{inputs.num_bits}-bit {inputs.type}"
        raise _unsupported(
            prefix, f"compressed-tensors {weights.num_bits}-bit {weights.type} weights, {activations} activations"
        )
    if scheme["format"] != "pack-quantized":
        raise _unsupported(prefix, f"compressed-tensors format {scheme['format']!r}")
    return CompressedTensorsWNA16MoEMethod(weights, layer.moe_config)


def _compressed_tensors_scheme(layer: Any, quant_config: Any, prefix: str) -> Any:
    """The one scheme of an expert's projections, None where the checkpoint leaves them in 16 bit."""
    quant_config._add_fused_moe_to_target_scheme_map()
    names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
    schemes = [quant_config.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names if name]
    if any(scheme != schemes[0] for scheme in schemes):
        raise ExpertCacheError(
            f"{prefix}: the projections of an expert have different quantisation schemes; export the checkpoint with "
            "one scheme for gate, up and down"
        )
    return schemes[0]


def _unsupported(prefix: str, what: str) -> ExpertCacheError:
    return ExpertCacheError(
        f"{prefix}: experts quantised as {what} have no expert-cache backend; use {SUPPORTED_QUANTISATIONS}"
    )
