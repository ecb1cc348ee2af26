"""The Triton code of the device planner; ``plan_kernel.py`` launches it and documents its data.

One program a step, because a step's decisions are one short chain of dependent reads. Its cost does not grow with the
number of misses: the order of first mention is a running count over the ids, the order of age a list that each step
partitions, and nothing is ever sorted.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .expert_cache import COUNTERS, EMPTY, MENTIONS_OF_A_PROMPT

_EMPTY = tl.constexpr(EMPTY)
_NEVER = tl.constexpr(2**31 - 1)  # first use of an expert that no token names; above any position
assert len(COUNTERS) == 8, "the kernel counts in eight lanes, and rows of counters are 16-byte aligned with them"
_NUM_COUNTERS = tl.constexpr(len(COUNTERS))
_COPIED = tl.constexpr(COUNTERS.index("copied"))
_MENTIONS_OF_A_PROMPT = tl.constexpr(MENTIONS_OF_A_PROMPT)


@triton.jit
def _note_first_uses(
    topk_ids, is_padding, expert_map, ids, first_use, end, row_stride, column_stride, masked_rows, map_size, start,
    E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SKIP_KNOWN: tl.constexpr,
):  # fmt: skip
    """Copy a block of ids, -1 for those of no expert here, and lower ``first_use`` to each expert's position."""
    position = start + tl.arange(0, BLOCK)
    inside = position < end
    row = position // K
    global_id = tl.load(topk_ids + row * row_stride + position % K * column_stride, mask=inside, other=-1)
    padding = tl.load(is_padding + row, mask=inside & (row < masked_rows), other=0)
    # Compared in the ids' own dtype: an int64 id may not fit int32.
    named = inside & (padding == 0) & (global_id >= 0) & (global_id < tl.where(map_size > 0, map_size, E))
    expert = tl.where(named, global_id, _EMPTY).to(tl.int32)
    mapped = named & (expert < map_size)
    expert = tl.where(mapped, tl.load(expert_map + expert, mask=mapped, other=_EMPTY), expert)
    here = (expert >= 0) & (expert < E)
    tl.store(ids + position, tl.where(here, expert, _EMPTY), mask=inside)
    if SKIP_KNOWN:
        # After a few blocks every expert has been met, and atomics on so few addresses would queue up. A value older
        # than another thread's atomic does no harm: the minimum decides.
        here &= position < tl.load(first_use + expert, mask=here, other=0, volatile=True)
    tl.atomic_min(first_use + expert, position, mask=here, sem="relaxed")


@triton.jit
def _rank_misses(ids, first_use, slot_of_expert, rank_of_miss, end, start, ranked, BLOCK: tl.constexpr):
    """Number the misses first mentioned in this block, from ``ranked`` on; returns how many are numbered by now."""
    position = start + tl.arange(0, BLOCK)
    expert = tl.load(ids + position, mask=position < end, other=_EMPTY)
    here = expert >= 0
    is_first = tl.load(first_use + expert, mask=here, other=-1) == position
    is_miss = tl.load(slot_of_expert + expert, mask=here, other=0) < 0
    new = (is_first & is_miss).to(tl.int32)
    tl.store(rank_of_miss + expert, ranked + tl.cumsum(new, 0) - 1, mask=new != 0)
    return ranked + tl.sum(new, 0)


