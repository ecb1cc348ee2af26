"""Sizes on the GPU as arithmetic: records in Marlin's layout, staging, the KV cache, the largest cache that fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.sizing import BankSizes, DeviceDemand, ExpertShape, KvLayer
from vllm_hlwq.vllm_compat import borrow

GIB = 2**30
GEMMA = ExpertShape(hidden=2816, width=704, group_size=64)


@st.composite
def expert_shapes(draw: st.DrawFn) -> ExpertShape:
    """Shapes that Marlin takes: hidden a multiple of 128, the width one of the group, or of 8 with channel scales."""
    group = draw(st.sampled_from([32, 64, 128, None]))
    width = (group or 8) * draw(st.integers(1, 40))
    return ExpertShape(128 * draw(st.integers(1, 40)), width, group, draw(st.booleans()), draw(st.booleans()))


def marlin_tensors(shape: ExpertShape) -> list[torch.Tensor]:
    """One expert's tensors as vLLM's conversion shapes them, without memory."""
    group = -1 if shape.group_size is None else shape.group_size
    padded = borrow("marlin_moe_padded_intermediate")(shape.width, group)
    found = []
    for inputs, outputs in ((shape.hidden, (2 if shape.gated else 1) * padded), (padded, shape.hidden)):
        groups = 1 if group == -1 else inputs // group
        found.append(torch.empty(inputs // 16, outputs * 16 // 8, dtype=torch.int32, device="meta"))
        found.append(torch.empty(groups, outputs, dtype=torch.bfloat16, device="meta"))
        if shape.zero_points:
            found.append(torch.empty(groups, outputs // 8, dtype=torch.int32, device="meta"))
    return found


@settings(deadline=None)  # the first example imports vLLM
@given(expert_shapes())
def test_a_record_is_as_large_as_marlins_tensors(shape: ExpertShape) -> None:
    assert shape.record_bytes == sum(tensor.nbytes for tensor in marlin_tensors(shape))
    # HostStore aligns every field to 16 bytes, which must add nothing.
    assert all(tensor.nbytes % 16 == 0 for tensor in marlin_tensors(shape))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        # 3 matrices of 704 x 2816: half a byte a weight, two a group of 64. 704 is 11 tiles of 64.
        (GEMMA, 2_973_696 + 185_856),
        (ExpertShape(2048, 768, 128), 2_359_296 + 73_728),
        (ExpertShape(2816, 704, 64, zero_points=True), 2_973_696 + 185_856 + 46_464),
        # 352, a half of 704 for each of two ranks, is padded to 384.
        (ExpertShape(2816, 352, 32), 3 * 384 * 2816 // 2 + 3 * 384 * 2816 // 32 * 2),
        # 704 in groups of 128 is 5.5 of them: vLLM pads to whole groups.
        (ExpertShape(2816, 704, 128), 3 * 768 * 2816 // 2 + 3 * 768 * 2816 // 128 * 2),
        (ExpertShape(2816, 704, None), 2_973_696 + 2 * (2 * 704 + 2816)),
        (ExpertShape(2816, 704, 64, gated=False), (2_973_696 + 185_856) * 2 // 3),
    ],
)
def test_records_of_known_shapes(shape: ExpertShape, wanted: int) -> None:
    assert shape.record_bytes == wanted


def test_gemma_4s_experts_take_twelve_gigabytes() -> None:
    sizes = BankSizes((GEMMA.record_bytes,) * 30, 128, 8, 24 * GIB)
    assert sizes.bytes(128) == 12_132_679_680
    assert sizes.slot_bytes(4) == 379_146_240
    # A sixteenth of 24 GiB holds 254 experts in each of two banks: all 124 without a slot.
    assert sizes.staging_rows(4, GEMMA.record_bytes) == 124
    assert sizes.staging_bytes(4) == 2 * 124 * 3_159_552
    assert sizes.most_slots(sizes.bytes(4)) == 4
    assert sizes.most_slots(sizes.bytes(4) - 1) == 3


def test_working_memory_is_what_the_backend_asks_vllm_for() -> None:
    # A row of (token, k): gate and up, their product, the output, in 16 bit.
    assert GEMMA.workspace_bytes(8192, 8) == 8192 * 8 * (2 * 704 + 704 + 2816) * 2
    assert ExpertShape(2816, 352, 32).workspace_bytes(1, 8) == 8 * (3 * 384 + 2816) * 2
    assert ExpertShape(2816, 704, 64, gated=False).workspace_bytes(1, 1) == (2 * 704 + 2816) * 2


bank_sizes = st.builds(
    BankSizes,
    records=st.lists(st.sampled_from([16, 4096, 5120]), min_size=1, max_size=5).map(tuple),
    num_experts=st.integers(1, 24),
    top_k=st.integers(1, 8),
    device_bytes=st.integers(0, 2**22),
    staging_size=st.none() | st.integers(1, 30),
)


def counted_bytes(sizes: BankSizes, slots: int) -> int:
    """Bank by bank: each layer's slots, then two staging banks for each kind of layer, an expert at a time."""
    total = 0
    for record in sizes.records:
        total += sum(record for _ in range(slots))
    for record in {*sizes.records}:
        rows = 0
        while rows < sizes.num_experts - slots:
            wanted = sizes.staging_size is not None and rows < sizes.staging_size
            default = sizes.staging_size is None and (
                rows < sizes.top_k or 16 * 2 * record * (rows + 1) <= sizes.device_bytes
            )
            if not wanted and not default:
                break
            rows += 1
        assert rows == sizes.staging_rows(slots, record)
        total += 2 * rows * record
    return total


@given(bank_sizes, st.integers(0, 2**20), st.data())
def test_the_largest_cache_that_fits_is_found(sizes: BankSizes, available: int, data: st.DataObject) -> None:
    taken = {slots: counted_bytes(sizes, slots) for slots in range(1, sizes.num_experts + 1)}
    assert {slots: sizes.bytes(slots) for slots in taken} == taken
    assert sizes.most_slots(available) == max((n for n, size in taken.items() if size <= available), default=0)
    failed = data.draw(st.integers(1, sizes.num_experts))
    others = [n for n, size in taken.items() if size <= available and n != failed]
    assert sizes.most_slots(available, but=failed) == max(others, default=0)


def test_with_one_layer_more_slots_can_take_less() -> None:
    sizes = BankSizes((4096,), 16, 4, 24 * GIB)
    assert sizes.bytes(1) > sizes.bytes(16)
    assert sizes.most_slots(16 * 4096) == 16


@pytest.mark.parametrize(
    ("window", "length", "step", "tokens"),
    [(None, 4096, 8192, 4096), (1024, 4096, 2048, 3071), (1024, 4096, 8192, 4096), (1024, 100, 16, 100)],
)
def test_a_sliding_layer_keeps_its_window_and_the_step(window: int | None, length: int, step: int, tokens: int) -> None:
    assert KvLayer(128, window).elements_of(length, step) == 128 * tokens


def test_a_demand_is_the_sum_of_its_parts() -> None:
    demand = DeviceDemand(1000, 200, 30, BankSizes((16, 16), 8, 2, 2**20))
    assert demand.bytes(3) == 1230 + 2 * 3 * 16 + 2 * 5 * 16
    assert demand.bytes(8) == 1230 + 2 * 8 * 16
    assert [demand.most_slots(demand.bytes(1) + extra) for extra in (-1, 0)] == [0, 8]
