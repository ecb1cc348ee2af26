"""vLLM's quant methods with the experts' weights on the host.

The methods are vLLM's own classes under their own names (its weight loader branches on the class name), changed in
three points: weights are created in the host store, nothing is moved to the device after loading, and the step goes
through the expert cache. vLLM's choice of a kernel is not asked for: it depends on the machine, and where no kernel
of vLLM's fits (INT4 on a CPU without AMX) it refuses checkpoints that the reference backend computes. So the classes
are made without their own ``__init__``, and what ``create_weights`` reads is set here.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from .expert_formats import (
    GPT_OSS_MXFP4,
    SIXTEEN_BIT,
    ExpertFormat,
    awq_int4,
    compressed_tensors_int4,
    fp8,
    gptq_int4,
)
from .vllm_compat import borrow

StockMethod: Any = borrow("FusedMoEMethodBase")


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
        in_checkpoint = {
            "hidden_size": layer.moe_config.hidden_dim_unpadded,
            "intermediate_size_per_partition": layer.moe_config.intermediate_size_per_partition_unpadded,
        }
        stored = torch.nn.Module()
        with torch.device("meta"):
            super().create_weights(layer=stored, num_experts=num_experts, **arguments | in_checkpoint)  # type: ignore[misc]
            super().create_weights(layer=layer, num_experts=num_experts, **arguments)  # type: ignore[misc]
        shapes = {name: tuple(parameter.shape[1:]) for name, parameter in stored.named_parameters()}
        layer.adopt_parameters(num_experts, self.expert_format, shapes)

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


class UnquantizedFusedMoEMethod(HostLoadedMethod, borrow("UnquantizedFusedMoEMethod")):  # type: ignore[misc]
    """BF16 or FP16 experts."""

    expert_format = SIXTEEN_BIT

    def __init__(self, moe: Any) -> None:
        StockMethod.__init__(self, moe)


class CompressedTensorsWNA16MoEMethod(
    HostLoadedMethod,
    borrow("CompressedTensorsWNA16MoEMethod"),  # type: ignore[misc]
):
    """Pack-quantized INT4 experts, symmetric or asymmetric, with group or channel scales."""

    def __init__(self, weight_quant: Any, moe: Any) -> None:
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


class AutoAWQMoEMethod(HostLoadedMethod, borrow("AutoAWQMoEMethod")):  # type: ignore[misc]
    """AWQ INT4 experts, asymmetric, with group scales."""

    def __init__(self, quant_config: Any, moe: Any) -> None:
        StockMethod.__init__(self, moe)
        self.expert_format = awq_int4(quant_config)
        self.quant_config = quant_config
        self.input_dtype = None


class AutoGPTQMoEMethod(HostLoadedMethod, borrow("AutoGPTQMoEMethod")):  # type: ignore[misc]
    """GPTQ INT4 experts, symmetric, with group or channel scales."""

    def __init__(self, quant_config: Any, moe: Any) -> None:
        StockMethod.__init__(self, moe)
        self.expert_format = gptq_int4(quant_config)
        self.quant_config = quant_config
        self.input_dtype = None


StockMxfp4: Any = borrow("GptOssMxfp4MoEMethod")


class GptOssMxfp4MoEMethod(HostLoadedMethod, StockMxfp4):  # type: ignore[misc]
    """gpt-oss's MXFP4 experts, with biases."""

    expert_format = GPT_OSS_MXFP4

    def __init__(self, moe: Any) -> None:
        StockMethod.__init__(self, moe)
        self.weight_dtype = "gpt_oss_mxfp4"
        self.mxfp4_backend = borrow("Mxfp4MoeBackend").MARLIN

    def maybe_roundup_sizes(self, *sizes_and_settings: Any) -> tuple[int, int]:
        """Round up as vLLM does for Marlin, which takes no 2,880 features; the loader leaves zeros in the padding."""
        rounded: tuple[int, int] = StockMxfp4.maybe_roundup_sizes(self, *sizes_and_settings)
        return rounded


class Fp8MoEMethod(HostLoadedMethod, borrow("Fp8MoEMethod")):  # type: ignore[misc]
    """FP8 experts with a scale a tensor or a block."""

    def __init__(self, quant_config: Any, moe: Any) -> None:
        StockMethod.__init__(self, moe)
        self.quant_config = quant_config
        self.weight_block_size = quant_config.weight_block_size
        self.moe_block_shape = quant_config.weight_block_size
        self.block_quant = quant_config.weight_block_size is not None
        self.weight_scale_name = "weight_scale_inv" if self.block_quant else "weight_scale"
        self.weight_scale_refine = None
        self.expert_format = fp8(self.weight_scale_name, self.weight_block_size, per_tensor=not self.block_quant)


class CompressedTensorsW8A8Fp8MoEMethod(
    HostLoadedMethod,
    borrow("CompressedTensorsW8A8Fp8MoEMethod"),  # type: ignore[misc]
):
    """FP8 experts of compressed-tensors with a scale a tensor, an output channel or a block."""

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any) -> None:
        StockMethod.__init__(self, moe)
        self.weight_quant = weight_quant
        self.input_quant = input_quant
        self.block_quant = weight_quant.strategy == "block"
        self.weight_block_size = weight_quant.block_structure if self.block_quant else None
        self.static_input_scales = not input_quant.dynamic
        self.expert_format = fp8("weight_scale", self.weight_block_size, per_tensor=weight_quant.strategy == "tensor")
