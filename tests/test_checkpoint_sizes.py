"""A checkpoint's names, dtypes and shapes to its experts' shape, the bytes of the rest, and its KV layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int4_format import MODELS, weights
from make_checkpoint import SHAPES, ShapeSource, make_checkpoint, plan_checkpoint

from vllm_hlwq.bank_sizes import ExpertShape
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.checkpoint_sizes import ModelFacts, UnknownSizes, model_sizes
from vllm_hlwq.sizing import KvLayer


@dataclass
class Header:
    """A tensor of which only the header exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def facts(config: Any, num_experts: int, **changes: Any) -> ModelFacts:
    """Facts of a transformers configuration of a text model."""
    found = ModelFacts(
        num_layers=config.num_hidden_layers,
        num_experts=num_experts,
        float_bytes=2,
        tied_head=config.tie_word_embeddings,
        layer_types=tuple(getattr(config, "layer_types", None) or ()),
        sliding_window=getattr(config, "sliding_window", None),
    )
    return replace(found, **changes)


def planned(shape: str) -> dict[str, Any]:
    """The tensors of a checkpoint of a real model's shape, which is not written."""
    groups, _, _ = plan_checkpoint(SHAPES[shape](None), Path("unwritten"))
    return {tensor.name: tensor for group in groups for tensor in group.tensors}


@pytest.mark.parametrize("shape", ["gemma-4-26b-a4b", "qwen3-30b-a3b"])
def test_real_models(shape: str) -> None:
    config = SHAPES[shape](None)
    sizes = model_sizes(planned(shape), facts(config, 128))
    # In 16 bit, as transformers builds the model, without the experts' stacks or matrices.
    parameters = ShapeSource(config, Path("unwritten")).parameters
    assert sizes.dense_bytes == sum(p.bytes for name, p in parameters.items() if ".experts." not in name)
    if shape == "gemma-4-26b-a4b":
        assert sizes.experts == (ExpertShape(2816, 704, 64),) * 30
        assert [expert.record_bytes * 128 for expert in sizes.experts] == [404_422_656] * 30
        sliding, whole = KvLayer(2 * 8 * 256, 1024), KvLayer(2 * 2 * 512, None)
        assert sizes.kv_layers == ((sliding,) * 5 + (whole,)) * 5
    else:
        assert sizes.experts == (ExpertShape(2048, 768, 128),) * 48
        assert sizes.kv_layers == (KvLayer(2 * 4 * 128, None),) * 48


def test_a_checkpoint_that_was_written(tmp_path: Path) -> None:
    make_checkpoint("small", tmp_path / "model", layers=3)
    config = SHAPES["small"](3)
    sizes = model_sizes(TensorFolder(tmp_path / "model").tensors, facts(config, 16))
    state = weights(tmp_path / "model")
    assert sizes.dense_bytes == sum(tensor.nbytes for name, tensor in state.items() if ".experts." not in name)
    prefix = "model.layers.2.experts.5."
    of_one = {name: t for name, t in state.items() if name.startswith(prefix) and not name.endswith("shape")}
    assert len(of_one) == 6
    # 192 is 3 tiles of 64: nothing is padded, so Marlin's record is the file's.
    assert [expert.record_bytes for expert in sizes.experts] == [sum(t.nbytes for t in of_one.values())] * 3
    assert sizes.kv_layers == (KvLayer(128, 64), KvLayer(128, 64), KvLayer(128, None))


SHAPES_OF = {
    "gemma4": [ExpertShape(128, 192, 64)] * 2,
    "gemma4_multimodal": [ExpertShape(128, 192, 64)] * 2,
    "qwen3_moe": [ExpertShape(128, 128, 128)] * 2,
    "qwen3_moe_stacked": [ExpertShape(128, 128, 128)] * 2,
    "mixtral": [ExpertShape(128, 128, 128)] * 2,
    "olmoe": [ExpertShape(128, 64, 64)] * 2,
    "glm4_moe": [ExpertShape(128, 64, 64)],  # the first layer is dense
}


@pytest.mark.parametrize("model", SHAPES_OF)
def test_exports_of_every_layout(layout_exports: dict[str, Path], model: str) -> None:
    config = MODELS[model][0]()
    text = config.get_text_config()
    experts = 16 if model.startswith("qwen3") else 4
    tensors = TensorFolder(layout_exports[model]).tensors
    sizes = model_sizes(tensors, facts(text, experts, towers=True))
    # Where a single group covers an input it is as good as channel scales, which take no other place.
    assert [expert.record_bytes for expert in sizes.experts] == [shape.record_bytes for shape in SHAPES_OF[model]]
    state = weights(layout_exports[model])
    dense = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    # All are floats, and GLM's float32 among them counts as the model's dtype.
    assert sizes.dense_bytes == sum(2 * tensor.numel() for tensor in dense.values())
    assert all(layer.elements == 2 * dense_rows(dense, text) for layer in sizes.kv_layers if layer.window is None)
    if model == "gemma4_multimodal":
        vision = sum(t.nbytes for name, t in dense.items() if "vision" in name)
        assert vision > 0
        without = model_sizes(tensors, facts(text, experts, towers=False))
        assert without.dense_bytes == sizes.dense_bytes - vision
        assert len(without.kv_layers) == text.num_hidden_layers


