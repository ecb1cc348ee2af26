"""Random INT4 checkpoints in the exact shapes of real mixture-of-experts models, for benchmarks without a download.

    python benchmarks/make_checkpoint.py --shape gemma-4-26b-a4b --out MODEL [--layers N] [--seed S]

Tensor names and shapes come from transformers' own model on the meta device, and what becomes INT4 from the exporter's
plan, so a checkpoint differs from a real export in its values alone: codes are random bytes, 16-bit matrices and
scales random mantissas under a fixed exponent, vectors ones. The seed decides every byte.

Gemma-4 is written as its text model: vLLM builds that same class inside ``Gemma4ForConditionalGeneration``, and the
wrapper would only add a processor that text benchmarks never call.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from vllm_hlwq.checkpoint.conversion import readable
from vllm_hlwq.checkpoint.export import quantization_config
from vllm_hlwq.checkpoint.export_plan import int4_group, plan_export
from vllm_hlwq.checkpoint.shard import Group, TensorPlan, shard_index, shard_layout, shard_name, shards_of
from vllm_hlwq.checkpoint.sources import Parameter
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.checkpoint.writer import INDEX, write_json
from vllm_hlwq.errors import CheckpointError
from vllm_hlwq.int4_checkpoint import int4_arguments

SHARD_BYTES = 512 * 2**20
"""Of one shard; each thread holds one in memory."""
MATRIX_EXPONENT = -6
"""16-bit matrices are +-2^-6 times 1 to 2: root mean square 0.024, as of a freshly initialised model."""
SCALE_EXPONENT = -9
"""Scales are 2^-9 times 1 to 2; with codes from -8 to 7 the experts' weights have a root mean square of 0.014."""
BF16_BIAS, BF16_MANTISSA_BITS = 127, 7
ONE = 0x3F80
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

FIVE_SLIDING_ONE_GLOBAL = [*["sliding_attention"] * 5, "full_attention"]


def gemma4_26b_a4b(layers: int | None) -> PreTrainedConfig:
    """The text model of Gemma-4-26B-A4B; a thinned one keeps the last layers' kinds, so that it ends globally."""
    kinds = FIVE_SLIDING_ONE_GLOBAL * 5
    return Gemma4TextConfig(
        vocab_size=262_144, hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8,
        num_global_key_value_heads=2, head_dim=256, global_head_dim=512, sliding_window=1024, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704, max_position_embeddings=262_144, final_logit_softcapping=30.0,
        tie_word_embeddings=True, **gemma4_layers(kinds, layers), **SPECIAL_IDS,
    )  # fmt: skip


def qwen3_30b_a3b(layers: int | None) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=checked_layers(48, layers),
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        max_position_embeddings=40_960, rope_theta=1e6, tie_word_embeddings=False, **SPECIAL_IDS,
    )  # fmt: skip


def small(layers: int | None) -> PreTrainedConfig:
    """Gemma-4's structure in 2 MiB a layer, for a CPU: values that are keys, expert width no multiple of 128."""
    return Gemma4TextConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2,
        num_global_key_value_heads=1, head_dim=32, global_head_dim=64, sliding_window=64, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=16, top_k_experts=4,
        moe_intermediate_size=192, max_position_embeddings=2048, final_logit_softcapping=30.0,
        tie_word_embeddings=True, **gemma4_layers(["sliding_attention"] * 3 + ["full_attention"], layers),
        **SPECIAL_IDS,
    )  # fmt: skip


SHAPES = {"gemma-4-26b-a4b": gemma4_26b_a4b, "qwen3-30b-a3b": qwen3_30b_a3b, "small": small}


def checked_layers(all_layers: int, wanted: int | None) -> int:
    if wanted is None:
        return all_layers
    if not 1 <= wanted <= all_layers:
        raise ValueError(f"--layers {wanted}: the model has {all_layers} layers; give a number from 1 to that")
    return wanted


def gemma4_layers(kinds: list[str], wanted: int | None) -> dict[str, Any]:
    layers = checked_layers(len(kinds), wanted)
    return {"num_hidden_layers": layers, "layer_types": kinds[-layers:]}


class ShapeSource:
    """A 16-bit model of which only the shapes exist: what the exporter plans by."""

    def __init__(self, config: PreTrainedConfig, path: Path) -> None:
        self.path = path
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        self.parameters: Mapping[str, Parameter] = {
            name: Parameter(tuple(tensor.shape), tensor.dtype)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }
        self._config = config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise CheckpointError(f"{name}: only the shapes of this model exist")

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def folders(self) -> list[TensorFolder]:
        return []


