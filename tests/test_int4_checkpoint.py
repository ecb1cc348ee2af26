"""The INT4 format of one matrix: published packing vectors and the dequantisation formula."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from vllm_hlwq.int4_checkpoint import dequantize_weight, int4_arguments, quantize_weight


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


def test_a_scale_that_underflows_keeps_its_group_near_zero() -> None:
    weight = torch.full((8, 32), 6e-8, dtype=torch.float16)  # float16's smallest; a seventh of it is zero
    restored = dequantize_weight(quantize_weight(weight, int4_arguments(32, True)), int4_arguments(32, True))
    assert not restored.any()
