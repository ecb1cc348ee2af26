"""What an engine takes of each GPU, from vLLM's configuration and the headers of a local checkpoint.

``device_demand`` is a lower bound: what differs between models in ways that neither tells counts as nothing.
``device_estimate`` is an upper one, and has no answer where such a thing matters. Neither has one where the experts'
own size cannot be known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .bank_sizes import BankSizes, ExpertShape
from .checkpoint_sizes import ModelFacts, ModelSizes, UnknownSizes, model_sizes
from .config_facts import least_kv_heads, rotary_elements
from .options import KV_FLOOR_SEQS, ExpertCacheOptions
from .served_checkpoint import model_folder, served_checkpoint
from .sizing import DenseModel, DeviceDemand, DeviceEstimate, KvLayer, Step, kv_floor_elements

KV_BYTES = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of a value in the KV cache, of the dtypes that store nothing but values; ``auto`` is the model's."""
MODALITIES = ("image", "video", "audio")
DRAFTS_FROM_TEXT = ("ngram", "ngram_gpu", "suffix")
"""vLLM's speculative decoding without weights of its own."""


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
    rank = _rank_sizes(vllm_config, options, device_bytes)
    step = vllm_config.scheduler_config.max_num_batched_tokens
    return DeviceDemand(
        dense=rank.model.dense_bytes // vllm_config.parallel_config.tensor_parallel_size,
        workspace=max(shape.workspace_bytes(step, rank.banks.top_k) for shape in rank.shapes),
        kv_cache=kv_cache_bytes(rank.model.kv_layers, vllm_config),
        banks=rank.banks,
    )


def device_estimate(vllm_config: Any, options: ExpertCacheOptions, device_bytes: int) -> DeviceEstimate:
    """What the server takes of each GPU at most, with a KV cache of the size that the user reserves, or of the floor.

    Args:
        vllm_config: vLLM's finished configuration.
        options: of a cache that is on.
        device_bytes: all memory of a GPU.

    Raises:
        UnknownSizes: the settings or the checkpoint do not tell it.
        CheckpointError: the checkpoint's headers cannot be read.
    """
    rank = _rank_sizes(vllm_config, options, device_bytes)
    if _towers_may_be_loaded(vllm_config.model_config.multimodal_config):
        raise UnknownSizes(
            "what encoders of images and sound need while they run is not known; serve without them "
            "(--language-model-only)"
        )
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method not in DRAFTS_FROM_TEXT:
        raise UnknownSizes(f"what the draft of speculative decoding ({drafts.method}) takes is not known")
    dense = DenseModel(
        bytes=rank.model.dense_bytes // vllm_config.parallel_config.tensor_parallel_size,
        whole_bytes=rank.model.dense_bytes,
        hidden=rank.facts.hidden,
        row_elements=rank.model.row_elements,
        vocabulary=rank.facts.vocabulary,
        rotary_elements=rank.facts.rotary_elements,
    )
    kv_cache = _kv_floor_bytes(rank, vllm_config, options)
    return DeviceEstimate.of(dense, rank.shapes, _step(vllm_config), kv_cache, rank.banks)


@dataclass(frozen=True)
class _RankSizes:
    """A model and what one rank has of its experts."""

    model: ModelSizes
    facts: ModelFacts
    shapes: list[ExpertShape]
    banks: BankSizes