@triton.jit(
    # Warm-up sees one batch shape and captured graphs others: no value or alignment may ask for another compilation.
    do_not_specialize=[
        "topk_ids", "is_padding", "expert_map", "num_tokens", "row_stride", "column_stride", "masked_rows", "map_size",
        "global_experts",
    ],
    do_not_specialize_on_alignment=["topk_ids", "is_padding", "expert_map"],
)  # fmt: skip
def plan_kernel(
    topk_ids, is_padding, expert_map, num_tokens, row_stride, column_stride, masked_rows, map_size,
    global_experts, slot_of_expert, expert_of_slot, stamp_of_slot, slot_by_age, clock, counters,
    ids, load_experts, load_slots, load_count, staged_experts, staged_count, wave_rows,
    first_use, rank_of_miss, prefetch_count, staged_skip,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGING_ROWS: tl.constexpr, WAVES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, FIRST_BLOCK: tl.constexpr, LONG_BLOCK: tl.constexpr,
    PREFETCHED: tl.constexpr,
):  # fmt: skip
    """One step; ``PREFETCHED`` if the experts that ``prefetch_kernel`` named lie in the staging bank.

    A barrier stands wherever a thread reads what another wrote, or overwrites what another may yet read. The latter
    includes scalars: every thread loads them, one stores them.
    """
    end = num_tokens * K
    e = tl.arange(0, BLOCK_E)
    is_expert = e < E
    p = tl.arange(0, BLOCK_N)
    is_slot = p < N
    c = tl.arange(0, 8)

    # The state does not depend on the ids, so its latency is spent while they are on their way.
    tl.store(first_use + e, tl.full([BLOCK_E], _NEVER, tl.int32), mask=is_expert)
    slot_before = tl.load(slot_of_expert + e, mask=is_expert, other=_EMPTY)
    slot = tl.load(slot_by_age + p, mask=is_slot, other=0)
    held = tl.load(expert_of_slot + slot, mask=is_slot, other=_EMPTY)
    empty = is_slot & (held < 0)
    num_empty = tl.sum(empty.to(tl.int32), 0)
    clock_before = tl.load(clock)
    totals = tl.load(counters + c, mask=c < _NUM_COUNTERS, other=0)
    tl.debug_barrier()

    _note_first_uses(
        topk_ids, is_padding, expert_map, ids, first_use, end, row_stride, column_stride, masked_rows, map_size, 0,
        E, K, FIRST_BLOCK, False,
    )  # fmt: skip
    for start in range(FIRST_BLOCK, end, LONG_BLOCK):
        _note_first_uses(
            topk_ids, is_padding, expert_map, ids, first_use, end, row_stride, column_stride, masked_rows, map_size,
            start, E, K, LONG_BLOCK, True,
        )  # fmt: skip
    tl.debug_barrier()

    needed = tl.load(first_use + e, mask=is_expert, other=_NEVER) != _NEVER
    held_is_needed = tl.load(first_use + held, mask=held >= 0, other=_NEVER) != _NEVER
    missing = needed & (slot_before < 0)
    num_needed = tl.sum(needed.to(tl.int32), 0)
    num_missing = tl.sum(missing.to(tl.int32), 0)
    num_hits = num_needed - num_missing
    streaming = (num_needed > N) & (end >= _MENTIONS_OF_A_PROMPT * global_experts)
    # What scalars tell is not summed again: a reduction costs as much as all of a thread's arithmetic here.
    admitted = tl.minimum(num_missing, tl.where(streaming, num_empty, N - num_hits))
    staged_total = num_missing - admitted
    num_kept = N - admitted - tl.where(streaming, 0, num_hits)

    num_ahead, prefetched = 0, 0
    ahead = missing & (e < 0)  # none
    rank_without_slot = e
    if PREFETCHED:
        prefetched = tl.where(streaming, tl.load(prefetch_count), 0)
        rank_without_slot = tl.cumsum((is_expert & (slot_before < 0)).to(tl.int32), 0) - 1
        ahead = missing & (rank_without_slot < prefetched)
        num_ahead = tl.sum(ahead.to(tl.int32), 0)

    # Every miss is mentioned somewhere, so the loop ends, and in a long prompt long before the ids do.
    ranked = _rank_misses(ids, first_use, slot_of_expert, rank_of_miss, end, 0, 0, FIRST_BLOCK)
    start = FIRST_BLOCK
    while ranked < num_missing:
        ranked = _rank_misses(ids, first_use, slot_of_expert, rank_of_miss, end, start, ranked, LONG_BLOCK)
        start += LONG_BLOCK

    # Slots from here on in the order of (stamp, slot): victims are the first usable ones.
    # Streaming leaves held slots alone. (A bound rather than "& ~streaming": triton 3.9's interpreter widens a bool
    # that is broadcast.)
    touchable = p < tl.where(streaming, 0, N)
    usable = empty | (touchable & ~held_is_needed)
    victim_rank = tl.cumsum(usable.to(tl.int32), 0) - 1
    victim = usable & (victim_rank < admitted)
    refreshed = victim | (touchable & held_is_needed)
    kept = is_slot & ~refreshed
    kept_rank = tl.cumsum(kept.to(tl.int32), 0) - 1
    any_needed = (num_needed > 0).to(tl.int32)
    now = clock_before + any_needed
    tl.debug_barrier()

    tl.store(load_slots + victim_rank, slot, mask=victim)
    tl.store(slot_of_expert + held, tl.full([BLOCK_N], _EMPTY, tl.int32), mask=victim & (held >= 0))
    tl.store(stamp_of_slot + slot, tl.zeros([BLOCK_N], tl.int64) + now, mask=refreshed)
    tl.store(slot_by_age + kept_rank, slot, mask=kept)
    tl.store(clock, now)
    tl.store(load_count, admitted)
    staged_end = prefetched + staged_total - num_ahead
    tl.store(staged_skip, prefetched)
    tl.store(staged_count, staged_end)
    evictions = tl.maximum(admitted - num_empty, 0)  # empty slots have the oldest stamp and go first
    waves = ((num_hits + admitted) > 0).to(tl.int32) + (staged_end + STAGING_ROWS - 1) // STAGING_ROWS
    # The order of COUNTERS.
    step = tl.where(c == 0, any_needed, tl.where(c == 1, num_needed, tl.where(c == 2, num_hits, admitted)))
    step = tl.where(c == 4, evictions, tl.where(c == 5, staged_total, tl.where(c == 6, waves, step)))
    step = tl.where(c == _COPIED, admitted + staged_total - num_ahead, step)
    tl.store(counters + c, totals + step, mask=c < _NUM_COUNTERS)
    tl.debug_barrier()

    # Refreshed slots share the newest stamp, so they end the order of age in the order of their numbers.
    newest = is_slot & (tl.load(stamp_of_slot + p, mask=is_slot, other=-1) > clock_before)
    tl.store(slot_by_age + num_kept + tl.cumsum(newest.to(tl.int32), 0) - 1, p, mask=newest)

    rank = tl.load(rank_of_miss + e, mask=missing, other=0)
    loaded = missing & (rank < admitted)
    new_slot = tl.load(load_slots + rank, mask=loaded, other=_EMPTY)
    tl.store(load_experts + rank, e, mask=loaded)
    tl.store(slot_of_expert + e, new_slot, mask=loaded)
    tl.store(expert_of_slot + new_slot, e, mask=loaded)

    staged = missing & (rank >= admitted)
    in_order = prefetched + tl.cumsum((staged & ~ahead).to(tl.int32), 0) - 1
    index = tl.where(streaming, tl.where(ahead, rank_without_slot, in_order), rank - admitted)
    tl.store(staged_experts + index, e, mask=staged)
    slot_row = tl.where(needed, tl.where(loaded, new_slot, slot_before), _EMPTY)
    tl.store(wave_rows + e, slot_row, mask=is_expert)
    staged_wave = tl.where(staged, index // STAGING_ROWS + 1, 0)
    for wave in range(1, WAVES):
        row = tl.where(staged_wave == wave, index % STAGING_ROWS, _EMPTY)
        tl.store(wave_rows + wave * E + e, row, mask=is_expert)


@triton.jit
def prefetch_kernel(
    slot_of_expert, counters, prefetch_experts, prefetch_count,
    E: tl.constexpr, N: tl.constexpr, STAGING_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Name the first ``STAGING_ROWS`` experts without a slot, none if a slot is empty."""
    e = tl.arange(0, BLOCK_E)
    absent = (e < E) & (tl.load(slot_of_expert + e, mask=e < E, other=0) < 0)
    rank = tl.cumsum(absent.to(tl.int32), 0) - 1
    num_absent = tl.sum(absent.to(tl.int32), 0)
    count = tl.where(num_absent == E - N, tl.minimum(num_absent, STAGING_ROWS), 0)
    tl.store(prefetch_experts + rank, e, mask=absent & (rank < count))
    tl.store(prefetch_count, count)
    tl.store(counters + _COPIED, tl.load(counters + _COPIED) + count)
