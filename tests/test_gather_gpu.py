"""The gather kernel on a CUDA device: the mirror's banks, one captured graph for changing lists, live host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from random_experts import as_bytes, fill, filled_store, layouts, load_cases, poisoned_bank, same_bytes

from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import RecordLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

LAYOUT = RecordLayout(
    {
        "w13_weight_packed": ((176, 352), torch.int32),
        "w13_weight_scale": ((44, 176), torch.bfloat16),
        "w2_weight_packed": ((11, 704), torch.int32),
        "w2_global_scale": ((), torch.float32),
    }
)


@triton.jit
def write_byte(address, value) -> None:  # type: ignore[no-untyped-def]
    tl.store(address.to(tl.pointer_type(tl.uint8)), value.to(tl.uint8))


def on_gpu(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@given(layouts, st.integers(1, 9), st.integers(1, 7), st.integers(1, 64), st.data())
@settings(deadline=None, max_examples=60)
def test_a_bank_is_what_the_mirror_makes(
    layout: RecordLayout, num_experts: int, bank_rows: int, programs: int, data: st.DataObject
) -> None:
    store = filled_store(num_experts, layout)
    store.page_lock()
    experts, rows, count, first, copied = load_cases(data, num_experts, bank_rows)
    bank, mirror = poisoned_bank(bank_rows, layout, "cuda"), poisoned_bank(bank_rows, layout)
    gather = Gather(layout, bank, programs)
    gather(store.device_address, on_gpu(experts), on_gpu(rows), on_gpu([count]), first)
    mirror.load(store, torch.tensor([experts[e] for e in copied]), torch.tensor([rows[e] for e in copied]))
    assert same_bytes(bank, mirror)


def captured(gather: Gather, *arguments: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gather(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather(*arguments)
    return graph


def test_a_captured_launch_follows_its_lists() -> None:
    store = filled_store(40, LAYOUT)
    store.page_lock()
    bank, mirror = poisoned_bank(12, LAYOUT, "cuda"), poisoned_bank(12, LAYOUT)
    experts, rows, count = on_gpu([0] * 40), on_gpu([0] * 40), on_gpu([0])
    graph = captured(Gather(LAYOUT, bank), store.device_address, experts, rows, count, 0)
    assert same_bytes(bank, mirror)  # neither warm-up nor capture loads anything
    generator = torch.Generator().manual_seed(1)
    for length in (3, 0, 12, 1, 7):
        chosen = torch.randperm(40, generator=generator)
        places = torch.randperm(12, generator=generator)
        experts.copy_(chosen)
        rows[:12] = places.int()
        count.fill_(length)
        graph.replay()
        mirror.load(store, chosen[:length], places[:length])
        assert same_bytes(bank, mirror)


def test_the_device_reads_and_writes_the_hosts_own_memory() -> None:
    store = filled_store(2, LAYOUT)
    store.page_lock()
    assert store.device_address is not None
    bank = poisoned_bank(1, LAYOUT, "cuda")
    gather = Gather(LAYOUT, bank)
    lists = on_gpu([1]), on_gpu([0]), on_gpu([1])
    for seed in (5, 6):
        fill(store.field("w13_weight_packed"), seed)
        gather(store.device_address, *lists)
        expected = as_bytes(store.field("w13_weight_packed")[1])
        assert torch.equal(as_bytes(bank.fields["w13_weight_packed"]), expected)
    start = store.field("w13_weight_packed")[0, :1, :1].view(torch.uint8)
    for value in (0x5A, 0xA5):
        write_byte[(1,)](store.device_address, value)
        torch.cuda.synchronize()
        assert start[0, 0] == value


def test_page_locking_ends_with_the_store() -> None:
    store = filled_store(2, LAYOUT)
    view = store.field("w13_weight_packed")
    store.page_lock()
    assert view.is_pinned()
    del store
    assert not view.is_pinned()
