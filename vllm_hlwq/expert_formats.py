"""The formats of experts that the cache carries, as data.

An ``ExpertFormat`` lists the tensors that a quant method of vLLM's registers for its experts, and says how those of a
chunk of experts become what the kernels read. A tensor that is registered but not listed is refused: so nothing that
a kernel needs can be lost between the loader and the slots.

The conversions are vLLM's own and work expert by expert: they repack, permute and pad each for itself, and where an
FP8 expert's gate and up get one scale, it is the larger of these two. What vLLM takes over all experts of a layer is
not used here: the scales of INT8 activations, those of FP8 activations, and one factor for all NVFP4 scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .vllm_compat import borrow

Tensors = dict[str, torch.Tensor]
Conversion = Callable[[Tensors, Any], Tensors]


@dataclass(frozen=True)
class ExpertFormat:
    """How a checkpoint holds the experts of a layer.

    Attributes:
        name: what users call it.
        carried: tensors, by the quant method's names, that are kept for each expert; a layer need not have all.
        convert: fields of a chunk of experts ``[chunk, ...]`` and vLLM's configuration of the layer to the kernels'
            fields ``[chunk, ...]``; None where the kernels read the tensors as they are.
        loader_only: tensors that vLLM's loader fills and its kernels do not read.
        optional: of the carried ones those that a checkpoint need not have, though they are always registered.
        weight_type: vLLM's name of the weights' type for its Marlin kernels; None for 16-bit weights, which run on
            its Triton kernels.
        group_size: input features that share a scale; None for one scale per output channel, or none.
        weight_quant: compressed-tensors arguments, for the reference backend; None where it needs none.
        on_reference: whether the reference backend computes it.
    """

    name: str
    carried: frozenset[str]
    convert: Conversion | None = None
    loader_only: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    weight_type: str | None = None
    group_size: int | None = None
    weight_quant: Any = None
    on_reference: bool = False


def both(*names: str) -> frozenset[str]:
    """Names of the tensors of both projections: ``weight`` -> ``w13_weight``, ``w2_weight``."""
    return frozenset(f"{projection}_{name}" for projection in ("w13", "w2") for name in names)


SIXTEEN_BIT = ExpertFormat("BF16 or FP16", both("weight", "bias"), on_reference=True)

INT4_FIELDS = (
    "w13_weight", "w2_weight", "w13_scale", "w2_scale", "w13_zero_point", "w2_zero_point",
    "w13_input_scale", "w2_input_scale", "w13_bias", "w2_bias",
)  # fmt: skip
"""What vLLM's INT4 conversion returns, in its order; absent ones are None. Input scales exist for INT8 activations."""


def layer_of(raw: Tensors, moe_config: Any) -> SimpleNamespace:
    """What vLLM's conversions read of a layer, for a chunk of its experts."""
    return SimpleNamespace(
        num_experts=len(next(iter(raw.values()))),
        hidden_size=moe_config.hidden_dim,
        intermediate_size_per_partition=moe_config.intermediate_size_per_partition,
        params_dtype=moe_config.in_dtype,
    )


def int4_conversion(
    quant_config: Any, weight: str, scale: str, zeros: str = "", inputs_first: bool = False
) -> Conversion:
    """To Marlin's layout by vLLM's conversion, which repacks, permutes and pads expert by expert.

    Args:
        quant_config: what the conversion takes the bits and the group size from; AWQ's own order of packing too.
        weight: name of the packed weights.
        scale: name of their scales.
        zeros: name of their zero points, empty if there are none.
        inputs_first: whether inputs come before outputs in weights and scales; the conversion wants outputs first, but
            for AWQ, which it knows.
    """

    def convert(raw: Tensors, moe_config: Any) -> Tensors:
        def turned(name: str) -> torch.Tensor:
            return raw[name].transpose(1, 2).contiguous() if inputs_first else raw[name]

        tensors: dict[str, torch.Tensor | None] = {}
        for projection in ("w13", "w2"):
            tensors[projection] = turned(f"{projection}_{weight}")
            tensors[f"{projection}_scale"] = turned(f"{projection}_{scale}")
            tensors[f"{projection}_qzeros"] = raw.get(f"{projection}_{zeros}")
            tensors[f"{projection}_bias"] = raw.get(f"{projection}_bias")
        converted = borrow("convert_to_wna16_moe_kernel_format")(
            backend=borrow("WNA16MoEBackend").MARLIN,
            layer=layer_of(raw, moe_config),
            quant_config=quant_config,
            input_dtype=None,
            **tensors,
        )
        return {name: tensor for name, tensor in zip(INT4_FIELDS, converted, strict=True) if tensor is not None}

    return convert


