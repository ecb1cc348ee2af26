"""What is copied ahead: runs of successive experts, the rows they go to, and what the host reads of the slot tables."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_experts import filled_store, layouts, poisoned_bank, same_bytes

from vllm_hlwq.host_store import RecordLayout
from vllm_hlwq.prefetching import copy_records, runs


@given(st.sets(st.integers(0, 40)))
def test_runs_are_the_longest_stretches(experts: set[int]) -> None:
    found = list(runs(sorted(experts)))
    assert [expert for first, end in found for expert in range(first, end)] == sorted(experts)
    assert all(first < end for first, end in found)
    assert all(end < first for (_, end), (first, _) in pairwise(found))


def check(layout: RecordLayout, num_experts: int, experts: list[int], spare: int, device: str) -> None:
    store = filled_store(num_experts, layout)
    stream = None
    if device == "cuda":
        store.page_lock()
        stream = torch.cuda.Stream()
    bank, mirror = (poisoned_bank(len(experts) + spare, layout, d) for d in (device, "cpu"))
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    copy_records(store, experts, bank, stream)
    if stream is not None:
        stream.synchronize()
    mirror.load(store, torch.tensor(experts, dtype=torch.int64), torch.arange(len(experts)))
    assert same_bytes(bank, mirror)


@given(layouts, st.integers(1, 12), st.integers(1, 3), st.data())
@settings(deadline=None, max_examples=80)
def test_experts_go_to_the_first_rows(layout: RecordLayout, num_experts: int, spare: int, data: st.DataObject) -> None:
    experts = sorted(data.draw(st.sets(st.integers(0, num_experts - 1))))
    check(layout, num_experts, experts, spare, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")
@given(layouts, st.integers(1, 12), st.integers(1, 3), st.data())
@settings(deadline=None, max_examples=80)
def test_copy_engines_bring_experts_to_the_first_rows(
    layout: RecordLayout, num_experts: int, spare: int, data: st.DataObject
) -> None:
    experts = sorted(data.draw(st.sets(st.integers(0, num_experts - 1))))
    check(layout, num_experts, experts, spare, "cuda")
