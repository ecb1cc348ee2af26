"""Small random checkpoints with the layer structure of the real models, written by transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from vllm_hlwq.checkpoint.dequantize import dequantize
from vllm_hlwq.checkpoint.int4_source import Int4Source
from vllm_hlwq.checkpoint.metadata import HASHES

NUM_EXPERTS = 16
TOP_K = 4

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    # Larger than the usual 0.02: with few and narrow layers that would leave logits nearly flat.
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def gemma4_config(**changes: Any) -> PreTrainedConfig:
    """Sliding and global attention, a dense MLP beside the experts, expert width no multiple of 128."""
    settings: dict[str, Any] = dict(
        **COMMON,
        intermediate_size=128,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        global_head_dim=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=NUM_EXPERTS,
        top_k_experts=TOP_K,
        moe_intermediate_size=192,
        tie_word_embeddings=True,
    )
    return Gemma4TextConfig(**settings | changes)


def qwen3_moe_config(**changes: Any) -> PreTrainedConfig:
    """SiLU experts with renormalised top-k weights."""
    settings: dict[str, Any] = dict(
        **COMMON,
        intermediate_size=128,
        num_key_value_heads=2,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    return Qwen3MoeConfig(**settings | changes)


def qwen3_moe_wide_config() -> PreTrainedConfig:
    """Expert matrices of several blocks of 128 either way."""
    return qwen3_moe_config(hidden_size=256, moe_intermediate_size=384)


FEW: dict[str, Any] = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
"""Of models that are only converted: four experts, two a token."""


def mixtral_config() -> PreTrainedConfig:
    """Experts under w1, w2, w3."""
    return MixtralConfig(**COMMON, **FEW, intermediate_size=128, num_local_experts=4)


def olmoe_config() -> PreTrainedConfig:
    """Norms over all heads; an expert width that admits no group of 128."""
    return OlmoeConfig(**COMMON, **FEW, intermediate_size=64, num_experts=4)


def glm4_moe_config() -> PreTrainedConfig:
    """GLM-4.5: a dense first layer, shared experts, and a correction of the router's choice."""
    return Glm4MoeConfig(
        **COMMON, **FEW, intermediate_size=256, n_routed_experts=4, moe_intermediate_size=64, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    )  # fmt: skip


def gpt_oss_config(**changes: Any) -> PreTrainedConfig:
    """Stacks with the input first, gate and up alternating, and biases."""
    settings: dict[str, Any] = dict(
        **COMMON, **FEW, intermediate_size=64, num_local_experts=4, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return GptOssConfig(**settings | changes)


def gpt_oss_served_config() -> PreTrainedConfig:
    """The same with as many experts as the other models that are served."""
    return gpt_oss_config(num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)


def gemma4_multimodal_config() -> PreTrainedConfig:
    """As the real ones are: a vision tower with its projector, and global attention whose keys serve as values."""
    text = gemma4_config(num_experts=4, top_k_experts=2, attention_k_eq_v=True)
    vision = Gemma4VisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, position_embedding_size=64,
    )  # fmt: skip
    names = ("image_token_id", "video_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "boa_token_id",
             "eoa_token_index")  # fmt: skip
    tokens = {name: 500 + index for index, name in enumerate(names)}
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)


def dense_config() -> PreTrainedConfig:
    """No experts at all."""
    return Qwen3Config(**COMMON, intermediate_size=128, num_key_value_heads=2)


def llama_config() -> PreTrainedConfig:
    """Dense, with an output head of its own; a hidden size that is no multiple of 128."""
    return LlamaConfig(**COMMON | {"hidden_size": 160}, intermediate_size=192, num_key_value_heads=2)


def write(config: PreTrainedConfig, out: Path, seed: int = 0, varied: bool = False, **save: Any) -> Path:
    """Write a random BF16 checkpoint.

    Args:
        config: of the model.
        out: folder.
        seed: of the weights.
        varied: whether what models start with constants, like norms, is random too, so that each tensor is unlike
            every other.
        save: further arguments of ``save_pretrained``.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel
    if isinstance(config, Gemma4Config):
        model = Gemma4ForConditionalGeneration(config).bfloat16()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if varied:
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
                start = 0.0 if "bias" in name else 1.0
                tensor.copy_(start + 0.1 * torch.randn(tensor.shape))
    model.save_pretrained(out, **save)
    return out


def write_glm4_moe_with_mtp(out: Path) -> Path:
    """GLM-4.5 with a layer for multi-token prediction, which transformers neither makes nor writes.

    That layer sees the embedding of the token before as the model's own layers do, and is a copy of the last of them.
    What layers add to the embedding is small, so that its predictions are often the model's.
    """
    config = Glm4MoeConfig(
        **COMMON | {"vocab_size": 2048}, num_key_value_heads=2, num_experts_per_tok=TOP_K, intermediate_size=256,
        n_routed_experts=NUM_EXPERTS, moe_intermediate_size=64, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1,
    )  # fmt: skip
    write(config, out)
    weights = load_file(out / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(0.02)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(0, 0.2, NUM_EXPERTS))  # or the router chooses as if there was none
    last, drafting, hidden = "model.layers.1.", "model.layers.2.", config.hidden_size
    weights |= {n.replace(last, drafting): t.clone() for n, t in weights.items() if n.startswith(last)}
    both = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1)
    weights |= {
        f"{drafting}{name}": tensor.bfloat16()
        for name, tensor in {
            "eh_proj.weight": both,
            "enorm.weight": torch.full((hidden,), config.initializer_range),
            "hnorm.weight": torch.ones(hidden),
            "shared_head.norm.weight": weights["model.norm.weight"].clone(),
            "shared_head.head.weight": weights["lm_head.weight"].clone(),
            "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        }.items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    return out


def decode_to_float32(int4: Path, out: Path) -> Path:
    """Decode an INT4 checkpoint without rounding code times scale to 16 bit."""
    wide = out.with_name(f"{out.name}-wide")
    shutil.copytree(int4, wide, ignore=shutil.ignore_patterns(HASHES))
    for path in wide.glob("*.safetensors"):
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    dequantize(Int4Source(wide), out)
    return out
