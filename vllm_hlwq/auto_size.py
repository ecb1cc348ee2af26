"""``--moe-expert-cache-size auto`` to a number, in each worker, before its model is built.

Each worker estimates for its own GPU, and all take the least number, by vLLM's own process group: slots are part of
captured graphs and of what ranks compute together, so that they should not differ. On a CPU host and device are one
memory, in which all experts lie anyway, so all are resident.
"""

from __future__ import annotations

from typing import Any

import torch

from .checkpoint_sizes import UnknownSizes
from .engine_sizes import device_demand, device_estimate, local_experts, sequence_length
from .errors import CheckpointError, ExpertCacheError
from .memory_check import Device, Limit, limit_of, logger, shortage
from .options import AUTO, KV_FLOOR_SEQS, ExpertCacheOptions, config_key, flag
from .sizing import DeviceEstimate
from .vllm_compat import borrow


def settle_cache_size(vllm_config: Any, options: ExpertCacheOptions, device: Device | None, log: bool = True) -> None:
    """Decide on a number of slots and write it into the configuration in the place of ``auto``.

    Args:
        vllm_config: this worker's, finished; its ``additional_config`` is replaced.
        options: with the cache size ``auto``.
        device: this worker's GPU, None on a CPU.
        log: whether to say the arithmetic in the log.

    Raises:
        ExpertCacheError: sizes are not known, or not even one slot fits, here or on another GPU.
    """
    slots, reason = _on_cpu(vllm_config) if device is None else _on_gpu(vllm_config, options, device)
    least = least_of_ranks(slots)
    if slots == 0:
        raise ExpertCacheError(reason)
    if least == 0:
        raise ExpertCacheError(f"{flag('cache_size')} {AUTO}: no number fits the GPU of another worker, which says why")
    if log:
        others = ", for which the GPU with the least room has room" if least < slots else ""
        logger.info("Expert cache: %s %s is %d%s: %s", flag("cache_size"), AUTO, least, others, reason)
    vllm_config.additional_config = {**vllm_config.additional_config, config_key("cache_size"): least}


def least_of_ranks(slots: int) -> int:
    """The least number that any worker of this engine came to; all of them have to call this."""
    group = borrow("get_world_group")()
    if group.world_size == 1:
        return slots
    least = torch.tensor([slots])
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(least)


def _on_cpu(vllm_config: Any) -> tuple[int, str]:
    experts = local_experts(vllm_config)
    return experts, f"on a CPU host and device are one memory, so all {experts} experts of a layer are resident"


def _on_gpu(vllm_config: Any, options: ExpertCacheOptions, device: Device) -> tuple[int, str]:
    """Slots and the arithmetic that led to them, or 0 and why there is no number."""
    try:
        estimate = device_estimate(vllm_config, options, device.total)
        demand = device_demand(vllm_config, options, device.total)
    except (UnknownSizes, CheckpointError) as error:
        return 0, f"{flag('cache_size')} {AUTO}: {error}; give a number"
    limit = limit_of(vllm_config, device)
    slots = estimate.most_slots(limit.bytes)
    terms = arithmetic(estimate, kv_cache_words(vllm_config, options, limit))
    if slots:
        return slots, f"{terms} of {limit.bytes} bytes, {limit.words}, leave {what_fits(estimate, slots, limit)}"
    # What certainly does not fit is said as for a number.
    problem = shortage(demand, 1, limit)
    if problem is None:
        problem = (
            f"{flag('cache_size')} {AUTO}: not even 1 fits surely: {terms} and {estimate.banks.bytes(1)} of 1 slot in "
            f"each of {len(estimate.banks.records)} layers and staging are {estimate.bytes(1)} bytes on each GPU, "
            f"{limit.words}; lower --max-num-seqs, --max-num-batched-tokens, --max-model-len or "
            f"{flag('kv_floor_seqs')}, or try a number, {demand.most_slots(limit.bytes)} at most"
        )
    return 0, problem


def arithmetic(estimate: DeviceEstimate, kv_cache: str) -> str:
    """What is taken beside the banks, part by part."""
    return (
        f"{estimate.dense} for weights outside the experts, {estimate.workspace} for the experts' working memory, "
        f"{estimate.activations} for other activations, {estimate.sampler} for the sampler, {estimate.graphs} for CUDA "
        f"graphs, {estimate.kv_cache} for {kv_cache} and a margin of {estimate.margin}"
    )


def kv_cache_words(vllm_config: Any, options: ExpertCacheOptions, limit: Limit) -> str:
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes and cache.num_gpu_blocks_override is None:
        return limit.kv_cache
    length = sequence_length(vllm_config.model_config)
    return f"the KV cache of {options.kv_floor_seqs or KV_FLOOR_SEQS} sequences of {length} tokens"


def what_fits(estimate: DeviceEstimate, slots: int, limit: Limit) -> str:
    banks = estimate.banks
    room = f"{limit.bytes - estimate.beside_banks} for slots and staging"
    if slots == banks.num_experts:
        return f"{room}, and all {slots} experts of {len(banks.records)} layers take {banks.bytes(slots)}"
    return (
        f"{room}: {slots} slots in each of {len(banks.records)} layers take {banks.slot_bytes(slots)}, staging "
        f"{banks.staging_bytes(slots)}"
    )
