"""Which backend computes a layer's experts: one of vLLM's kernels on CUDA, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

from .device_backend import DeviceBackend, common_obstacle
from .errors import ExpertCacheError
from .expert_formats import ExpertFormat
from .marlin_moe import MarlinBackend, device_obstacle
from .reference_backend import ReferenceBackend
from .triton_moe import TritonBackend
from .vllm_compat import borrow


def choose_backend(prefix: str, expert_format: ExpertFormat, moe_config: Any) -> ReferenceBackend | DeviceBackend:
    """Make the backend of a layer.

    Args:
        prefix: the layer's name, for messages.
        expert_format: of its experts.
        moe_config: vLLM's configuration of it, with sizes as the kernels need them.

    Raises:
        ExpertCacheError: no backend on this machine computes such experts.
    """
    if not borrow("current_platform").is_cuda():
        return _reference(prefix, expert_format, moe_config)
    if expert_format.weight_type is None:
        obstacle = common_obstacle(moe_config)
        if obstacle is not None:
            raise ExpertCacheError(f"{prefix}: vLLM's Triton kernel cannot compute these experts: {obstacle}")
        return TritonBackend(expert_format, moe_config)
    obstacle = device_obstacle(expert_format, moe_config)
    if obstacle is not None:
        raise ExpertCacheError(f"{prefix}: vLLM's Marlin kernels cannot compute these experts: {obstacle}")
    return MarlinBackend(expert_format, moe_config)


def _reference(prefix: str, expert_format: ExpertFormat, moe_config: Any) -> ReferenceBackend:
    if not expert_format.on_reference:
        raise ExpertCacheError(
            f"{prefix}: {expert_format.name} experts run on vLLM's Marlin kernels, which need CUDA; on this machine "
            "serve a BF16, FP16 or compressed-tensors INT4 checkpoint (hlwq export)"
        )
    gate_limits = (moe_config.swiglu_limit, moe_config.swiglu_alpha, moe_config.swiglu_beta)
    if any(value is not None for value in gate_limits) and moe_config.activation.value != "swigluoai":
        raise ExpertCacheError(
            f"{prefix}: activation {moe_config.activation.value!r} with swiglu limit, alpha or beta {gate_limits} "
            "is not known to the reference backend; serve this model without the expert cache"
        )
    return ReferenceBackend(moe_config.activation.value, expert_format.weight_quant)
