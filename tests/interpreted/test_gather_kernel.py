"""The gather kernel in Triton's interpreter: banks are byte for byte what the mirror makes of the same list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_experts import as_bytes, filled_store, layouts, load_cases, poisoned_bank, same_bytes

from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.weight_bank import WeightBank

CPU = torch.device("cpu")
SMALLEST_CHUNK = 4096  # 16 bytes for each of 256 threads


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@given(layouts, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_a_bank_is_what_the_mirror_makes(
    layout: RecordLayout, num_experts: int, bank_rows: int, programs: int, data: st.DataObject
) -> None:
    store = filled_store(num_experts, layout)
    experts, rows, count, first, copied = load_cases(data, num_experts, bank_rows)
    bank, mirror = poisoned_bank(bank_rows, layout), poisoned_bank(bank_rows, layout)
    gather = Gather(layout, bank, programs=programs, chunk_bytes=SMALLEST_CHUNK)
    gather(store.address, int32(experts), int32(rows), int32([count]), first)
    mirror.load(store, torch.tensor([experts[e] for e in copied]), torch.tensor([rows[e] for e in copied]))
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
            assert torch.equal(as_bytes(bank.fields[name]), as_bytes(store.field(name)[expected]))


def test_records_past_four_gigabytes_are_found() -> None:
    """In 32 bits the last record would lie where that of expert 1 does. Most of the store is never touched."""
    layout = RecordLayout({"w13_weight": ((2**14,), torch.int32)})
    store = HostStore(2**16 + 2, layout)
    store.field("w13_weight")[-1] = torch.arange(2**14, dtype=torch.int32)
    bank = poisoned_bank(1, layout)
    Gather(layout, bank, chunk_bytes=2**16)(store.address, int32([2**16 + 1]), int32([0]), int32([1]))
    assert torch.equal(bank.fields["w13_weight"], store.field("w13_weight")[-1:])


def test_a_bank_that_begins_between_16_bytes_is_filled_whole() -> None:
    layout = RecordLayout({"w13_weight": ((40, 8), torch.int32)})
    store = filled_store(3, layout)
    words = torch.zeros(2 * 40 * 8 + 1, dtype=torch.int32)
    bank = WeightBank({"w13_weight": words[1:].view(2, 40, 8)})
    Gather(layout, bank)(store.address, int32([2, 0]), int32([0, 1]), int32([2]))
    assert torch.equal(bank.fields["w13_weight"], store.field("w13_weight")[[2, 0]])
    assert words[0] == 0


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


@pytest.mark.parametrize("chunk_bytes", [2048, 6144])
def test_chunks_that_threads_cannot_share_are_refused(chunk_bytes: int) -> None:
    layout = RecordLayout({"w13_weight": ((4, 4), torch.int32)})
    with pytest.raises(ValueError, match=f"{chunk_bytes} bytes"):
        Gather(layout, WeightBank.allocate(1, layout, CPU), chunk_bytes=chunk_bytes)
