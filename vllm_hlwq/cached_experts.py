"""The seam: vLLM's interface of experts, by which its kernel frame hands over final expert ids and weights.

One class for each kind of cache. With data parallelism ids change between the quant method and here, so a step is
planned here and not earlier.
"""

from __future__ import annotations

from typing import Any

import torch

from .device_expert_cache import DeviceExpertCache
from .vllm_compat import borrow


@torch.library.custom_op("vllm_hlwq::expert_cache_step", mutates_args=("output",))
def expert_cache_step(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights_on_input: bool,
    layer_name: str,
) -> None:
    """Run a step of the named layer of the engine whose forward context is active.

    An operator of its own because the step reads ids on the host and changes the cache: torch.compile, which traces
    the layer on CPU, must not look inside.
    """
    layer = borrow("get_forward_context")().no_compile_layers[layer_name].routed_experts
    expert_map = layer.expert_map
    local_ids = topk_ids
    if expert_map is not None:
        known = (topk_ids >= 0) & (topk_ids < len(expert_map))
        local_ids = torch.where(known, expert_map[topk_ids.clamp(0, len(expert_map) - 1).long()], -1)
    layer.expert_cache.step(hidden_states, None if weights_on_input else topk_weights, local_ids, output)


@expert_cache_step.register_fake
def _(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights_on_input: bool,
    layer_name: str,
) -> None:
    return None


class CachedExperts(borrow("FusedMoEExpertsModular")):  # type: ignore[misc]
    """vLLM's experts interface over a layer's cache; data-parallel ranks have exchanged their tokens before it."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        # Made here because torch.compile traces what runs in a step and cannot trace an import.
        self._reduce = borrow("TopKWeightAndReduceNoOP")()

    @staticmethod
    def activation_format() -> Any:
        return borrow("FusedMoEActivationFormat").Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """Sizes from the configuration: the weights here are the slots', not the experts'."""
        width = self.moe_config.intermediate_size_per_partition
        return self.moe_config.num_experts, a1.shape[0], 2 * width, a1.shape[-1], topk_ids.shape[1]

    def finalize_weight_and_reduce_impl(self) -> Any:
        return self._reduce

    # What vLLM's kernel oracle would ask; it is never asked for these experts.
    _supports_current_device = staticmethod(lambda: True)
    _supports_no_act_and_mul = staticmethod(lambda: True)
    _supports_quant_scheme = staticmethod(lambda *_: True)
    _supports_activation = staticmethod(lambda *_: True)
    _supports_parallel_config = staticmethod(lambda *_: True)


class HostCachedExperts(CachedExperts):
    """Steps of a ``HostExpertCache``, found by its layer's name, because torch.compile traces this class on a CPU."""

    def __init__(self, moe_config: Any, quant_config: Any, layer_name: str) -> None:
        super().__init__(moe_config, quant_config)
        self.layer_name = layer_name

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        """No shared workspace, an output of [M, K]; the reference backend makes its own temporary memory."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        **_: Any,
    ) -> None:
        torch.ops.vllm_hlwq.expert_cache_step(
            output, hidden_states, topk_weights, topk_ids, apply_router_weight_on_input, self.layer_name
        )


class DeviceCachedExperts(CachedExperts):
    """Steps of a ``DeviceExpertCache``; on CUDA vLLM's layer is an opaque operator already, so nothing traces this."""

    def __init__(self, moe_config: Any, quant_config: Any, cache: DeviceExpertCache) -> None:
        super().__init__(moe_config, quant_config)
        self.cache = cache

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        """Working memory from vLLM's workspace, which all layers share, and an output of [M, K]."""
        return (*self.cache.backend.workspace_shapes(M, K, topk), (M, K))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        apply_router_weight_on_input: bool,
        **_: Any,
    ) -> None:
        context = borrow("get_forward_context")()
        self.cache.step(
            hidden_states,
            topk_weights,
            topk_ids,
            output,
            self.cache.backend.buffers(workspace13, workspace2, topk_ids.numel()),
            apply_router_weight_on_input,
            _padding_rows(context, len(topk_ids)),
            expert_map,
            context,
        )


def _padding_rows(context: Any, tokens: int) -> torch.Tensor | None:
    """vLLM's mask of rows that only pad the batch to a captured size; None where it keeps none for these rows."""
    mask = context.is_padding
    return None if mask is None or len(mask) < tokens else mask[:tokens]
