"""From loaded checkpoint tensors to a layer's cache on CUDA: conversion in chunks, banks, and what does not fit.

Experts are repacked on the GPU a chunk at a time, so that at no time more of a layer is there than its banks and one
chunk, and in host memory no more than the experts once and one layer. Those that the kernels read as they were loaded
stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .bank_sizes import STAGING_BANKS, BankSizes
from .cudart import PageLocker
from .device_backend import DeviceBackend
from .device_expert_cache import DeviceExpertCache
from .errors import ExpertCacheError
from .host_store import HostStore, RecordLayout
from .options import flag
from .pinned_memory import logger
from .progress_bars import SILENT, ProgressBars
from .staging import Staging
from .weight_bank import WeightBank

CHUNK_BYTES = 64 * 2**20
"""Raw bytes that are converted at a time."""
CONVERSION_FACTOR = 4
"""A conversion needs about this many times its raw bytes for a moment."""

Keep = Callable[[HostStore], None]


def is_ready(store: HostStore, backend: DeviceBackend) -> bool:
    """Whether a store's records are what the kernels read."""
    return store.converted or not backend.converts


def converted_chunks(
    raw: HostStore, backend: DeviceBackend, device: torch.device, bars: ProgressBars = SILENT
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """First expert and kernel-layout fields ``[chunk, ...]`` of each chunk of a layer, on the device."""
    step = max(1, CHUNK_BYTES // raw.layout.record_bytes)
    for start in range(0, raw.num_experts, step):
        # One copy of whole records, which needs no work of the processor.
        chunk = raw.layout.views(raw.records[start : start + step].to(device))
        if is_ready(raw, backend):
            yield start, chunk
            continue
        yield start, backend.convert({name: field.contiguous() for name, field in chunk.items()})
        bars.advance("Converting", len(raw.records[start : start + step]) * raw.layout.record_bytes)


def kernel_layout(raw: HostStore, backend: DeviceBackend, device: torch.device) -> RecordLayout:
    """Layout of a converted expert, found by converting one."""
    if is_ready(raw, backend):
        return raw.layout
    one = backend.convert({name: raw.field(name)[:1].to(device) for name in raw.layout})
    return RecordLayout({name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in one.items()})


def convert_store(
    raw: HostStore,
    layout: RecordLayout,
    backend: DeviceBackend,
    device: torch.device,
    runtime: PageLocker | None = None,
    bars: ProgressBars = SILENT,
    lock: bool = True,
) -> HostStore:
    """A layer's experts in the kernels' layout, in page-locked memory: where they were loaded, if they fit there.

    Args:
        raw: the experts as loaded; from now on only the store that is returned, which may be the same.
        layout: of the kernels.
        backend: converts.
        device: where it converts.
        runtime: page-locks; by default the CUDA runtime of this process.
        bars: where the work shows.
        lock: whether to page-lock.

    Raises:
        ExpertCacheError: the memory cannot be mapped or page-locked.
    """
    ready = is_ready(raw, backend)
    in_place = ready or layout.record_bytes == raw.layout.record_bytes
    store = raw if in_place else HostStore(raw.num_experts, layout, device)
    if lock:
        store.page_lock(runtime)
        bars.advance("Page-locking", store.nbytes)
    if ready:
        return raw
    for start, fields in converted_chunks(raw, backend, device, bars):
        count = len(next(iter(fields.values())))
        records = torch.zeros(count, layout.record_bytes, dtype=torch.uint8, device=device)
        for name, part in layout.views(records).items():
            part.copy_(fields[name])
        store.records[start : start + count].copy_(records)
    if in_place:
        store.relabel(layout)
    store.converted = True
    return store


def resident_bank(
    raw: HostStore, layout: RecordLayout, backend: DeviceBackend, device: torch.device, bars: ProgressBars = SILENT
) -> WeightBank:
    """All experts of a layer on the device, in the kernels' layout."""
    bank = WeightBank.allocate(raw.num_experts, layout, device)
    for start, fields in converted_chunks(raw, backend, device, bars):
        for name, tensor in fields.items():
            bank.fields[name][start : start + len(tensor)] = tensor
    return bank


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
    bars: ProgressBars = SILENT,
    keep: Keep | None = None,
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
        bars: where the work shows.
        keep: called with the layer's experts in the kernels' layout, to be kept for another start.

    Raises:
        ExpertCacheError: the device has no room for the banks, or the host none for the experts.
    """
    _, device_bytes = torch.cuda.mem_get_info(device)

    def sizes_of(record_bytes: int) -> BankSizes:
        # Layers that are not made yet are taken to be like this one.
        records = [other.record_bytes for other in others] + [record_bytes] * (num_layers - len(others))
        return BankSizes(tuple(records), raw.num_experts, top_k, device_bytes, staging_size)

    sizes = sizes_of(raw.layout.record_bytes)
    try:
        layout = kernel_layout(raw, backend, device)
        sizes = sizes_of(layout.record_bytes)
        rows = sizes.staging_rows(num_slots, layout.record_bytes)
        # Else banks would be put into the larger blocks that the conversion has left, whose rest no one could use.
        torch.cuda.empty_cache()
        store, bank, staging = _load_banks(raw, layout, backend, num_slots, rows, others, device, bars, keep)
        return DeviceExpertCache(
            store, bank, staging, backend, raw.num_experts, top_k, max_tokens, backend.moe_config.num_experts
        )
    except torch.cuda.OutOfMemoryError as error:
        logger.debug("Expert cache: %s", str(error))
    # Only here the error is gone, and with it what had been made of this layer's banks.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    raise ExpertCacheError(out_of_memory(sizes, num_slots, free + taken_bytes(others), conversion_bytes(raw)))


def _load_banks(
    raw: HostStore,
    layout: RecordLayout,
    backend: DeviceBackend,
    num_slots: int,
    staging_rows: int,
    others: list[DeviceExpertCache],
    device: torch.device,
    bars: ProgressBars,
    keep: Keep | None,
) -> tuple[HostStore | None, WeightBank, Staging | None]:
    """Host store, slots and staging of a layer; only slots, with all experts in them, if there is one for each."""
    if num_slots == raw.num_experts:
        if keep is not None:
            raw = convert_store(raw, layout, backend, device, bars=bars, lock=False)
            keep(raw)
        return None, resident_bank(raw, layout, backend, device, bars), None
    staging = next((o.staging_bank for o in others if o.staging_bank and o.layout_key == layout.key()), None)
    if staging is None:
        staging = Staging.allocate(staging_rows, STAGING_BANKS, layout, device)
    bank = WeightBank.allocate(num_slots, layout, device)
    store = convert_store(raw, layout, backend, device, bars=bars)
    if keep is not None:
        keep(store)
    return store, bank, staging


def conversion_bytes(raw: HostStore) -> int:
    """Device memory that the conversion of a layer needs for a moment, beside its banks."""
    return CONVERSION_FACTOR * min(raw.nbytes, max(CHUNK_BYTES, raw.layout.record_bytes))


def taken_bytes(caches: list[DeviceExpertCache]) -> int:
    """Bytes of all banks of some layers' caches, each staging bank once."""
    staging = {id(cache.staging_bank): cache.staging_bank for cache in caches if cache.staging_bank is not None}
    return sum(cache.slot_bank.nbytes for cache in caches) + sum(bank.nbytes for bank in staging.values())


def out_of_memory(sizes: BankSizes, num_slots: int, available: int, conversion: int) -> str:
    """Say in one line what does not fit.

    Args:
        sizes: of all layers' banks.
        num_slots: as asked for.
        available: bytes that are free, or taken by banks made already.
        conversion: bytes that converting a layer needs for a moment beside the banks.
    """
    # What has just failed to fit is not proposed, though fragments that no one can use may make it seem to fit.
    most = sizes.most_slots(available - conversion, but=num_slots)
    remedy = f"the largest number that fits, before the KV cache, is {most}"
    if not most:
        remedy = f"not even 1 fits: lower {flag('staging_size')} or take a GPU with more memory"
    return (
        f"{flag('cache_size')} {num_slots}: {sizes.slot_bytes(num_slots)} bytes of {num_slots} slots in each of "
        f"{len(sizes.records)} layers, {sizes.staging_bytes(num_slots)} of staging and about {conversion} to convert a "
        f"layer do not fit the device, where {available} bytes are free beside the other weights; {remedy}"
    )
