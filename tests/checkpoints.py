"""Small random checkpoints with the layer structure of the real models, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

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


def gemma4_config() -> PreTrainedConfig:
    """Sliding and global attention, a dense MLP beside the experts, expert width no multiple of 128."""
    return Gemma4TextConfig(
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


def qwen3_moe_config() -> PreTrainedConfig:
    """SiLU experts with renormalised top-k weights."""
    return Qwen3MoeConfig(
        **COMMON,
        intermediate_size=128,
        num_key_value_heads=2,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def dense_config() -> PreTrainedConfig:
    """No experts at all."""
    return Qwen3Config(**COMMON, intermediate_size=128, num_key_value_heads=2)


def write(config: PreTrainedConfig, out: Path, seed: int = 0) -> Path:
    """Write a random BF16 checkpoint."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    return out
