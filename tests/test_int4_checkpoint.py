"""The INT4 format: published packing vectors, the dequantisation formula, and the way to a checkpoint and back."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.int4_checkpoint import (
    dequantize_int4,
    dequantize_weight,
    fuse_experts,
    int4_arguments,
    quantize_weight,
    split_experts,
)


@pytest.mark.parametrize(
    ("codes", "word"),
    [([-8, -7, -1, 0, 1, 2, 6, 7], 0xFEA98710), ([7, 6, 5, 4, 3, 2, 1, 0], 0x89ABCDEF)],
)
def test_packing_vectors(codes: list[int], word: int) -> None:
    packed = pack_to_int32(torch.tensor([codes], dtype=torch.int8), 4)
    assert packed.item() & 0xFFFFFFFF == word


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantised_weights_follow_the_formula(group_size: int | None, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 128, dtype=torch.bfloat16)
    arguments = int4_arguments(group_size, symmetric)
    state = quantize_weight(weight, arguments)
    codes = unpack_from_int32(state["weight_packed"], 4, torch.Size(weight.shape)).to(torch.bfloat16)
    scale = state["weight_scale"].repeat_interleave(128 // state["weight_scale"].shape[1], dim=1)
    if not symmetric:
        groups = state["weight_scale"].shape[1]
        zero = unpack_from_int32(state["weight_zero_point"], 4, torch.Size((24, groups)), packed_dim=0)
        codes = codes - zero.to(torch.bfloat16).repeat_interleave(128 // groups, dim=1)
    restored = dequantize_weight(state, arguments)
    assert torch.equal(restored, codes * scale)
    # Half a step, and two roundings to BF16 (scale and product, 2^-8 each) of values up to 8 steps.
    assert ((restored.float() - weight.float()).abs() <= scale.float() * (0.5 + 2 * 8 / 256) + 1e-6).all()


def test_an_all_zero_group_stays_zero() -> None:
    state = quantize_weight(torch.zeros(8, 64, dtype=torch.bfloat16), int4_arguments(32, True))
    assert not dequantize_weight(state, int4_arguments(32, True)).any()


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="group size 64 does not divide 96"):
        quantize_weight(torch.zeros(8, 96, dtype=torch.bfloat16), int4_arguments(64, True))


def test_fusing_undoes_splitting() -> None:
    state = {
        "model.layers.0.experts.gate_up_proj": torch.randn(3, 8, 4),
        "model.layers.0.experts.down_proj": torch.randn(3, 4, 4),
        "model.norm.weight": torch.randn(4),
    }
    split = split_experts(state)
    assert torch.equal(
        split["model.layers.0.experts.2.up_proj.weight"], state["model.layers.0.experts.gate_up_proj"][2, 4:]
    )
    fused = fuse_experts(split)
    assert fused.keys() == state.keys()
    assert all(torch.equal(fused[name], state[name]) for name in state)


def test_export_names_everything_it_leaves_in_16_bit(gemma4_bf16: Path, tmp_path: Path) -> None:
    export_int4(gemma4_bf16, tmp_path, group_size=32)
    state = load_file(tmp_path / "model.safetensors")
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    plain = {n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.ndim == 2}
    assert plain <= set(ignored)
    assert not any(".experts." in name for name in ignored)
    assert state["model.layers.0.experts.3.down_proj.weight_packed"].dtype == torch.int32


def test_dequantising_a_checkpoint_gives_the_16_bit_weights_it_stands_for(gemma4_bf16: Path, tmp_path: Path) -> None:
    export_int4(gemma4_bf16, tmp_path / "int4", group_size=64, symmetric=False)
    dequantize_int4(tmp_path / "int4", tmp_path / "bf16")
    original, restored = load_file(gemma4_bf16 / "model.safetensors"), load_file(tmp_path / "bf16/model.safetensors")
    assert original.keys() == restored.keys()
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    for name, tensor in original.items():
        if ".experts." not in name:
            assert torch.equal(tensor, restored[name])
    name = "model.layers.0.experts.gate_up_proj"
    expected = dequantize_weight(
        quantize_weight(original[name][5, :192], int4_arguments(64, False)), int4_arguments(64, False)
    )
    assert torch.equal(restored[name][5, :192], expected)
