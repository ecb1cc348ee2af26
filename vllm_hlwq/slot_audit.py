"""Is a layer's cache in order? Its two maps against each other, its counters, and its slots' bytes against the store.

For soak tests and for who suspects a fault: it copies every slot to the host, so it takes time between two steps.
"""

from __future__ import annotations

import torch

from .device_expert_cache import DeviceExpertCache
from .expert_cache import EMPTY
from .host_expert_cache import HostExpertCache


def audit(cache: HostExpertCache | DeviceExpertCache) -> list[str]:
    """Say what is wrong with a cache, one line a fault; nothing if all is well or all experts are resident."""
    if cache.table is None or cache.store is None:
        return []
    expert_of_slot = cache.table.expert_of_slot.tolist()
    slot_of_expert = cache.table.slot_of_expert.tolist()
    found = _map_faults(expert_of_slot, slot_of_expert) + _counter_faults(cache.table.counts())
    for slot, expert in enumerate(expert_of_slot):
        if 0 <= expert < cache.num_experts:
            fields = cache.slot_bank.fields.items()
            wrong = [n for n, t in fields if not _same_bytes(t[slot], cache.store.field(n)[expert])]
            found += [f"slot {slot}: {name} is not that of expert {expert}" for name in wrong]
    return found


def _map_faults(expert_of_slot: list[int], slot_of_expert: list[int]) -> list[str]:
    """Each slot must hold an expert that names that slot, each expert a slot that names that expert: none is twice."""
    found = []
    for slot, expert in enumerate(expert_of_slot):
        if expert != EMPTY and not 0 <= expert < len(slot_of_expert):
            found.append(f"slot {slot} holds expert {expert}, which does not exist")
        elif expert != EMPTY and slot_of_expert[expert] != slot:
            found.append(f"slot {slot} holds expert {expert}, which is said to be in slot {slot_of_expert[expert]}")
    for expert, slot in enumerate(slot_of_expert):
        if slot != EMPTY and not (0 <= slot < len(expert_of_slot) and expert_of_slot[slot] == expert):
            found.append(f"expert {expert} is said to be in slot {slot}, which does not hold it")
    return found


def _counter_faults(counts: dict[str, int]) -> list[str]:
    answered = counts["hits"] + counts["admitted"] + counts["staged"]
    found = []
    if counts["queries"] != answered:
        found.append(f"{counts['queries']} queries, but {answered} hits, admissions and staged experts")
    if counts["evictions"] > counts["admitted"]:
        found.append(f"{counts['evictions']} evictions, but only {counts['admitted']} admissions")
    return found


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are alike to the byte, NaN and all."""
    as_bytes = (tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*as_bytes)
