"""Random checkpoints have the real models' shapes to the number, and vLLM serves them through the expert cache."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_checkpoint import SHAPES, ShapeSource, byte_tokenizer, make_checkpoint, plan_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from vllm_hlwq.errors import CheckpointError
from vllm_hlwq.int4_checkpoint import dequantize_weight, int4_arguments

GEMMA, QWEN = "gemma-4-26b-a4b", "qwen3-30b-a3b"

NUMBERS = {
    GEMMA: {
        "num_hidden_layers": 30, "hidden_size": 2816, "intermediate_size": 2112, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "vocab_size": 262_144, "sliding_window": 1024, "tie_word_embeddings": True,
        "attention_k_eq_v": True,
    },
    QWEN: {
        "num_hidden_layers": 48, "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151_936, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip
SHAPES_OF = {
    GEMMA: {
        "model.embed_tokens.weight": (262_144, 2816),
        "model.layers.0.self_attn.q_proj.weight": (16 * 256, 2816),
        "model.layers.0.self_attn.v_proj.weight": (8 * 256, 2816),
        "model.layers.5.self_attn.q_proj.weight": (16 * 512, 2816),
        "model.layers.5.self_attn.k_proj.weight": (2 * 512, 2816),
        "model.layers.29.mlp.down_proj.weight": (2816, 2112),
        "model.layers.29.router.proj.weight": (128, 2816),
        "model.layers.29.experts.127.gate_proj.weight_packed": (704, 2816 // 8),
        "model.layers.29.experts.127.down_proj.weight_scale": (2816, 704 // 64),
    },
    QWEN: {
        "lm_head.weight": (151_936, 2048),
        "model.layers.0.self_attn.q_proj.weight": (32 * 128, 2048),
        "model.layers.47.self_attn.k_proj.weight": (4 * 128, 2048),
        "model.layers.47.mlp.gate.weight": (128, 2048),
        "model.layers.47.mlp.experts.127.up_proj.weight_packed": (768, 2048 // 8),
        "model.layers.47.mlp.experts.127.down_proj.weight_scale": (2048, 768 // 128),
    },
}
EXPERT_BYTES = {GEMMA: 3_159_552, QWEN: 3 * 768 * 2048 // 2 + 3 * 768 * 2048 // 128 * 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "model"
    make_checkpoint("small", out, layers=2, seed=5)
    return out


@pytest.mark.parametrize("shape", [GEMMA, QWEN])
def test_the_configuration_is_the_real_models(shape: str) -> None:
    config = SHAPES[shape](None)
    config.allow_global_per_layer_attribute_access = True  # Gemma-4's global layers differ, as the shapes below say
    assert {name: getattr(config, name) for name in NUMBERS[shape]} == NUMBERS[shape]
    if shape == GEMMA:
        assert config.layer_types == [*["sliding_attention"] * 5, "full_attention"] * 5


@pytest.mark.parametrize("shape", [GEMMA, QWEN])
def test_every_tensor_has_the_shape_of_transformers_model(shape: str, tmp_path: Path) -> None:
    groups, matrix_shapes, settings = plan_checkpoint(SHAPES[shape](None), tmp_path)
    planned = {tensor.name: tensor for group in groups for tensor in group.tensors}
    assert {name: planned[name].shape for name in SHAPES_OF[shape]} == SHAPES_OF[shape]
    original = ShapeSource(SHAPES[shape](None), tmp_path).parameters
    # Every weight of the model is there once: as it is, or as a packed matrix of as many values.
    packed = sum(math.prod(matrix) for matrix in matrix_shapes.values())
    plain = sum(math.prod(t.shape) for t in planned.values() if t.name in original)
    assert packed + plain == sum(math.prod(parameter.shape) for parameter in original.values())
    one_expert = [t for n, t in planned.items() if ".0.experts.3." in n or ".0.mlp.experts.3." in n]
    assert sum(t.bytes for t in one_expert if not t.name.endswith("_shape")) == EXPERT_BYTES[shape]
    ignored = settings["quantization_config"]["ignore"]
    assert {
        n.removesuffix(".weight") for n, t in planned.items() if n.endswith(".weight") and len(t.shape) == 2
    } <= set(ignored)


def test_keys_that_are_values_leave_no_half_ignored_projection(tmp_path: Path) -> None:
    _, _, settings = plan_checkpoint(SHAPES[GEMMA](6), tmp_path)
    assert "model.layers.5.self_attn.v_proj" in settings["quantization_config"]["ignore"]


def test_the_values_are_small_and_the_seed_decides_them(small: Path, tmp_path: Path) -> None:
    state = load_file(small / "model.safetensors")
    embedding = state["model.embed_tokens.weight"].float()
    assert 0.015 < float(embedding.std()) < 0.03
    assert abs(float(embedding.mean())) < 1e-3
    assert torch.equal(state["model.norm.weight"], torch.ones(256, dtype=torch.bfloat16))
    prefix = "model.layers.1.experts.15.down_proj"
    expert = {name: state[f"{prefix}.{name}"] for name in ("weight_packed", "weight_scale", "weight_shape")}
    weight = dequantize_weight(expert, int4_arguments(64, True)).float()
    assert weight.shape == (256, 192)
    assert 0.005 < float(weight.std()) < 0.03
    for seed, same in ((5, True), (6, False)):
        make_checkpoint("small", tmp_path / str(seed), layers=2, seed=seed)
        again = load_file(tmp_path / str(seed) / "model.safetensors")
        assert torch.equal(again["model.embed_tokens.weight"], state["model.embed_tokens.weight"]) == same


def test_transformers_reads_configuration_and_index(small: Path) -> None:
    config = AutoConfig.from_pretrained(small)
    assert (config.num_hidden_layers, config.layer_types[-1]) == (2, "full_attention")
    with safe_open(small / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.experts.0.up_proj.weight_packed").get_shape() == [192, 32]


def test_the_tokenizer_fills_the_vocabulary_and_reads_any_text(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert len(tokenizer) == 2048
    text = "for i in range(3):\n\tprint('naïve 😀')"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 259
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert len(byte_tokenizer(300, 16)) == 300


def test_what_cannot_be_made_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not empty"):
        make_checkpoint("small", small)
    with pytest.raises(ValueError, match="--layers 31: the model has 30 layers"):
        make_checkpoint(GEMMA, tmp_path / "model", layers=31)


GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, max_num_seqs=2, language_model_only=True,
          additional_config={"moe_expert_cache_size": 3})
parameters = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=5)
output = llm.generate([{"prompt_token_ids": [5, 6, 7]}], parameters, use_tqdm=False)[0].outputs[0]
logprobs = [[entry.logprob for entry in step.values()] for step in output.logprobs]
counters = llm.collective_rpc("expert_cache_counters")[0]
print("\\n" + json.dumps({"logprobs": logprobs, "counters": list(counters.values())}))
"""


@pytest.mark.server
def test_vllm_generates_finite_logits_through_the_expert_cache(small: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(small)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"logprobs"')))
    values = [value for step in found["logprobs"] for value in step]
    assert len(values) >= 6 * 5
    assert all(math.isfinite(value) and -20 < value < 0 for value in values)
    assert len({round(value, 4) for value in values}) > 6  # flat logits would all be alike
    assert [layer["steps"] for layer in found["counters"]] == [6, 6]
    assert all(layer["h2d_bytes"] > 0 for layer in found["counters"])
