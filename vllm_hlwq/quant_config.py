"""Which quantisation a layer's experts have, and the quant method that declares and loads their tensors."""

from __future__ import annotations

from typing import Any

from .errors import ExpertCacheError
from .hlwq_serving import HlwqConfig
from .quant_methods import (
    AutoAWQMoEMethod,
    AutoGPTQMoEMethod,
    CompressedTensorsW8A8Fp8MoEMethod,
    CompressedTensorsWNA16MoEMethod,
    Fp8MoEMethod,
    GptOssMxfp4MoEMethod,
    UnquantizedFusedMoEMethod,
)
from .vllm_compat import borrow

SUPPORTED_QUANTISATIONS = (
    "BF16, FP16, compressed-tensors pack-quantized INT4 (group or channel scales), AWQ INT4, GPTQ INT4, gpt-oss MXFP4 "
    "or FP8 (a scale a tensor, a channel or 128 x 128 block)"
)
FP8_BLOCK = [128, 128]
"""The only blocks that vLLM's Marlin kernels are compiled for."""


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
    if getattr(quant_config, "online_quantization_config", None) is not None:
        raise _unsupported(prefix, f"{quant_config.get_name()} while they are loaded (--quantization)")
    for config_class, make in MAKERS.items():
        if type(quant_config) is config_class:
            return make(layer, quant_config, prefix)
    raise _unsupported(prefix, quant_config.get_name())


def _compressed_tensors(layer: Any, quant_config: Any, prefix: str) -> Any:
    scheme = _compressed_tensors_scheme(layer, quant_config, prefix)
    if scheme is None:
        return UnquantizedFusedMoEMethod(layer.moe_config)
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    if quant_config._is_fp8_w8a8(weights, inputs):
        if weights.strategy == "block" and list(weights.block_structure) != FP8_BLOCK:
            raise _unsupported(prefix, f"compressed-tensors FP8 in blocks of {weights.block_structure}")
        return CompressedTensorsW8A8Fp8MoEMethod(weights, inputs, layer.moe_config)
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


def _awq(layer: Any, quant_config: Any, prefix: str) -> Any:
    if borrow("is_layer_skipped")(prefix, quant_config.modules_to_not_convert, match_mode="substring"):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if not quant_config.zero_point or quant_config.group_size <= 0:
        raise _unsupported(
            prefix, f"AWQ with zero_point {quant_config.zero_point} and group size {quant_config.group_size}"
        )
    return AutoAWQMoEMethod(quant_config, layer.moe_config)


def _gptq(layer: Any, quant_config: Any, prefix: str) -> Any:
    method = borrow("get_moe_quant_method")(quant_config, layer, prefix, AutoGPTQMoEMethod)
    if not isinstance(method, AutoGPTQMoEMethod):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if method.quant_config.weight_bits != 4:
        raise _unsupported(prefix, f"GPTQ with {method.quant_config.weight_bits} bits")
    return method


def _fp8(layer: Any, quant_config: Any, prefix: str) -> Any:
    if borrow("is_layer_skipped")(
        prefix,
        quant_config.ignored_layers,
        quant_config.packed_modules_mapping,
        match_mode=quant_config.ignored_layers_match_mode,
    ):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if quant_config.store_dtype is not None:
        raise _unsupported(prefix, f"FP8 stored as {quant_config.store_dtype}")
    block = quant_config.weight_block_size
    if block is not None and list(block) != FP8_BLOCK:
        raise _unsupported(prefix, f"FP8 in blocks of {block}")
    return Fp8MoEMethod(quant_config, layer.moe_config)


def _gpt_oss_mxfp4(layer: Any, quant_config: Any, prefix: str) -> Any:
    return GptOssMxfp4MoEMethod(layer.moe_config)


def _unsupported(prefix: str, what: str) -> ExpertCacheError:
    return ExpertCacheError(
        f"{prefix}: experts quantised as {what} have no expert-cache backend; use {SUPPORTED_QUANTISATIONS}"
    )


MAKERS = {
    borrow("CompressedTensorsConfig"): _compressed_tensors,
    HlwqConfig: _compressed_tensors,
    borrow("AutoAWQConfig"): _awq,
    borrow("AutoGPTQConfig"): _gptq,
    borrow("GptOssMxfp4Config"): _gpt_oss_mxfp4,
    borrow("Fp8Config"): _fp8,
}
"""Exact classes of vLLM's configurations: a subclass may hold its experts in another way."""