def dense_rows(dense: dict[str, torch.Tensor], config: Any) -> int:
    """Rows of the last layer's key projection, in which exports of Gemma-4 attend globally."""
    last = f"layers.{config.num_hidden_layers - 1}.self_attn.k_proj.weight"
    return next(tensor.shape[0] for name, tensor in dense.items() if name.endswith(last) and "vision" not in name)


@pytest.mark.parametrize(
    ("export", "record"),
    [
        ({"group_size": 32, "symmetric": False}, 3 * 192 * 128 * (1 / 2 + 2 / 32 + 1 / 64)),
        ({"group_size": None}, 3 * 192 * 128 / 2 + 2 * (2 * 192 + 128)),
    ],
)
def test_other_formats(gemma4_bf16: Path, tmp_path: Path, export: dict[str, Any], record: float) -> None:
    export_int4(gemma4_bf16, tmp_path, **export)
    sizes = model_sizes(TensorFolder(tmp_path).tensors, ModelFacts(2, 16, 2))
    assert [expert.record_bytes for expert in sizes.experts] == [record, record]
    assert sizes.experts[0].zero_points == (not export.get("symmetric", True))


def expert_headers(prefix: str, shape: ExpertShape, count: int, bits: int = 4) -> dict[str, Header]:
    """Tensors of a layer's experts in the pack-quantized format, from the format's definition."""
    sides = {"up_proj": (shape.width, shape.hidden), "down_proj": (shape.hidden, shape.width)}
    if shape.gated:
        sides["gate_proj"] = sides["up_proj"]
    found = {}
    for expert in range(count):
        for projection, (rows, columns) in sides.items():
            stem = f"{prefix}.experts.{expert}.{projection}.weight"
            groups = math.ceil(columns / shape.group_size) if shape.group_size else 1
            found[f"{stem}_packed"] = Header(torch.int32, (rows, columns * bits // 32))
            found[f"{stem}_scale"] = Header(torch.bfloat16, (rows, groups))
            found[f"{stem}_shape"] = Header(torch.int64, (2,))
            if shape.zero_points:
                found[f"{stem}_zero_point"] = Header(torch.int32, (rows * bits // 32, groups))
    return found


@given(
    hidden=st.integers(2, 12).map(lambda n: 128 * n),
    tiles=st.integers(2, 12),
    group=st.sampled_from([32, 64, 128, None]),
    zero_points=st.booleans(),
    gated=st.booleans(),
)
def test_an_experts_shape_is_read_back(
    hidden: int, tiles: int, group: int | None, zero_points: bool, gated: bool
) -> None:
    shape = ExpertShape(hidden, (group or 8) * tiles, group, zero_points, gated)
    tensors = {
        **expert_headers("model.layers.0.mlp", shape, 3),
        **expert_headers("model.layers.1.mlp", shape, 3),
        "model.norm.weight": Header(torch.bfloat16, (hidden,)),
    }
    sizes = model_sizes(tensors, ModelFacts(2, 3, 2))
    assert sizes.experts == (shape, shape)
    assert sizes.dense_bytes == 2 * hidden


LAYER = expert_headers("model.layers.0.mlp", ExpertShape(256, 128, 64), 4)


def dense_of(*extra: tuple[str, torch.dtype, tuple[int, ...]], **changes: Any) -> int:
    tensors = {**LAYER, **{name: Header(dtype, shape) for name, dtype, shape in extra}}
    return model_sizes(tensors, ModelFacts(1, 4, 2, **changes)).dense_bytes


def test_what_is_loaded_counts_once_and_what_is_not_counts_nothing() -> None:
    embedding = ("model.embed_tokens.weight", torch.bfloat16, (512, 256))
    head = ("lm_head.weight", torch.bfloat16, (512, 256))
    assert dense_of(embedding, head) == 2 * 512 * 256 * 2
    assert dense_of(embedding, head, tied_head=True) == 512 * 256 * 2
    # Float32 becomes the model's dtype, 8 bit stays, integers stay.
    assert dense_of(("a.weight", torch.float32, (8, 8))) == 128
    assert dense_of(("a.weight", torch.float8_e4m3fn, (8, 8))) == 64
    assert dense_of(("a.weight_packed", torch.int32, (8, 8)), ("a.weight_shape", torch.int64, (2,))) == 256
    drafts = [
        ("model.layers.1.self_attn.k_proj.weight", torch.bfloat16, (8, 8)),
        ("mtp.layers.0.self_attn.k_proj.weight", torch.bfloat16, (8, 8)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.float32, (8,)),
    ]
    assert dense_of(*drafts) == 0
    speech = [
        ("talker.model.layers.0.mlp.experts.0.up_proj.weight", torch.bfloat16, (8, 8)),
        ("talker.model.layers.0.self_attn.k_proj.weight", torch.bfloat16, (8, 8)),
        ("code2wav.decoder.0.conv.weight", torch.bfloat16, (8, 8)),
    ]
    assert dense_of(*speech) == 0
    towers = [
        (f"model.{name}.weight", torch.bfloat16, (8, 8))
        for name in ("vision_tower.encoder.layers.7.mlp", "embed_vision.embedding_projection", "audio_tower.conv")
    ]
    assert dense_of(*towers, ("visual.patch_embed.weight", torch.bfloat16, (8, 8))) == 0
    assert dense_of(*towers, ("visual.patch_embed.weight", torch.bfloat16, (8, 8)), towers=True) == 4 * 128


def test_shared_experts_are_resident() -> None:
    shared = ("model.layers.0.mlp.shared_experts.up_proj.weight", torch.bfloat16, (64, 256))
    router = ("model.layers.0.mlp.gate.e_score_correction_bias", torch.float32, (4,))
    assert dense_of(shared, router) == 64 * 256 * 2 + 4 * 2


def kv_of(facts: ModelFacts, *names: str) -> tuple[KvLayer, ...]:
    tensors = {**LAYER, **{f"model.{name}": Header(torch.bfloat16, (64, 256)) for name in names}}
    return model_sizes(tensors, facts).kv_layers


def test_layers_that_keep_keys_and_values() -> None:
    keys = [f"layers.{layer}.self_attn.k_proj.weight" for layer in range(4)]
    types = ("full_attention", "sliding_attention", "linear_attention", "full_attention")
    base = ModelFacts(4, 4, 2, sliding_window=32)
    assert kv_of(base, *keys) == (KvLayer(128, 32),) * 4
    assert kv_of(replace(base, sliding_window=None), *keys) == (KvLayer(128, None),) * 4
    assert kv_of(replace(base, layer_types=types), *keys) == (KvLayer(128, None), KvLayer(128, 32), KvLayer(128, None))
    shared = replace(base, layer_types=types, kv_shared_layers=2)
    assert kv_of(shared, *keys) == (KvLayer(128, None), KvLayer(128, 32))
    assert kv_of(base, "vision_tower.layers.0.self_attn.k_proj.weight", "layers.0.self_attn.kv_b_proj.weight") == ()
    tensors = {**LAYER, "model.layers.0.self_attn.k_proj.weight_packed": Header(torch.int32, (64, 32))}
    tensors["model.layers.0.self_attn.v_proj.weight"] = Header(torch.bfloat16, (48, 256))
    assert model_sizes(tensors, replace(base, sliding_window=None)).kv_layers == (KvLayer(112, None),)


def without(name: str) -> dict[str, Header]:
    return {key: tensor for key, tensor in LAYER.items() if key != name}


STEM = "model.layers.0.mlp.experts.3.down_proj.weight"
UNKNOWN = {
    "no experts": ({}, "holds no experts"),
    "8 bit": (expert_headers("model.layers.0.mlp", ExpertShape(256, 128, 64), 4, bits=8), "INT4 matrices"),
    "8 bit floats": (
        {f"model.layers.0.mlp.experts.{e}.up_proj.weight": Header(torch.float8_e4m3fn, (8, 8)) for e in range(4)},
        "another format",
    ),
    "a stack": ({"model.layers.0.experts.gate_up_proj": Header(torch.bfloat16, (4, 8, 8))}, "another format"),
    "a bias": ({**LAYER, "model.layers.0.mlp.experts.0.up_proj.bias": Header(torch.bfloat16, (8,))}, "another format"),
    "one too few": (without(f"{STEM}_packed"), "does not hold 4 experts"),
    "one of another shape": ({**LAYER, f"{STEM}_packed": Header(torch.int32, (256, 15))}, "of one shape"),
    "no scales": ({n: t for n, t in LAYER.items() if "scale" not in n}, "no scales"),
    "groups that do not divide": (
        {n: Header(t.dtype, (t.shape[0], 3)) if "scale" in n else t for n, t in LAYER.items()},
        "INT4 matrices",
    ),
    "an input scale": ({**LAYER, f"{STEM}_global_scale": Header(torch.float32, (1,))}, "another format"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_not_guessed(case: str) -> None:
    tensors, reason = UNKNOWN[case]
    with pytest.raises(UnknownSizes, match=reason):
        model_sizes(tensors, ModelFacts(1, 4, 2))


def test_experts_with_biases_are_not_guessed(layout_exports: dict[str, Path]) -> None:
    with pytest.raises(UnknownSizes, match=r"experts\.0\.w\w+ is of experts in another format"):
        model_sizes(TensorFolder(layout_exports["gpt_oss"]).tensors, ModelFacts(2, 4, 2))