MatrixShapes = dict[str, tuple[int, int]]


def plan_checkpoint(config: PreTrainedConfig, out: Path) -> tuple[list[Group], MatrixShapes, dict[str, Any]]:
    """Every tensor of the checkpoint, what its ``weight_shape`` tensors hold, and its ``config.json``.

    All are as an export of such a model would have them; the group size is the largest of 128, 64 and 32 that Marlin
    takes for the experts' shapes.
    """
    source = ShapeSource(config, out)
    plan = plan_export(source, "auto", linears=False)
    arguments = int4_arguments(plan.group_size, symmetric=True)
    groups = [
        int4_group(name, plan, arguments, source)
        if name in plan.matrices
        else Group(name, (TensorPlan(name, parameter.dtype, parameter.shape),))
        for name, parameter in source.parameters.items()
    ]
    shapes = {f"{m.module}.weight_shape": m.shape for found in plan.matrices.values() for m in found}
    settings = source.config() | {"quantization_config": quantization_config(plan, arguments)}
    return groups, shapes, settings


def random_shard(path: Path, groups: list[Group], matrix_shapes: MatrixShapes, seed: list[int]) -> None:
    """Write one safetensors file out of one buffer: random bytes, then the few bits that make values of them."""
    plans = {plan.name: plan for group in groups for plan in group.tensors}
    head, offsets, size = shard_layout(list(plans.values()))
    start = len(head)
    words = -(-(size - start) // 8)
    data = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, words, dtype=np.uint64).view(np.uint8)
    for name, offset in offsets.items():
        plan = plans[name]
        tensor = data[offset - start : offset - start + plan.bytes]
        if name.endswith(".weight_shape"):
            tensor.view(np.int64)[:] = matrix_shapes[name]
        elif plan.dtype == torch.bfloat16:
            bits = tensor.view(np.uint16)
            if name.endswith(".weight_scale"):
                set_exponent(bits, SCALE_EXPONENT, signed=False)
            elif len(plan.shape) >= 2:
                set_exponent(bits, MATRIX_EXPONENT, signed=True)
            else:
                bits[:] = ONE
        elif not name.endswith(".weight_packed"):
            raise CheckpointError(f"{name}: no random values are known for {plan.dtype}")
    with path.open("wb") as file:
        file.write(head)
        file.write(data[: size - start])


def set_exponent(bits: np.ndarray, exponent: int, signed: bool) -> None:
    """Turn random BF16 bits into numbers of magnitude 2^exponent to 2^(exponent + 1)."""
    mantissa = (1 << BF16_MANTISSA_BITS) - 1
    bits &= np.uint16(mantissa | (0x8000 if signed else 0))
    bits |= np.uint16((exponent + BF16_BIAS) << BF16_MANTISSA_BITS)


def byte_tokenizer(vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges, padded to the vocabulary by tokens that no text yields."""
    names = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused{number}>" for number in range(vocab_size - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **SPECIAL_TOKENS)


def make_checkpoint(shape: str, out: Path, layers: int | None = None, seed: int = 0) -> int:
    """Write a checkpoint and return its bytes of weights.

    Args:
        shape: a key of ``SHAPES``.
        out: folder to make; it must not exist, or be empty.
        layers: decoder layers, the model's own number if None.
        seed: decides every byte.

    Raises:
        CheckpointError: ``out`` is not empty.
        ValueError: the model has fewer layers.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder or remove it")
    config = SHAPES[shape](layers)
    groups, matrix_shapes, settings = plan_checkpoint(config, out)
    shards = shards_of(groups, SHARD_BYTES)
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True)
    with ThreadPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
        written = [
            pool.submit(random_shard, work / shard_name(i, len(shards)), shard, matrix_shapes, [seed, i])
            for i, shard in enumerate(shards)
        ]
        byte_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(work)
        for shard in written:
            shard.result()
    write_json(work / "config.json", settings)
    if len(shards) > 1:
        (work / INDEX).write_text(json.dumps(shard_index(shards)))
    work.replace(out)
    return sum(group.bytes for group in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        size = make_checkpoint(arguments.shape, arguments.out, arguments.layers, arguments.seed)
    except ValueError as error:
        raise SystemExit(f"make_checkpoint: {error}") from None
    seconds = time.monotonic() - start
    print(f"{arguments.out}: {readable(size)} in {seconds:.1f} s ({readable(size / seconds)}/s)")


if __name__ == "__main__":
    main()
