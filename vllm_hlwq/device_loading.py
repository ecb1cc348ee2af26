"""From loaded checkpoint tensors to a layer's cache on CUDA: conversion in chunks, banks, and what does not fit.

Experts are repacked on the GPU a chunk at a time, so that at no time more of a layer is there than its banks and one
chunk, and in host memory no more than the experts once and one layer. Those that the kernels read as they were loaded
stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .device_backend import DeviceBackend
from .device_expert_cache import DeviceExpertCache, Staging
from .errors import ExpertCacheError
from .host_store import HostStore, RecordLayout
from .options import flag
from .weight_bank import WeightBank

CHUNK_BYTES = 64 * 2**20
"""Raw bytes that are converted at a time; the conversion needs about four times as much for a moment."""
STAGING_SHARE = 1 / 16
"""Of the device's memory, for staging by default: 1.5 GiB on a 24 GiB card, where a layer of experts is 0.4 GB."""
STAGING_BANKS = 2


def converted_chunks(
    raw: HostStore, backend: DeviceBackend, device: torch.device
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """First expert and kernel-layout fields ``[chunk, ...]`` of each chunk of a layer, on the device."""
    step = max(1, CHUNK_BYTES // raw.layout.record_bytes)
    for start in range(0, raw.num_experts, step):
        chunk = {name: raw.field(name)[start : start + step].to(device) for name in raw.layout}
        yield start, backend.convert(chunk)


def kernel_layout(raw: HostStore, backend: DeviceBackend, device: torch.device) -> RecordLayout:
    """Layout of a converted expert, found by converting one."""
    if not backend.converts:
        return raw.layout
    one = backend.convert({name: raw.field(name)[:1].to(device) for name in raw.layout})
    return RecordLayout({name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in one.items()})


def convert_store(raw: HostStore, layout: RecordLayout, backend: DeviceBackend, device: torch.device) -> HostStore:
    """A layer's experts in the kernels' layout, in page-locked memory.

    Raises:
        ExpertCacheError: the memory cannot be mapped or page-locked.
    """
    if not backend.converts:
        raw.page_lock()
        return raw
    store = HostStore(raw.num_experts, layout, device)
    store.page_lock()
    for start, fields in converted_chunks(raw, backend, device):
        for name, tensor in fields.items():
            store.field(name)[start : start + len(tensor)].copy_(tensor)
    return store


def resident_bank(raw: HostStore, layout: RecordLayout, backend: DeviceBackend, device: torch.device) -> WeightBank:
    """All experts of a layer on the device, in the kernels' layout."""
    bank = WeightBank.allocate(raw.num_experts, layout, device)
    for start, fields in converted_chunks(raw, backend, device):
        for name, tensor in fields.items():
            bank.fields[name][start : start + len(tensor)] = tensor
    return bank


def staging_rows(num_experts: int, num_slots: int, top_k: int, record_bytes: int, device_bytes: int) -> int:
    """Experts that each staging bank holds by default.

    All that can be without a slot, so that a step has at most one staged wave, as far as ``STAGING_SHARE`` of the
    device's memory goes; but no fewer than a token may name, so that a small step needs few waves.
    """
    wanted = num_experts - num_slots
    affordable = int(device_bytes * STAGING_SHARE) // (STAGING_BANKS * record_bytes)
    return min(wanted, max(affordable, top_k))


def load_cache(
    raw: HostStore,
    backend: DeviceBackend,
    num_slots: int,
    num_layers: int,
    top_k: int,
    max_tokens: int,
    staging_size: int | None,
    others: list[DeviceExpertCache],
    device: torch.device,
) -> DeviceExpertCache:
    """Make a layer's cache out of its loaded experts.

    Args:
        raw: the experts as loaded.
        backend: the layer's.
        num_slots: slots, or all experts.
        num_layers: layers of the model with a cache, to say how many slots would fit.
        top_k: experts of a token.
        max_tokens: rows of the largest step.
        staging_size: experts of a staging bank; None for the default.
        others: caches of this engine's layers that are made already; one of the same layout lends its staging.
        device: where the banks go.

    Raises:
        ExpertCacheError: the device has no room for the banks, or the host none for the experts.
    """
    layout = kernel_layout(raw, backend, device)
    try:
        if num_slots == raw.num_experts:
            bank = resident_bank(raw, layout, backend, device)
            return DeviceExpertCache(None, bank, None, backend, raw.num_experts, top_k, max_tokens)
        staging = next((o.staging_bank for o in others if o.staging_bank and o.layout_key == layout.key()), None)
        if staging is None:
            _, device_bytes = torch.cuda.mem_get_info(device)
            rows = staging_size or staging_rows(raw.num_experts, num_slots, top_k, layout.record_bytes, device_bytes)
            staging = Staging.allocate(min(rows, raw.num_experts - num_slots), STAGING_BANKS, layout, device)
        bank = WeightBank.allocate(num_slots, layout, device)
    except torch.cuda.OutOfMemoryError:
        raise _out_of_memory(layout.record_bytes, num_slots, num_layers, others, device) from None
    store = convert_store(raw, layout, backend, device)
    return DeviceExpertCache(store, bank, staging, backend, raw.num_experts, top_k, max_tokens)


def _out_of_memory(
    record_bytes: int, num_slots: int, num_layers: int, others: list[DeviceExpertCache], device: torch.device
) -> ExpertCacheError:
    free, _ = torch.cuda.mem_get_info(device)
    taken = sum(other.slot_bank.nbytes for other in others)
    fits = (free + taken) // (num_layers * record_bytes)
    return ExpertCacheError(
        f"{flag('cache_size')} {num_slots}: {num_layers} layers x {num_slots} slots x {record_bytes} bytes = "
        f"{num_layers * num_slots * record_bytes} bytes do not fit the device, where {free + taken} bytes are free "
        f"beside the other weights; the largest number that fits, before the KV cache, is {fits}"
    )
