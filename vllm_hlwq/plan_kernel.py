"""The device planner: ``SlotTable.plan_step`` as one kernel a layer.

``DeviceSlotTable`` owns the state and the outcome of the latest step in device memory. ``plan`` only enqueues, at fixed
addresses, and compiles once per layer shape, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton

from .expert_cache import SlotState
from .plan_triton import plan_kernel, prefetch_kernel

MAX_EXPERTS = 1023
"""vLLM's ``moe_align_block_size`` handles fewer than 1024 experts."""

MAX_TOP_K = 32

_INDEX_LIMIT = 2**31  # positions and offsets are int32 in the kernels

# A decoding step's ids fit the first block, which keeps idle lanes few; the long blocks are for prefill, where fewer
# rounds of memory latency count more.
_FIRST_BLOCK = 256
_LONG_BLOCK = 2048

# One warp for each of an SM's schedulers: with 128 experts a thread decides one, and scans and barriers across more
# warps would cost a small step more than their width saves.
_NUM_WARPS = 4


class DeviceSlotTable(SlotState):
    """The state of a layer's slots on a device, and what its latest step decided; every address is fixed for life.

    The staging bank holds ``staging_rows`` experts at a time. ``num_waves`` = 1 + ceil((E - N) / staging_rows) waves
    are always enough: with h hits among n needed experts, a step that is not streaming has N - h usable slots for n - h
    misses and stages max(0, n - N) <= E - N of them. A streaming step needs n > N experts, so it has more misses than
    empty slots (N - empty >= h), fills every empty slot, and stages only experts outside N full slots: E - N or fewer.
    Prefetched experts are outside N full slots too, so that the places of all together are E - N or fewer.

    Attributes:
        slot_by_age: int32 [N], slots by (stamp, slot), the next victim first. Follows from ``stamp_of_slot``.
        ids: int32 [max_tokens, k], the step's local expert ids in its first T rows; -1 in padding rows and for ids of
            no expert of this rank.
        load_experts: int32 [N], admitted experts, to be copied from the host store into slots.
        load_slots: int32 [N], the slot of each of them.
        load_count: int32 [1], how many of these entries the step wrote.
        staged_experts: int32 [E], experts for the staging bank, in order of first use; ascending in a streaming step.
            Expert i of them is computed in wave 1 + i // staging_rows from row i % staging_rows. Entries below
            ``staged_skip`` are what was prefetched, and unspecified where the step does not need it.
        staged_skip: int32 [1], how many of these entries were prefetched.
        staged_count: int32 [1], where the list ends.
        prefetch_experts: int32 [E], what ``prefetch`` named: experts for rows 0, 1, 2 ... of the staging bank.
        prefetch_count: int32 [1].
        wave_rows: int32 [num_waves, E], the bank row of each expert that the step needs and computes in a wave, -1 for
            all others. Wave 0 reads the slot bank (row = slot), the others the staging bank.
    """

    def __init__(
        self,
        num_experts: int,
        num_slots: int,
        staging_rows: int,
        max_tokens: int,
        top_k: int,
        device: torch.device | str,
        global_experts: int | None = None,
    ) -> None:
        """Make an empty table.

        Args:
            num_experts: experts of the layer on this rank, E, up to ``MAX_EXPERTS``.
            num_slots: slots of the layer, N, 1 to E - 1: with as many slots as experts there is nothing to plan.
            staging_rows: experts that the staging bank holds, 1 or more.
            max_tokens: rows of the largest step.
            top_k: experts of a token, k, up to ``MAX_TOP_K``.
            device: where the tensors lie.
            global_experts: experts of the layer on all ranks; None if they are all on this one.

        Raises:
            ValueError: a size is out of its range.
        """
        if not 2 <= num_experts <= MAX_EXPERTS:
            raise ValueError(f"num_experts={num_experts} must be 2 to {MAX_EXPERTS}")
        if num_slots == num_experts:
            raise ValueError(f"num_slots={num_slots} must be below num_experts: all experts would be resident")
        if not 1 <= top_k <= MAX_TOP_K:
            raise ValueError(f"top_k={top_k} must be 1 to {MAX_TOP_K}")
        if not 1 <= max_tokens * top_k < _INDEX_LIMIT:
            raise ValueError(
                f"max_tokens={max_tokens} must be 1 or more and, times top_k={top_k}, below {_INDEX_LIMIT}"
            )

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.max_tokens = max_tokens
        self.top_k = top_k
        self.slot_by_age = int32(num_slots)
        super().__init__(num_experts, num_slots, staging_rows, device, global_experts)
        self.num_waves = 1 + triton.cdiv(num_experts - num_slots, staging_rows)
        self.ids = int32(max_tokens, top_k)
        self.load_experts, self.load_slots, self.load_count = int32(num_slots), int32(num_slots), int32(1)
        self.staged_experts, self.staged_skip, self.staged_count = int32(num_experts), int32(1), int32(1)
        self.prefetch_experts, self.prefetch_count = int32(num_experts), int32(1)
        self.wave_rows = int32(self.num_waves, num_experts)
        self._first_use, self._rank_of_miss = int32(num_experts), int32(num_experts)
        # Stand in for arguments that a step does not have: None would be another compilation.
        self._no_padding = torch.zeros(1, dtype=torch.bool, device=device)
        self._no_map = int32(1)

    def empty(self) -> None:
        """Empty every slot; only enqueues."""
        super().empty()
        torch.arange(self.num_slots, out=self.slot_by_age)


