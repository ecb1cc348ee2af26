"""Records: what is written through one view is read back through another, at the exact size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.host_store import FIELD_ALIGNMENT, HostStore, RecordLayout
from vllm_hlwq.weight_bank import WeightBank

DTYPES = (torch.uint8, torch.int32, torch.bfloat16, torch.float32)

shapes = st.dictionaries(
    st.sampled_from(["w13_weight", "w13_scale", "w2_weight", "w2_scale", "w2_bias"]),
    st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=2).map(tuple), st.sampled_from(DTYPES)),
    min_size=1,
)


@given(shapes)
def test_fields_are_aligned_and_do_not_overlap(fields: dict) -> None:
    layout = RecordLayout(fields)
    end = 0
    for name, (shape, dtype) in fields.items():
        assert layout[name].offset % FIELD_ALIGNMENT == 0
        assert layout[name].offset >= end
        end = layout[name].offset + torch.empty(shape, dtype=dtype).nbytes
    assert end <= layout.record_bytes < end + FIELD_ALIGNMENT


def test_fields_begin_at_multiples_of_16_bytes() -> None:
    """The widest load of a GPU thread, which the gather kernel counts on."""
    layout = RecordLayout(
        {
            "w13_weight": ((3,), torch.uint8),
            "w13_scale": ((5,), torch.int32),
            "w2_weight": ((2, 4), torch.bfloat16),
            "w2_scale": ((), torch.float32),
        }
    )
    assert [field.offset for field in layout.values()] == [0, 16, 48, 64]
    assert layout.record_bytes == 80


def test_layouts_are_alike_only_with_equal_names_shapes_and_dtypes() -> None:
    def key(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> object:
        return RecordLayout({"w13_weight": ((4, 8), torch.int32), name: (shape, dtype)}).key()

    first = key("w2_weight", (2, 6), torch.float16)
    assert first == key("w2_weight", (2, 6), torch.float16)
    assert first != key("w2_weight", (6, 2), torch.float16)
    assert first != key("w2_weight", (2, 6), torch.bfloat16)
    assert first != key("w2_scale", (2, 6), torch.float16)


@given(shapes, st.integers(1, 5), st.data())
@settings(deadline=None)
def test_a_load_brings_exactly_that_experts_fields(fields: dict, num_experts: int, data: st.DataObject) -> None:
    store = HostStore(num_experts, RecordLayout(fields))
    assert store.nbytes == num_experts * store.layout.record_bytes
    for seed, name in enumerate(fields):
        field = store.field(name)
        field.copy_(torch.randint(0, 100, field.shape, generator=torch.Generator().manual_seed(seed)))
    rows = data.draw(st.integers(1, 4))
    experts = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=rows, max_size=rows))
    bank = WeightBank.allocate(rows, store.layout, torch.device("cpu"))
    bank.load(store, torch.tensor(experts), torch.arange(rows))
    for name in fields:
        for row, expert in enumerate(experts):
            assert torch.equal(bank.fields[name][row], store.field(name)[expert])


@pytest.mark.parametrize(("experts", "rows"), [([1, 2], [0]), ([1], [0, 1])])
def test_experts_without_a_row_each_are_not_loaded(experts: list[int], rows: list[int]) -> None:
    store = HostStore(3, RecordLayout({"w13_weight": ((2, 4), torch.bfloat16)}))
    bank = WeightBank.allocate(2, store.layout, torch.device("cpu"))
    with pytest.raises(ValueError, match="zip"):
        bank.load(store, torch.tensor(experts), torch.tensor(rows))


def test_a_store_is_zero_and_a_resident_bank_on_the_cpu_is_the_store_itself() -> None:
    store = HostStore(3, RecordLayout({"w13_weight": ((2, 4), torch.bfloat16)}))
    assert not store.field("w13_weight").any()
    bank = WeightBank.resident(store, torch.device("cpu"))
    store.field("w13_weight")[1] = 7
    assert bank.fields["w13_weight"][1].tolist() == [[7] * 4] * 2
    assert bank.rows == 3


def test_memory_that_cannot_be_had_is_refused_with_its_size() -> None:
    layout = RecordLayout({"w13_weight": ((1 << 40,), torch.uint8)})
    with pytest.raises(ExpertCacheError, match=rf"{1 << 50} bytes"):
        HostStore(1 << 10, layout)
