"""Stores and banks of random bytes, and the comparison of banks byte for byte."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.weight_bank import WeightBank

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


def fill(tensor: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (tensor.numel() * tensor.itemsize,), dtype=torch.uint8, generator=generator)
    tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def filled_store(num_experts: int, layout: RecordLayout) -> HostStore:
    store = HostStore(num_experts, layout)
    for seed, name in enumerate(layout):
        fill(store.field(name), seed)
    return store


def poisoned_bank(rows: int, layout: RecordLayout, device: str = "cpu") -> WeightBank:
    """A bank of random bytes, the same for every device."""
    bank = WeightBank.allocate(rows, layout, torch.device(device))
    for tensor in bank.fields.values():
        fill(tensor, 99)
    return bank


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def same_bytes(one: WeightBank, other: WeightBank) -> bool:
    return all(torch.equal(as_bytes(one.fields[name]), as_bytes(other.fields[name])) for name in one.fields)


def load_cases(data: st.DataObject, num_experts: int, bank_rows: int) -> tuple[list[int], list[int], int, int, range]:
    """Lists of a gather: experts, rows, count, first, and the entries that such a call copies (to distinct rows)."""
    experts = data.draw(st.permutations(range(num_experts)), label="experts")
    count = data.draw(st.integers(0, num_experts), label="count")
    first = data.draw(st.integers(0, num_experts), label="first")
    rows = data.draw(st.lists(st.integers(0, bank_rows - 1), min_size=num_experts, max_size=num_experts), label="rows")
    copied = range(first, max(first, min(count, first + bank_rows)))
    for entry, row in zip(copied, data.draw(st.permutations(range(bank_rows)), label="rows copied to"), strict=False):
        rows[entry] = row
    return experts, rows, count, first, copied