def _rank_sizes(vllm_config: Any, options: ExpertCacheOptions, device_bytes: int) -> _RankSizes:
    _check_settings(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    facts = model_facts(model)
    folder = model_folder(model.model, model.revision)
    if folder is None:
        raise UnknownSizes(f"{model.model} is no local folder, and the hub's cache does not hold it")
    sizes = model_sizes(served_checkpoint(folder).tensors, facts)
    ranks = parallel.tensor_parallel_size
    whole = parallel.enable_expert_parallel  # ranks get whole experts, else a part of each
    shapes = [replace(shape, width=shape.width // (1 if whole else ranks)) for shape in sizes.experts]
    banks = BankSizes(
        tuple(shape.record_bytes for shape in shapes),
        local_experts(vllm_config),
        max(1, model.get_num_experts_per_tok()),
        device_bytes,
        options.staging_size,
    )
    return _RankSizes(sizes, facts, shapes, banks)


def local_experts(vllm_config: Any) -> int:
    """Experts of a layer on one rank, on the one with fewest."""
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
    return int(vllm_config.model_config.get_num_experts() // ranks)


def _step(vllm_config: Any) -> Step:
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    mode = "NONE" if vllm_config.model_config.enforce_eager else compilation.cudagraph_mode.name
    kinds = {"NONE": 0, "FULL_AND_PIECEWISE": 2}.get(mode, 1)
    return Step(
        tokens=scheduler.max_num_batched_tokens,
        sequences=min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
        graphs=kinds * len(compilation.cudagraph_capture_sizes or ()),
        v2_runner=vllm_config.use_v2_model_runner,
    )


def _kv_floor_bytes(rank: _RankSizes, vllm_config: Any, options: ExpertCacheOptions) -> int:
    reserved = _reserved_kv_cache(vllm_config)
    if reserved:
        return reserved
    layers, value_bytes = rank.model.kv_layers, _kv_value_bytes(vllm_config)
    if not _every_layer_attends(vllm_config.model_config) or len(layers) != rank.facts.kv_layers or not value_bytes:
        raise UnknownSizes("what the KV cache takes of this model is not known; reserve it (--kv-cache-memory-bytes)")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        layers = tuple(replace(layer, window=None) for layer in layers)
    length = sequence_length(vllm_config.model_config)
    elements = kv_floor_elements(layers, length, vllm_config.max_in_flight_tokens)
    # Ranks beyond the heads of keys and values hold copies of them.
    shared = min(vllm_config.parallel_config.tensor_parallel_size, rank.facts.kv_heads)
    sequences = options.kv_floor_seqs or KV_FLOOR_SEQS
    return int(-(-elements // shared) * value_bytes * sequences)


def _reserved_kv_cache(vllm_config: Any) -> int:
    """Bytes that the user reserves, 0 if vLLM takes what is left."""
    cache = vllm_config.cache_config
    return int(cache.kv_cache_memory_bytes or 0) if cache.num_gpu_blocks_override is None else 0


def _every_layer_attends(model: Any) -> bool:
    return not (model.is_hybrid or model.use_mla or model.is_attention_free or model.is_encoder_decoder)


def _check_settings(vllm_config: Any) -> None:
    parallel, offload = vllm_config.parallel_config, vllm_config.offload_config
    if parallel.world_size != parallel.tensor_parallel_size or parallel.decode_context_parallel_size > 1:
        raise UnknownSizes("layers or sequences are dealt to several GPUs")
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        raise UnknownSizes("weights are offloaded to the host")


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
        hidden=model_config.get_hidden_size(),
        vocabulary=model_config.get_vocab_size(),
        rotary_elements=rotary_elements(text, model_config.max_model_len),
        kv_heads=least_kv_heads(text),
    )


def _towers_are_loaded(multimodal_config: Any) -> bool:
    """Whether every tower is: vLLM leaves one out if each kind of its input is limited to none."""
    return multimodal_config is not None and all(multimodal_config.get_limit_per_prompt(kind) for kind in MODALITIES)


def _towers_may_be_loaded(multimodal_config: Any) -> bool:
    """Whether some tower may be: which kinds of input are one tower's, a model knows."""
    return multimodal_config is not None and any(multimodal_config.get_limit_per_prompt(kind) for kind in MODALITIES)


def kv_cache_bytes(layers: tuple[KvLayer, ...], vllm_config: Any) -> int:
    """The KV cache that the user reserves, else what one sequence needs at the least; 0 where it is not known."""
    reserved, model = _reserved_kv_cache(vllm_config), vllm_config.model_config
    if reserved or not _every_layer_attends(model):
        return reserved
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
