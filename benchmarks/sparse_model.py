"""A model folder of any size that takes next to no disk: safetensors files with real headers, and holes for weights.

Holes read as zeros. Each large matrix begins with random weights, so that a conversion meets both.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from vllm_hlwq.checkpoint.hashes import byte_view
from vllm_hlwq.checkpoint.shard import TensorPlan, shard_layout

HIDDEN, EXPERTS, EXPERT_WIDTH = 2048, 64, 128
RANDOM_BYTES = 40 * 2**20
"""More than the converters work on at a time: 64 MiB in float32, 32 in BF16."""
GIB = 2**30


def layer_shapes(layer: int, expert_width: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a Qwen3-MoE-like layer with fused experts."""
    prefix = f"model.layers.{layer}"
    return {
        **{f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{prefix}.mlp.experts.gate_up_proj": (EXPERTS, 2 * expert_width, HIDDEN),
        f"{prefix}.mlp.experts.down_proj": (EXPERTS, HIDDEN, expert_width),
    }


def bytes_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def write_model(out: Path, total_bytes: int) -> int:
    """Write a BF16 model of at least ``total_bytes``; return its size.

    Two fifths are one matrix of a vision tower, which stays in 16 bit; a fifth is the embedding, one matrix that is
    coded; three tenths are the experts of the first layer, two 3-D stacks; the rest are as many small layers as it
    takes. More experts would show nothing else, and exporting them to INT4 is what takes longest.
    """
    out.mkdir(parents=True)
    tower = {"model.vision_tower.patch.weight": (total_bytes * 2 // 5 // (2 * HIDDEN), HIDDEN)}
    embedding = {
        "model.embed_tokens.weight": (total_bytes // 5 // (2 * HIDDEN), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    width = total_bytes * 3 // 10 // (6 * EXPERTS * HIDDEN * EXPERT_WIDTH) * EXPERT_WIDTH
    shards = [tower, embedding, layer_shapes(0, max(EXPERT_WIDTH, width))]
    size = sum(map(bytes_of, shards))
    while size < total_bytes:
        shards.append(layer_shapes(len(shards) - 2, EXPERT_WIDTH))
        size += bytes_of(shards[-1])
    weight_map = {}
    for number, shapes in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        write_shard(out / name, shapes)
        weight_map.update(dict.fromkeys(shapes, name))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_hidden_layers": len(shards) - 2, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config))
    return size


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """One safetensors file of BF16 tensors: its header, random weights where a matrix begins, holes for the rest."""
    head, offsets, size = shard_layout([TensorPlan(name, torch.bfloat16, shape) for name, shape in shapes.items()])
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
        for name, shape in shapes.items():
            count = min(RANDOM_BYTES // 2, math.prod(shape))
            file.seek(offsets[name])
            file.write(byte_view((torch.randn(count, generator=generator) * 0.02).bfloat16()))
