"""What an engine certainly takes of each GPU, from vLLM's configuration and the headers of a local checkpoint.

A lower bound: what differs between models in ways that neither tells counts as nothing, and where the experts' own
size cannot be known there is no answer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint.tensor_folder import TensorFolder
from .checkpoint_sizes import ModelFacts, UnknownSizes, model_sizes
from .options import ExpertCacheOptions
from .sizing import BankSizes, DeviceDemand, KvLayer

KV_BYTES = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of a value in the KV cache, of the dtypes that store nothing but values; ``auto`` is the model's."""
MODALITIES = ("image", "video", "audio")


def device_demand(vllm_config: Any, options: ExpertCacheOptions, device_bytes: int) -> DeviceDemand:
    """What the server certainly takes of each GPU.

    Args:
        vllm_config: vLLM's finished configuration.
        options: of a cache that is on.
        device_bytes: all memory of a GPU.

    Raises:
        UnknownSizes: the settings or the checkpoint do not tell it.
        CheckpointError: the checkpoint's headers cannot be read.
    """
    _check_settings(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    sizes = model_sizes(TensorFolder(Path(model.model)).tensors, model_facts(model))
    ranks = parallel.tensor_parallel_size
    whole = parallel.enable_expert_parallel  # ranks get whole experts, else a part of each
    shapes = [replace(shape, width=shape.width // (1 if whole else ranks)) for shape in sizes.experts]
    top_k = max(1, model.get_num_experts_per_tok())
    banks = BankSizes(
        tuple(shape.record_bytes for shape in shapes),
        model.get_num_experts() // (ranks if whole else 1),
        top_k,
        device_bytes,
        options.staging_size,
    )
    step = vllm_config.scheduler_config.max_num_batched_tokens
    return DeviceDemand(
        dense=sizes.dense_bytes // ranks,
        workspace=max(shape.workspace_bytes(step, top_k) for shape in shapes),
        kv_cache=kv_cache_bytes(sizes.kv_layers, vllm_config),
        banks=banks,
    )


def _check_settings(vllm_config: Any) -> None:
    parallel, offload, model = vllm_config.parallel_config, vllm_config.offload_config, vllm_config.model_config
    if parallel.world_size != parallel.tensor_parallel_size or parallel.decode_context_parallel_size > 1:
        raise UnknownSizes("layers or sequences are dealt to several GPUs")
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        raise UnknownSizes("weights are offloaded to the host")
    if not Path(model.model).is_dir():
        raise UnknownSizes(f"{model.model} is no local folder")


def model_facts(model_config: Any) -> ModelFacts:
    """What sizing must know of vLLM's ``ModelConfig``."""
    text = model_config.hf_text_config
    tied = (
        getattr(model_config.hf_config, "tie_word_embeddings", False)
        or getattr(text, "tie_word_embeddings", False)
        # vLLM loads a head that may be a copy of the embedding, and drops it again if it is.
        or model_config.word_embeddings_untied_by_checkpoint
    )
    return ModelFacts(
        num_layers=model_config.get_total_num_hidden_layers(),
        num_experts=model_config.get_num_experts(),
        float_bytes=model_config.dtype.itemsize,
        tied_head=bool(tied),
        towers=_towers_are_loaded(model_config.multimodal_config),
        layer_types=tuple(getattr(text, "layer_types", None) or ()),
        sliding_window=model_config.get_sliding_window(),
        kv_shared_layers=getattr(text, "num_kv_shared_layers", None) or 0,
    )


def _towers_are_loaded(multimodal_config: Any) -> bool:
    """vLLM leaves out a tower whose every kind of input is limited to none."""
    return multimodal_config is not None and all(multimodal_config.get_limit_per_prompt(kind) for kind in MODALITIES)


def kv_cache_bytes(layers: tuple[KvLayer, ...], vllm_config: Any) -> int:
    """The KV cache that the user reserves, else what one sequence needs at the least; 0 where it is not known."""
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes and cache.num_gpu_blocks_override is None:
        return int(cache.kv_cache_memory_bytes)
    model = vllm_config.model_config
    if model.is_hybrid or model.use_mla or model.is_attention_free or model.is_encoder_decoder:
        return 0
    length, step = sequence_length(model), vllm_config.scheduler_config.max_num_batched_tokens
    elements = sum(layer.elements_of(length, step) for layer in layers)
    ranks: int = vllm_config.parallel_config.tensor_parallel_size
    return elements // ranks * _kv_value_bytes(vllm_config)


def sequence_length(model_config: Any) -> int:
    """Tokens that the KV cache must hold: one if vLLM is to find out the greatest length itself."""
    return 1 if model_config.original_max_model_len == -1 else int(model_config.max_model_len)


def _kv_value_bytes(vllm_config: Any) -> int:
    dtype = vllm_config.cache_config.cache_dtype
    if dtype != "auto":
        return KV_BYTES.get(dtype, 0)
    if getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None:
        return KV_BYTES["fp8"]
    return int(vllm_config.model_config.dtype.itemsize)
