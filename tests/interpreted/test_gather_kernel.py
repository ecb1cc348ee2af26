"""The gather kernel in Triton's interpreter: banks are byte for byte what the mirror makes of the same list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.weight_bank import WeightBank

CPU = torch.device("cpu")
SMALLEST_CHUNK = 2048  # 16 bytes for each of 128 threads

fields = st.tuples(
    st.one_of(
        st.lists(st.integers(1, 9), max_size=3).map(tuple),  # odd sizes, single values
        st.tuples(st.integers(1, 80), st.just(16)),  # 16-byte rows, up to several chunks
        st.just((0,)),  # an unused index
    ),
    st.sampled_from((torch.uint8, torch.int32, torch.bfloat16, torch.float16)),
)
layouts = (
    st.lists(fields, min_size=1, max_size=5)
    .map(lambda found: RecordLayout({f"w{number}": field for number, field in enumerate(found)}))
    .filter(lambda layout: layout.record_bytes > 0)
)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_bytes(tensor: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (tensor.numel() * tensor.itemsize,), dtype=torch.uint8, generator=generator)
    tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def filled_store(num_experts: int, layout: RecordLayout) -> HostStore:
    store = HostStore(num_experts, layout)
    for seed, name in enumerate(layout):
        random_bytes(store.field(name), seed)
    return store


def poisoned_bank(rows: int, layout: RecordLayout) -> WeightBank:
    bank = WeightBank.allocate(rows, layout, CPU)
    for tensor in bank.fields.values():
        random_bytes(tensor, 99)
    return bank


def same_bytes(one: WeightBank, other: WeightBank) -> bool:
    return all(torch.equal(one.fields[n].view(torch.uint8), other.fields[n].view(torch.uint8)) for n in one.fields)


@given(layouts, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_a_bank_is_what_the_mirror_makes(
    layout: RecordLayout, num_experts: int, bank_rows: int, programs: int, data: st.DataObject
) -> None:
    store = filled_store(num_experts, layout)
    experts = data.draw(st.permutations(range(num_experts)), label="experts")
    count = data.draw(st.integers(0, num_experts), label="count")
    first = data.draw(st.integers(0, num_experts), label="first")
    entries = range(first, min(count, first + bank_rows))
    rows = data.draw(st.lists(st.integers(0, bank_rows - 1), min_size=num_experts, max_size=num_experts), label="rows")
    chosen = data.draw(st.permutations(range(bank_rows)), label="rows of the entries copied")
    for entry, row in zip(entries, chosen, strict=False):
        rows[entry] = row

    bank, mirror = poisoned_bank(bank_rows, layout), poisoned_bank(bank_rows, layout)
    gather = Gather(layout, bank, programs=programs, chunk_bytes=SMALLEST_CHUNK)
    gather(store.address, int32(experts), int32(rows), int32([count]), first)
    mirror.load(store, torch.tensor([experts[e] for e in entries]), torch.tensor([rows[e] for e in entries]))
    assert same_bytes(bank, mirror)


def test_calls_with_offsets_fill_a_bank_again_and_again() -> None:
    layout = RecordLayout({"w13_weight": ((40, 33), torch.int32), "w2_global_scale": ((), torch.float32)})
    store = filled_store(7, layout)
    bank = poisoned_bank(3, layout)
    gather = Gather(layout, bank, programs=5, chunk_bytes=SMALLEST_CHUNK)
    experts, rows, count = int32([6, 0, 3, 5, 1]), int32([0, 1, 2, 0, 1]), int32([5])
    for first, expected in ((0, [6, 0, 3]), (3, [5, 1, 3]), (6, [5, 1, 3])):
        gather(store.address, experts, rows, count, first)
        for name in layout:
            assert torch.equal(bank.fields[name].view(torch.uint8), store.field(name)[expected].view(torch.uint8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"w13_weight": torch.zeros(2, 4, 4, dtype=torch.int32).transpose(1, 2)}, "strides"),
        ({"w13_weight": torch.zeros(2, 4, 4)}, "float32"),
        ({"w13_weight": torch.zeros(2, 4, 5, dtype=torch.int32)}, r"\(2, 4, 5\)"),
        ({"w2_weight": torch.zeros(2, 4, 4, dtype=torch.int32)}, "w2_weight"),
    ],
)
def test_a_bank_that_does_not_fit_the_records_is_refused(fields: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gather(RecordLayout({"w13_weight": ((4, 4), torch.int32)}), WeightBank(fields))


@pytest.mark.parametrize("chunk_bytes", [1024, 3072])
def test_chunks_that_threads_cannot_share_are_refused(chunk_bytes: int) -> None:
    layout = RecordLayout({"w13_weight": ((4, 4), torch.int32)})
    with pytest.raises(ValueError, match=f"{chunk_bytes} bytes"):
        Gather(layout, WeightBank.allocate(1, layout, CPU), chunk_bytes=chunk_bytes)