def plan(
    table: DeviceSlotTable,
    topk_ids: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    prefetched: bool = False,
) -> None:
    """Decide one step: ``SlotTable.plan_step`` on the device, state and outcome in ``table``. Only enqueues.

    Compiles on first use, once for int32 and once for int64 ids, with and without ``prefetched``: call it before
    anything is captured.

    Args:
        table: the layer's table.
        topk_ids: int32 or int64 [T, k], T up to ``max_tokens``, any strides. Ids below 0, too large or unmapped name no
            expert of this rank.
        is_padding: bool [T], contiguous; True for rows that only pad the batch and need no expert.
        expert_map: int32 [global experts], contiguous; global id to local id or -1 (expert parallelism). None if
            ``topk_ids`` are local.
        prefetched: whether what ``prefetch`` named since the step before lies, or will lie, in the staging bank.

    Raises:
        ValueError: an argument's shape, dtype or layout is not the one above.
    """
    if topk_ids.ndim != 2 or topk_ids.shape[1] != table.top_k or topk_ids.shape[0] > table.max_tokens:
        raise ValueError(
            f"topk_ids has shape {list(topk_ids.shape)}, must be [T, {table.top_k}] with T up to {table.max_tokens}"
        )
    num_tokens = topk_ids.shape[0]
    _require("topk_ids", topk_ids, (torch.int32, torch.int64))
    row_stride, column_stride = topk_ids.stride()
    if num_tokens * row_stride + table.top_k * column_stride >= _INDEX_LIMIT:
        raise ValueError(f"topk_ids has strides {topk_ids.stride()}, too wide for 32-bit offsets; pass a copy")
    if is_padding is not None:
        _require("is_padding", is_padding, (torch.bool,))
        if is_padding.shape != (num_tokens,) or not is_padding.is_contiguous():
            raise ValueError(f"is_padding has shape {list(is_padding.shape)}, must be [{num_tokens}] and contiguous")
    if expert_map is not None:
        _require("expert_map", expert_map, (torch.int32,))
        if expert_map.ndim != 1 or len(expert_map) == 0 or not expert_map.is_contiguous():
            raise ValueError(f"expert_map has shape {list(expert_map.shape)}, must be [global experts] and contiguous")
    plan_kernel[(1,)](
        topk_ids,
        table._no_padding if is_padding is None else is_padding,
        table._no_map if expert_map is None else expert_map,
        num_tokens,
        row_stride,
        column_stride,
        0 if is_padding is None else num_tokens,
        0 if expert_map is None else len(expert_map),
        table.global_experts,
        table.slot_of_expert,
        table.expert_of_slot,
        table.stamp_of_slot,
        table.slot_by_age,
        table.clock,
        table.counters,
        table.ids,
        table.load_experts,
        table.load_slots,
        table.load_count,
        table.staged_experts,
        table.staged_count,
        table.wave_rows,
        table._first_use,
        table._rank_of_miss,
        table.prefetch_count,
        table.staged_skip,
        E=table.num_experts,
        N=table.num_slots,
        K=table.top_k,
        STAGING_ROWS=table.staging_rows,
        WAVES=table.num_waves,
        BLOCK_E=triton.next_power_of_2(table.num_experts),
        BLOCK_N=triton.next_power_of_2(table.num_slots),
        FIRST_BLOCK=_FIRST_BLOCK,
        LONG_BLOCK=_LONG_BLOCK,
        PREFETCHED=prefetched,
        num_warps=_NUM_WARPS,
    )


def prefetch(table: DeviceSlotTable) -> None:
    """Name experts to copy before a step that is expected to need all: ``SlotTable.prefetch``. Only enqueues."""
    prefetch_kernel[(1,)](
        table.slot_of_expert,
        table.counters,
        table.prefetch_experts,
        table.prefetch_count,
        E=table.num_experts,
        N=table.num_slots,
        STAGING_ROWS=table.staging_rows,
        BLOCK_E=triton.next_power_of_2(table.num_experts),
        num_warps=_NUM_WARPS,
    )


def _require(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, must be {' or '.join(str(dtype) for dtype in dtypes)}")
