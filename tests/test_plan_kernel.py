"""The device planner refuses what its kernels cannot index; ``interpreted/test_plan_kernel.py`` runs them."""

from typing import Any

import pytest
import torch

from vllm_hlwq import plan_triton
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


def test_no_step_and_no_rank_asks_for_a_compilation_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants are those of the table's shape, and Triton does not look at the other numbers' values."""
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments, **constants: launches.append((arguments, constants))

    kernel = plan_triton.plan_kernel
    monkeypatch.setattr("vllm_hlwq.plan_kernel.plan_kernel", Recorder())
    expert_map = torch.arange(154).int() - 77
    for table, steps in (
        (DeviceSlotTable(77, 13, 64, 64, 6, "cpu"), [(int32(1, 6),), (int32(64, 6), torch.zeros(64).bool())]),
        (DeviceSlotTable(77, 13, 64, 64, 6, "cpu", 154), [(int32(16, 6), None, expert_map), (int32(0, 6), None, None)]),
    ):
        for step in steps:
            plan(table, *step)
    assert len({tuple(constants.items()) for _, constants in launches}) == 1
    values = zip(*(arguments for arguments, _ in launches), strict=True)
    numbers = {param.name for param, each in zip(kernel.params, values, strict=False) if isinstance(each[0], int)}
    assert numbers == {"num_tokens", "row_stride", "column_stride", "masked_rows", "map_size", "global_experts"}
    assert numbers <= {param.name for param in kernel.params if param.do_not_specialize}
