"""Does the cache size that the user asks for leave room for a KV cache? Asked on CUDA before any weight is read.

Refused is only what certainly does not fit: activations outside the experts, CUDA graphs and what the headers of the
checkpoint do not tell are not counted, and where the sizes cannot be known nothing is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checkpoint_sizes import UnknownSizes
from .engine_sizes import device_demand, sequence_length
from .errors import CheckpointError, ExpertCacheError
from .options import ExpertCacheOptions, flag
from .sizing import DeviceDemand
from .vllm_compat import borrow

logger = borrow("init_logger")("vllm.expert_cache")


@dataclass(frozen=True)
class Device:
    """Memory of one GPU in bytes, with no weight of this server on it.

    total: all of it.
    free: what is not taken.
    granted: what ``--gpu-memory-utilization`` lets this server take.
    """

    total: int
    free: int
    granted: int


@dataclass(frozen=True)
class Limit:
    """What a server may take of a GPU.

    bytes: all of it.
    words: who sets the limit.
    kv_cache: what the KV cache is for.
    remedy: what else than fewer slots helps.
    """

    bytes: int
    words: str
    kv_cache: str
    remedy: str


def check_memory(vllm_config: Any, options: ExpertCacheOptions, device: Device) -> None:
    """Refuse a cache size beside which no KV cache fits; where that cannot be told, say so in the log.

    Args:
        vllm_config: vLLM's finished configuration.
        options: of a cache that is on.
        device: this worker's.

    Raises:
        ExpertCacheError: what is certainly taken is more than may be.
    """
    try:
        demand = device_demand(vllm_config, options, device.total)
    except (UnknownSizes, CheckpointError) as reason:
        logger.info(
            "Expert cache: whether %s %d leaves room for a KV cache will show after loading only: %s",
            flag("cache_size"),
            options.slots,
            reason,
        )
        return
    problem = shortage(demand, options.slots, limit_of(vllm_config, device))
    if problem is not None:
        raise ExpertCacheError(problem)


def shortage(demand: DeviceDemand, num_slots: int, limit: Limit) -> str | None:
    """Say in one line why a cache of ``num_slots`` cannot fit, None if it may.

    More slots than a rank has experts are passed over: the layer refuses them.
    """
    banks = demand.banks
    if num_slots > banks.num_experts or demand.bytes(num_slots) <= limit.bytes:
        return None
    most = demand.most_slots(limit.bytes)
    remedy = f"the largest number that can fit is {most}"
    if not most:
        remedy = f"the model does not fit at all, not even with 1: {limit.remedy}"
    kv_cache = f"{demand.kv_cache} of {limit.kv_cache}" if demand.kv_cache else "a KV cache of unknown size"
    return (
        f"{flag('cache_size')} {num_slots}: {demand.dense} bytes of weights outside the experts, "
        f"{banks.slot_bytes(num_slots)} of {num_slots} slots in each of {len(banks.records)} layers, "
        f"{banks.staging_bytes(num_slots)} of staging, {demand.workspace} of working memory and {kv_cache} "
        f"are {demand.bytes(num_slots)} bytes on each GPU, {limit.words}; {remedy}"
    )


def limit_of(vllm_config: Any, device: Device) -> Limit:
    """What vLLM lets the server take; who sizes the KV cache by hand may take all that is free."""
    cache = vllm_config.cache_config
    free = f"where {device.free} are free"
    sequence = f"KV cache for one sequence of {sequence_length(vllm_config.model_config)} tokens"
    shorten = "lower --max-model-len or --max-num-batched-tokens"
    if cache.num_gpu_blocks_override is not None:
        return Limit(device.free, free, sequence, shorten)
    if cache.kv_cache_memory_bytes:
        return Limit(device.free, free, "KV cache by --kv-cache-memory-bytes", "lower --kv-cache-memory-bytes")
    granted = f"where --gpu-memory-utilization {cache.gpu_memory_utilization} grants {device.granted}"
    return Limit(device.granted, granted, sequence, f"raise --gpu-memory-utilization, or {shorten}")
