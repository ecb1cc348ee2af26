"""What is refused before any weight is loaded: each refusal is one line with thing, value and remedy."""

from __future__ import annotations

import re
from multiprocessing import parent_process
from typing import Any

from .checkpoint_files import check_checkpoint_files
from .errors import ExpertCacheError
from .options import AUTO, ExpertCacheOptions, flag
from .record_cache import check_folder
from .trace_recorder import check_trace_file
from .vllm_compat import borrow
from .warm_start import WarmStart

STOCK_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
EXPERT_NAME_SEGMENTS = frozenset({"experts", "routed_experts"})
EXPERT_WEIGHT = re.compile(r"w(13|2)_")
"""How the names of vLLM's parameters of experts begin."""


def check_engine_config(vllm_config: Any, options: ExpertCacheOptions) -> None:
    """Check a finished vLLM configuration against a cache that is on.

    Raises:
        ExpertCacheError: the model or another setting cannot be combined with the expert cache.
    """
    _check_model(vllm_config.model_config, vllm_config.parallel_config, options)
    for reason in _refusals(vllm_config):
        raise ExpertCacheError(f"{reason}, or remove {flag('cache_size')}")
    if options.kv_floor_seqs is not None and vllm_config.cache_config.kv_cache_memory_bytes:
        raise ExpertCacheError(
            f"{flag('kv_floor_seqs')} {options.kv_floor_seqs} has no meaning beside --kv-cache-memory-bytes "
            f"{vllm_config.cache_config.kv_cache_memory_bytes}, which sizes the KV cache: remove one of them"
        )
    if options.profile is not None and options.trace is not None:
        raise ExpertCacheError(
            f"{flag('trace')} {options.trace} begins with empty slots, {flag('profile')} {options.profile} fills them: "
            "remove one of them"
        )
    if options.store_cache is not None and vllm_config.load_config.load_format == "dummy":
        raise ExpertCacheError(
            f"{flag('store_cache')} {options.store_cache}: --load-format dummy makes weights up, which are not to be "
            "kept: remove one of them"
        )
    check_checkpoint_files(vllm_config.model_config.model)
    _check_places_of_files(vllm_config, options)


def _check_places_of_files(vllm_config: Any, options: ExpertCacheOptions) -> None:
    """What workers would refuse too, but from among the tracebacks of the processes that end with it."""
    if parent_process() is not None or vllm_config.parallel_config.node_rank:
        return  # a part of a server that has been checked, and may record already; or another machine has the files
    if options.trace is not None:
        for rank in range(vllm_config.parallel_config.world_size):
            check_trace_file(options.trace, rank, vllm_config)
    if options.store_cache is not None:
        check_folder(options.store_cache)
    if options.profile is not None:
        WarmStart(options.profile, vllm_config, 0)


def _check_model(model_config: Any, parallel_config: Any, options: ExpertCacheOptions) -> None:
    experts = model_config.get_num_experts()
    if experts == 0:
        raise ExpertCacheError(
            f"{model_config.model} has no mixture-of-experts layers, so there is nothing to cache; "
            f"remove {flag('cache_size')}"
        )
    if options.cache_size != AUTO and options.cache_size > experts:
        raise ExpertCacheError(
            f"{flag('cache_size')} {options.cache_size} is more than the model's {experts} experts per layer; "
            f"give a number from 1 to {experts}"
        )


def _refusals(vllm_config: Any) -> list[str]:
    """Settings that do not go with the expert cache, each as a reason with its remedy."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    found = []
    if vllm_config.lora_config is not None:
        found.append("LoRA rebuilds the expert kernels and does not go with the expert cache: remove --enable-lora")
    if parallel.enable_eplb:
        found.append("expert load balancing moves experts that the cache owns: remove --enable-eplb")
    if parallel.enable_elastic_ep:
        found.append("elastic expert parallelism moves experts that the cache owns: remove --enable-elastic-ep")
    if parallel.enable_dbo or parallel.ubatch_size > 1:
        found.append("two micro-batches cannot share one slot table: remove --enable-dbo and --ubatch-size")
    if parallel.data_parallel_size > 1:
        found.append(
            f"data parallelism is not supported by this version of the expert cache: set --data-parallel-size "
            f"{parallel.data_parallel_size} to 1"
        )
    if parallel.prefill_context_parallel_size > 1:
        found.append(
            f"--prefill-context-parallel-size {parallel.prefill_context_parallel_size} gives layers more tokens than "
            "the expert cache has room for: set it to 1"
        )
    if model.enable_sleep_mode:
        found.append("sleep mode discards expert slots behind the cache's back: remove --enable-sleep-mode")
    if vllm_config.weight_transfer_config is not None:
        found.append("weights cannot be replaced in a running expert cache: remove --weight-transfer-config")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        found.append(
            "--kv-sharing-fast-prefill gives later layers fewer tokens than earlier ones, which prefetch experts for "
            "them: remove it"
        )
    found.extend(_offload_refusals(vllm_config.offload_config))
    if vllm_config.kernel_config.moe_backend != "auto":
        found.append(
            f"--moe-backend {vllm_config.kernel_config.moe_backend} cannot be honoured, the expert cache computes "
            "experts itself: leave it at auto"
        )
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.moe_backend not in (None, "auto"):
        found.append(
            f"--speculative-config's moe_backend {drafts.moe_backend} cannot be honoured, the expert cache computes "
            "experts itself: leave it out"
        )
    platform = borrow("current_platform")
    if not platform.is_cpu() and not platform.is_cuda():
        found.append(f"the expert cache runs on CPU and CUDA, not on {platform.device_name}: use another machine")
    if platform.is_cuda() and not borrow("VLLM_MOE_SKIP_PADDING"):
        found.append(
            "VLLM_MOE_SKIP_PADDING=0 leaves vLLM's mask of padding rows out of date, and rows that only pad a captured "
            "batch would load experts: unset it"
        )
    if parallel.worker_cls not in (*STOCK_WORKERS, "vllm_hlwq.worker.ExpertCacheWorker"):
        found.append(f"--worker-cls {parallel.worker_cls} replaces the worker that the expert cache extends: remove it")
    return found


def _offload_refusals(offload: Any) -> list[str]:
    def takes_experts(names: set[str]) -> bool:
        """Blocks around experts, like ``mlp``, are named differently by models: each layer looks for its own."""
        segments = {segment for name in names for segment in name.split(".")}
        return not names or bool(EXPERT_NAME_SEGMENTS & segments) or any(map(EXPERT_WEIGHT.match, segments))

    found = []
    if offload.uva.cpu_offload_gb > 0 and takes_experts(offload.uva.cpu_offload_params):
        found.append(
            f"--cpu-offload-gb {offload.uva.cpu_offload_gb} would take experts, which the cache already keeps on the "
            "host: name other weights with --cpu-offload-params"
        )
    if offload.prefetch.offload_group_size > 0 and takes_experts(offload.prefetch.offload_params):
        found.append(
            f"--offload-group-size {offload.prefetch.offload_group_size} would take experts, which the cache already "
            "keeps on the host: name other weights with --offload-params"
        )
    return found
