"""Sizes on the GPU as arithmetic: records in Marlin's layout, staging, the KV cache, the largest cache that fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.bank_sizes import BankSizes, ExpertShape, streamed_bytes
from vllm_hlwq.host_store import RecordLayout
from vllm_hlwq.sizing import (
    HIT_RATES,
    DenseModel,
    DeviceDemand,
    DeviceEstimate,
    KvLayer,
    Step,
    expected_hits,
    graphs_captured,
    kv_floor_elements,
)
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


# The reference backend, and experts in 16 bit.


def stored_layout(shape: ExpertShape) -> RecordLayout:
    """An expert's record as the layer makes it of a checkpoint's tensors."""
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    inner = (2 if shape.gated else 1) * shape.width
    for name, rows, columns in (("w13", inner, shape.hidden), ("w2", shape.hidden, shape.width)):
        if not shape.packed:
            fields[f"{name}_weight"] = ((rows, columns), torch.bfloat16)
            continue
        groups = columns // shape.group_size if shape.group_size else 1
        fields[f"{name}_weight_packed"] = ((rows, columns // 8), torch.int32)
        fields[f"{name}_weight_scale"] = ((rows, groups), torch.bfloat16)
        if shape.zero_points:
            fields[f"{name}_weight_zero_point"] = ((rows // 8, groups), torch.int32)
    return RecordLayout(fields)


@given(expert_shapes(), st.booleans())
def test_a_stored_record_is_as_large_as_its_layout(shape: ExpertShape, packed: bool) -> None:
    if not packed:
        shape = ExpertShape(shape.hidden, shape.width, None, gated=shape.gated, packed=False)
        assert shape.record_bytes == shape.stored_bytes
    assert shape.stored_bytes == stored_layout(shape).record_bytes


def test_16_bit_experts_by_hand() -> None:
    shape = ExpertShape(2048, 768, None, packed=False)
    assert shape.record_bytes == 3 * 2048 * 768 * 2
    assert shape.padded_width == 768
    assert shape.workspace_bytes(100, 8) == 800 * (3 * 768 + 2048) * 2


def test_the_reference_backend_has_one_staging_bank_of_two_tokens() -> None:
    sizes = BankSizes((100, 100, 60), 16, 3, 0, reference=True)
    assert [sizes.staging_rows(n, 100) for n in (1, 12, 16)] == [6, 4, 0]
    assert sizes.staging_bytes(4) == 6 * 160
    assert sizes.host_bytes(4) == 16 * 260
    assert sizes.host_bytes(16) == 0
    assert BankSizes((100,), 16, 3, 0, 2, reference=True).staging_rows(4, 100) == 2


# What is taken at most.

DENSE = DenseModel(bytes=1000, whole_bytes=2000, hidden=16, row_elements=100, vocabulary=50, rotary_elements=64)


def test_an_estimate_by_hand() -> None:
    banks = BankSizes((4096, 4096), 8, 2, 64 * 100)
    shape = ExpertShape(128, 64, 32)
    step = Step(tokens=10, sequences=4, graphs=3)
    estimate = DeviceEstimate.of(DENSE, (shape, shape), step, 777, banks)
    assert estimate == DeviceEstimate(
        dense=1000 + 2000 // 50 + 2 * 64,
        workspace=shape.workspace_bytes(10, 2),
        activations=10 * 2 * 2 * (100 + 8 * 16),  # more than sampling, 4 * 50 * 12
        sampler=4 * 50 * 5,
        graphs=64 * 2**20 + 3 * 2 * 384 * 2**10,
        kv_cache=777,
        margin=512 * 2**20 + 100 + 2 * 4 * 2 * 2**20,
        banks=banks,
    )
    parts = DeviceEstimate(1, 20, 300, 4000, 50_000, 600_000, 7_000_000, banks)
    assert parts.bytes(3) == 7_654_321 + banks.bytes(3)
    assert [parts.most_slots(parts.bytes(1) + extra) for extra in (-1, 0)] == [0, 1]
    assert DENSE.transient_bytes(Step(1, 40, 0)) == 40 * 50 * 12
    assert DENSE.transient_bytes(Step(1, 40, 0, v2_runner=False)) == 40 * 50 * 32
    assert DENSE.sampler_bytes(Step(1, 40, 0, v2_runner=False)) == 0
    assert DeviceEstimate.of(DENSE, (shape,), Step(10, 4, 0), 0, banks).graphs == 0


sizes_of_models = st.integers(0, 10**6)


@given(
    dense=st.builds(DenseModel, *[sizes_of_models] * 6),
    shapes=st.lists(expert_shapes(), min_size=1, max_size=4),
    step=st.builds(Step, st.integers(1, 10**4), st.integers(1, 10**3), st.integers(0, 100), st.booleans()),
    kv_cache=sizes_of_models,
    experts=st.integers(1, 24),
    top_k=st.integers(1, 8),
    room=st.integers(0, 2**33),
)
def test_an_estimate_is_no_less_than_a_demand_and_its_number_fits(
    dense: DenseModel,
    shapes: list[ExpertShape],
    step: Step,
    kv_cache: int,
    experts: int,
    top_k: int,
    room: int,
) -> None:
    banks = BankSizes(tuple(shape.record_bytes for shape in shapes), experts, top_k, 2**34)
    estimate = DeviceEstimate.of(dense, shapes, step, kv_cache, banks)
    workspace = max(shape.workspace_bytes(step.tokens, top_k) for shape in shapes)
    demand = DeviceDemand(dense.bytes, workspace, kv_cache, banks)
    most = estimate.most_slots(room)
    fitting = [n for n in range(1, experts + 1) if estimate.bytes(n) <= room]
    assert most == max(fitting, default=0)
    assert most <= demand.most_slots(room)
    assert all(demand.bytes(n) <= estimate.bytes(n) for n in range(1, experts + 1))


def test_the_floor_of_a_hybrid_cache_by_hand() -> None:
    sliding, full = KvLayer(10, 100), KvLayer(4, None)
    # Groups of two: five sliding layers fill three, two full ones one. 100 - 1 + 64 tokens, 1000, and 128 of blocks.
    wanted = 6 * 10 * (163 + 128) + 2 * 4 * (1000 + 128)
    assert kv_floor_elements([sliding] * 5 + [full] * 2, 1000, 64) == wanted
    # Nearly as many of each: all groups as large as the larger kind.
    assert kv_floor_elements([sliding] * 5 + [full] * 4, 1000, 64) == 5 * 10 * 291 + 5 * 4 * 1128
    # Half as many again is not nearly as many: groups of two.
    assert kv_floor_elements([sliding] * 3 + [full] * 2, 1000, 64) == 4 * 10 * 291 + 2 * 4 * 1128
    assert kv_floor_elements([full] * 7, 1000, 64) == 7 * 4 * 1128
    assert kv_floor_elements([], 1000, 64) == 0


@pytest.mark.parametrize(
    ("sequences", "tokens", "sizes"),
    [
        (256, 2048, [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]),
        (16, 2048, [1, 2, 4, 8, 16, 24, 32]),
        (3, 2048, [1, 2, 3, 4]),
        (16, 20, [1, 2, 4, 8, 16]),
        (1024, 8192, [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]),
    ],
)
def test_graphs_that_vllm_captures(sequences: int, tokens: int, sizes: list[int]) -> None:
    assert graphs_captured(sequences, tokens) == 2 * len(sizes)


def test_bytes_over_the_link() -> None:
    sizes = BankSizes((100, 60), 128, 8, 0)
    assert streamed_bytes(sizes, 0) == 8 * 160
    assert streamed_bytes(sizes, 1000) == 0
    assert streamed_bytes(sizes, 999) == 2  # 1.28, rounded up


@given(st.integers(1, 1023).flatmap(lambda experts: st.tuples(st.integers(1, experts), st.just(experts))))
def test_expected_hits_rise_with_the_slots(case: tuple[int, int]) -> None:
    slots, experts = case
    hits = expected_hits(slots, experts)
    assert 0 <= hits <= 1000
    assert slots == 1 or expected_hits(slots - 1, experts) <= hits
    assert expected_hits(experts, experts) == 1000


def test_expected_hits_are_those_that_were_seen() -> None:
    assert [expected_hits(n, 128) for n in (16, 32, 64)] == [450, 670, 890]
    assert HIT_RATES[1:4] == ((125, 450), (250, 670), (500, 890))
    assert expected_hits(48, 128) == 780
    with pytest.raises(ValueError, match="129 slots are more than 128 experts"):
        expected_hits(129, 128)