def compressed_tensors_int4(weight_quant: Any) -> ExpertFormat:
    """compressed-tensors ``pack-quantized`` with 4 bits, symmetric or not."""
    return ExpertFormat(
        "compressed-tensors INT4",
        both("weight_packed", "weight_scale", "weight_zero_point", "bias"),
        int4_conversion(weight_quant, "weight_packed", "weight_scale", "weight_zero_point"),
        loader_only=both("weight_shape"),
        weight_type="uint4b8" if weight_quant.symmetric else "uint4",
        group_size=weight_quant.group_size,
        weight_quant=weight_quant,
        on_reference=True,
    )


def awq_int4(quant_config: Any) -> ExpertFormat:
    """AWQ with 4 bits, packed along the outputs in AWQ's order, with zero points."""
    return ExpertFormat(
        "AWQ INT4",
        both("qweight", "scales", "qzeros"),
        int4_conversion(quant_config, "qweight", "scales", "qzeros"),
        weight_type="uint4",
        group_size=quant_config.group_size,
    )


def gptq_int4(quant_config: Any) -> ExpertFormat:
    """GPTQ with 4 bits, symmetric: its zero points are all the middle of the range, which the kernels assume.

    vLLM registers biases for every model and drops them where the checkpoint has none.
    """
    return ExpertFormat(
        "GPTQ INT4",
        both("qweight", "scales", "bias"),
        int4_conversion(quant_config, "qweight", "scales", inputs_first=True),
        loader_only=both("qzeros"),
        optional=both("bias"),
        weight_type="uint4b8",
        group_size=None if quant_config.group_size == -1 else quant_config.group_size,
    )


def _convert_mxfp4(raw: Tensors, moe_config: Any) -> Tensors:
    names = [f"{projection}_{part}" for part in ("weight", "weight_scale", "bias") for projection in ("w13", "w2")]
    converted = borrow("convert_gpt_oss_weight_to_mxfp4_moe_kernel_format")(
        mxfp4_backend=borrow("Mxfp4MoeBackend").MARLIN,
        layer=layer_of(raw, moe_config),
        **{name: raw.get(name) for name in names},
    )
    kernel_names = (name.replace("weight_scale", "scale") for name in names)
    return {name: tensor for name, tensor in zip(kernel_names, converted, strict=True) if tensor is not None}


GPT_OSS_MXFP4 = ExpertFormat(
    "MXFP4", both("weight", "weight_scale", "bias"), _convert_mxfp4, weight_type="float4_e2m1f", group_size=32
)


def fp8(scale_name: str, block_size: list[int] | None, per_tensor: bool) -> ExpertFormat:
    """FP8 (e4m3) weights; activations stay 16-bit, so their scales are not read.

    Args:
        scale_name: of the quant method's scales.
        block_size: output and input features that share a scale; None for one a tensor or an output channel.
        per_tensor: whether gate, up and down have one scale each. vLLM's kernels take one for gate and up together, so
            each expert's pair is coded anew with the larger one, as vLLM does it.
    """

    def convert(raw: Tensors, moe_config: Any) -> Tensors:
        layer = layer_of(raw, moe_config)
        layer.orig_dtype = moe_config.in_dtype
        layer.weight_block_size = block_size
        w13, w13_scale = raw["w13_weight"], raw[f"w13_{scale_name}"]
        if per_tensor:
            w13, w13_scale = borrow("process_fp8_weight_tensor_strategy_moe")(
                w13.clone(),  # written in place
                w13_scale,
                layer.intermediate_size_per_partition,
                layer.num_experts,
                moe_config.is_act_and_mul,
            )
        w13, w2, w13_scale, w2_scale = borrow("convert_to_fp8_moe_kernel_format")(
            fp8_backend=borrow("Fp8MoeBackend").MARLIN,
            layer=layer,
            w13=w13,
            w2=raw["w2_weight"],
            w13_scale=w13_scale,
            w2_scale=raw[f"w2_{scale_name}"],
            w13_input_scale=None,
            w2_input_scale=None,
        )
        return {"w13_weight": w13, "w2_weight": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}

    return ExpertFormat(
        "FP8",
        both("weight", scale_name),
        convert,
        loader_only=both("input_scale"),
        weight_type="float8_e4m3fn",
        group_size=None if block_size is None else block_size[1],
    )
