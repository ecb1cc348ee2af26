"""The audit of a cache finds what is wrong, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from random_experts import filled_store

from vllm_hlwq.expert_cache import COUNTERS, EMPTY
from vllm_hlwq.host_expert_cache import HostExpertCache
from vllm_hlwq.host_store import RecordLayout
from vllm_hlwq.reference_backend import ReferenceBackend
from vllm_hlwq.slot_audit import audit
from vllm_hlwq.weight_bank import WeightBank

LAYOUT = RecordLayout({"w13_weight": ((6, 4), torch.bfloat16), "w2_weight": ((4, 3), torch.bfloat16)})
EXPERTS, SLOTS = 8, 3


@pytest.fixture
def cache() -> HostExpertCache:
    """After two steps: experts 4, 1, 6 in slots, 4 by eviction."""
    store = filled_store(EXPERTS, LAYOUT)
    staging = WeightBank.allocate(2, LAYOUT, torch.device("cpu"))
    made = HostExpertCache(store, SLOTS, staging, object.__new__(ReferenceBackend), torch.device("cpu"))
    for ids in ([[2, 1, 6]], [[4, 1, 6]]):
        for _ in made._waves(torch.tensor(ids)):
            pass
    assert made.table is not None
    assert made.table.expert_of_slot.tolist() == [4, 1, 6]
    return made


def test_a_cache_in_order(cache: HostExpertCache) -> None:
    assert audit(cache) == []
    cache.reset()
    assert audit(cache) == []


def test_a_step_that_breaks_off_leaves_no_expert_named_without_its_bytes(
    cache: HostExpertCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(bank: WeightBank, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WeightBank, "load", interrupted)
    ids = torch.tensor([[0, 1, 5]])
    with pytest.raises(KeyboardInterrupt):
        cache.step(torch.zeros(1, 4), torch.ones(1, 3), ids, torch.empty(1, 4))
    assert cache.table is not None
    assert cache.table.expert_of_slot.tolist() == [EMPTY] * SLOTS
    assert audit(cache) == []


def test_a_resident_layer_has_nothing_to_audit() -> None:
    store = filled_store(EXPERTS, LAYOUT)
    assert audit(HostExpertCache(store, EXPERTS, None, object.__new__(ReferenceBackend), torch.device("cpu"))) == []


def count(cache: HostExpertCache, name: str, by: int) -> None:
    assert cache.table is not None
    cache.table.counters[COUNTERS.index(name)] += by


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda cache: cache.table.expert_of_slot.__setitem__(2, 1),
            ["slot 2 holds expert 1, which is said to be in slot 1",
             "expert 6 is said to be in slot 2, which does not hold it",
             "slot 2: w13_weight is not that of expert 1", "slot 2: w2_weight is not that of expert 1"],
        ),
        (
            lambda cache: cache.table.slot_of_expert.__setitem__(7, 0),
            ["expert 7 is said to be in slot 0, which does not hold it"],
        ),
        (
            lambda cache: cache.table.slot_of_expert.__setitem__(7, 99),
            ["expert 7 is said to be in slot 99, which does not hold it"],
        ),
        (
            lambda cache: cache.table.expert_of_slot.__setitem__(0, 8),
            ["slot 0 holds expert 8, which does not exist", "expert 4 is said to be in slot 0, which does not hold it"],
        ),
        (
            lambda cache: cache.slot_bank.fields["w2_weight"][1].zero_(),
            ["slot 1: w2_weight is not that of expert 1"],
        ),
        (lambda cache: count(cache, "hits", 1), ["6 queries, but 7 hits, admissions and staged experts"]),
        (lambda cache: count(cache, "evictions", 4), ["5 evictions, but only 4 admissions"]),
    ],
)  # fmt: skip
def test_faults_are_named(
    cache: HostExpertCache, spoil: Callable[[HostExpertCache], object], expected: list[str]
) -> None:
    spoil(cache)
    assert audit(cache) == expected
