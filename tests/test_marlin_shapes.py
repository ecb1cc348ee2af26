"""The rule for Marlin shapes against vLLM's own check of the installed release."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    check_moe_marlin_supports_config,
    marlin_moe_permute_scales,
    marlin_permute_scales,
)

from vllm_hlwq.marlin_moe import resident_block_size
from vllm_hlwq.marlin_shapes import int4_layout_obstacle, marlin_obstacle


@given(
    st.sampled_from([64, 128, 192, 2048, 2816, 2880]),
    st.sampled_from([32, 96, 192, 352, 704, 768]),
    st.sampled_from([16, 32, 64, 128, None]),
)
def test_the_rule_is_vllms(hidden_size: int, width: int, group_size: int | None) -> None:
    config = SimpleNamespace(hidden_dim=hidden_size, intermediate_size_per_partition_unpadded=width)
    allowed = check_moe_marlin_supports_config(config, -1 if group_size is None else group_size, True)
    assert (marlin_obstacle(hidden_size, width, group_size) is None) == allowed


@pytest.mark.parametrize(("group_size", "fits"), [(32, True), (64, True), (128, False)])
def test_gemma4_26b_takes_groups_of_32_or_64(group_size: int, fits: bool) -> None:
    assert (marlin_obstacle(2816, 704, group_size) is None) == fits


@pytest.mark.parametrize(
    ("hidden_size", "width", "group_size"), [(256, 64, 64), (128, 128, 128), (256, 192, 64), (256, 128, None)]
)
def test_scales_are_confused_where_a_group_is_a_whole_expert(
    hidden_size: int, width: int, group_size: int | None
) -> None:
    groups = 1 if group_size is None else hidden_size // group_size
    scales = torch.rand(1, groups, 2 * width)
    # As vLLM's conversion calls it for gate and up, with the expert width in the place of their inputs.
    found = marlin_moe_permute_scales(scales, width, 2 * width, -1 if group_size is None else group_size)
    right = marlin_permute_scales(scales[0], hidden_size, 2 * width, -1 if groups == 1 else hidden_size // groups)
    assert (int4_layout_obstacle(hidden_size, width, group_size) is None) == torch.equal(found[0], right)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "rows"),
    [(1, 8, 128, 8), (115, 8, 128, 8), (116, 8, 128, 16), (460, 8, 128, 32), (600, 8, 128, 48), (8192, 8, 128, 64)],
)
def test_blocks_have_the_rows_of_vllms_rule(tokens: int, top_k: int, experts: int, rows: int) -> None:
    assert resident_block_size(tokens, top_k, experts) == rows
