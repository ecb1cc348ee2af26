"""What deciding a step costs: the plan kernel, vLLM's alignment, and the kernel that deals blocks to waves.

Ids are made so that a known number of a step's experts miss, and the planner's own counters must say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from known_misses import KnownSteps, check_outcome, first_ids, ids_of, is_known, known_steps

from vllm_hlwq.bench.cuda_timing import seconds_per_call
from vllm_hlwq.expert_cache import is_prompt
from vllm_hlwq.marlin_moe import resident_block_size
from vllm_hlwq.plan_kernel import DeviceSlotTable, plan
from vllm_hlwq.vllm_compat import borrow
from vllm_hlwq.wave_blocks import Alignment, blocks_of_waves

LAYERS = ((128, 8), (256, 8), (512, 10), (64, 6), (32, 4))
"""Experts and top-k."""
TOKENS = (1, 8, 32, 512, 8192)
QUICK_LAYERS, QUICK_TOKENS = ((128, 8), (512, 10)), (1, 32, 8192)
CALLS, PREFILL_CALLS = 64, 16
"""In one graph, so that launching the graph weighs little beside kernels of some microseconds."""
PREFILL_TOKENS = 512
REPEATS = 10


def miss_cases(experts: int, slots: int, distinct: int) -> list[int]:
    """No miss, half of the most, the most that steps of ``distinct`` experts can keep up."""
    counts = [count for count in range(distinct + 1) if is_known(experts, slots, distinct, count)]
    most = counts[-1]
    return sorted({0, max(count for count in counts if count <= most // 2), most})


def microseconds(call: Callable[[int], Any], calls: int) -> float:
    return 1e6 * seconds_per_call(call, calls, REPEATS)


def plan_us(table: DeviceSlotTable, known: KnownSteps, tokens: int) -> float:
    """Microseconds of planning one of the known steps, whose outcome is checked."""
    device = table.ids.device
    ids = ids_of(known, tokens, table.top_k).to(device)
    table.reset()
    if known.first:
        plan(table, first_ids(known, table.top_k).to(device))
    for step in ids:
        plan(table, step)
    before = table.counts()
    time = microseconds(lambda number: plan(table, ids[number]), len(ids))
    check_outcome(known, before, table.counts())
    return time


def align_and_deal_us(table: DeviceSlotTable, ids: torch.Tensor) -> tuple[float, float]:
    """Microseconds of the alignment, and of dealing its blocks to as many waves as the step has.

    Args:
        table: has planned the last of the steps.
        ids: int32 ``[steps, T, k]``.
    """
    _, tokens, top_k = ids.shape
    size = resident_block_size(tokens, top_k, table.num_experts)
    align = borrow("moe_align_block_size")
    blocks = Alignment(*align(ids[-1], size, table.num_experts), size)
    wave_rows = table.wave_rows[: waves_of(table, tokens)]
    return (
        microseconds(lambda number: align(ids[number % len(ids)], size, table.num_experts), CALLS),
        microseconds(lambda _: blocks_of_waves(blocks, wave_rows), CALLS),
    )


def waves_of(table: DeviceSlotTable, tokens: int) -> int:
    """Waves that a step of so many tokens is captured with."""
    return 1 if tokens * table.top_k <= table.num_slots else table.num_waves


def measure_tokens(table: DeviceSlotTable, tokens: int) -> dict[str, Any]:
    """One row: all costs of a step of so many tokens, by its misses."""
    experts, slots, top_k = table.num_experts, table.num_slots, table.top_k
    distinct = min(tokens * top_k, slots)
    calls = CALLS if tokens < PREFILL_TOKENS else PREFILL_CALLS
    plans = []
    for misses in miss_cases(experts, slots, distinct):
        known = known_steps(experts, slots, distinct, misses, calls)
        plans.append({"misses": misses, "us": plan_us(table, known, tokens)})
    align_us, blocks_us = align_and_deal_us(table, ids_of(known, tokens, top_k).to(table.ids.device))
    row = {
        "experts": experts, "top_k": top_k, "slots": slots, "tokens": tokens, "distinct": distinct,
        "waves": waves_of(table, tokens), "align_us": align_us, "blocks_us": blocks_us, "plans": plans,
        "growth": plans[-1]["us"] / plans[0]["us"], "every_expert_us": None,
    }  # fmt: skip
    if is_prompt(tokens * top_k, experts):
        known = known_steps(experts, slots, experts, experts - slots, calls, prompt=True)
        row["every_expert_us"] = plan_us(table, known, tokens)
    return row


def measure(quick: bool) -> dict[str, Any]:
    """Costs over layers, slots, tokens and misses; with ``quick`` a few of them."""
    rows = []
    all_tokens = QUICK_TOKENS if quick else TOKENS
    for experts, top_k in QUICK_LAYERS if quick else LAYERS:
        for slots in (experts // 4,) if quick else (experts // 4, experts - 1):
            table = DeviceSlotTable(experts, slots, experts - slots, max(all_tokens), top_k, "cuda")
            rows += [measure_tokens(table, tokens) for tokens in all_tokens]
    return {"rows": rows, "worst_growth": max(row["growth"] for row in rows)}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"planning a step, microseconds; the most misses against none: {result['worst_growth']:.2f} times at worst",
        f"{'experts':>8} {'k':>3} {'slots':>6} {'tokens':>7} {'distinct':>9} {'align':>6} {'blocks':>7} {'waves':>6} "
        f"{'growth':>7}  plan, by misses",
    ]
    for row in result["rows"]:
        plans = [f"{plan['misses']}: {plan['us']:.1f}" for plan in row["plans"]]
        if row["every_expert_us"] is not None:
            plans.append(f"every expert named: {row['every_expert_us']:.1f}")
        lines.append(
            f"{row['experts']:>8} {row['top_k']:>3} {row['slots']:>6} {row['tokens']:>7} {row['distinct']:>9} "
            f"{row['align_us']:>6.1f} {row['blocks_us']:>7.1f} {row['waves']:>6} {row['growth']:>7.2f}  "
            + ", ".join(plans)
        )
    return "\n".join(lines)
