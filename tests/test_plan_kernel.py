"""The device planner refuses what its kernels cannot index; ``interpreted/test_plan_kernel.py`` runs them."""

import pytest
import torch

from vllm_hlwq.plan_kernel import DeviceSlotTable, plan


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1, 8, 2), "num_experts=1 must be 2 to 1023"),
        ((1024, 4, 8, 8, 2), "num_experts=1024 must be 2 to 1023"),
        ((16, 16, 1, 8, 2), "num_slots=16 must be below"),
        ((16, 0, 1, 8, 2), "num_slots=0 must be 1"),
        ((16, 4, 0, 8, 2), "staging_rows=0 must be 1"),
        ((16, 4, 8, 8, 33), "top_k=33 must be 1 to 32"),
        ((16, 4, 8, 0, 2), "max_tokens=0 must be 1 or more"),
        ((16, 4, 8, 2**30, 2), "below 2147483648"),
    ],
)
def test_impossible_tables_are_refused(sizes: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeviceSlotTable(*sizes, device="cpu")


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((int32(9, 2),), r"topk_ids has shape \[9, 2\], must be \[T, 2\] with T up to 8"),
        ((int32(4, 3),), r"topk_ids has shape \[4, 3\]"),
        ((int32(8),), r"topk_ids has shape \[8\]"),
        ((int32(4, 2).float(),), "topk_ids has dtype torch.float32"),
        ((torch.empty_strided((4, 2), (2**30, 1), dtype=torch.int32, device="meta"),), "too wide"),
        ((int32(4, 2), torch.zeros(3, dtype=torch.bool)), r"is_padding has shape \[3\], must be \[4\]"),
        ((int32(4, 2), torch.zeros(8, dtype=torch.bool)[::2]), "contiguous"),
        ((int32(4, 2), int32(4)), "is_padding has dtype torch.int32, must be torch.bool"),
        ((int32(4, 2), None, int32(0)), r"expert_map has shape \[0\]"),
        ((int32(4, 2), None, int32(32)[::2]), "contiguous"),
        ((int32(4, 2), None, int32(16).long()), "expert_map has dtype torch.int64"),
    ],
)
def test_wrong_steps_are_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    table = DeviceSlotTable(16, 4, 12, max_tokens=8, top_k=2, device="cpu")
    with pytest.raises(ValueError, match=message):
        plan(table, *arguments)
