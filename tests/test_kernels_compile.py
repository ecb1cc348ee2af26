"""Every kernel of the cache compiles for the GPUs it may meet: Triton's compiler needs no GPU, and interpreting is not
compiling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_hlwq import plan_kernel, short_steps, wave_blocks
from vllm_hlwq.plan_triton import plan_kernel as plan_code
from vllm_hlwq.plan_triton import prefetch_kernel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")

WIDE = {"stamp_of_slot", "clock", "counters"}
NUMBERS = {
    "num_tokens", "row_stride", "column_stride", "masked_rows", "map_size", "global_experts", "pairs", "block_size",
    "num_blocks", "num_places", "blocks_stride", "places_stride", "padded_stride",
}  # fmt: skip
POWER_OF_TWO = triton.next_power_of_2


def compiled(kernel: Any, capability: int, warps: int, wide_ids: bool = False, **constants: Any) -> str:
    """PTX of a kernel whose other arguments are pointers to int32, or what the sets above say."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in NUMBERS:
            return "i32"
        if name == "is_padding":
            return "*i1"
        return "*i64" if name in WIDE or (wide_ids and name == "topk_ids") else "*i32"

    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs=constants)
    found: str = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm[
        "ptx"
    ]
    return found


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("experts", "slots", "top_k", "rows"), [(16, 8, 4, 2), (128, 32, 8, 32), (512, 127, 10, 385)])
def test_the_planner(capability: int, experts: int, slots: int, top_k: int, rows: int) -> None:
    shared = {"E": experts, "N": slots, "STAGING_ROWS": rows, "BLOCK_E": POWER_OF_TWO(experts)}
    waves = 1 + -(-(experts - slots) // rows)
    blocks = {"FIRST_BLOCK": plan_kernel._FIRST_BLOCK, "LONG_BLOCK": plan_kernel._LONG_BLOCK}
    plan = {**shared, **blocks, "K": top_k, "WAVES": waves, "BLOCK_N": POWER_OF_TWO(slots)}
    for wide, prefetched in ((True, False), (False, True)):
        ptx = compiled(plan_code, capability, plan_kernel._NUM_WARPS, wide, **plan, PREFETCHED=prefetched)
        # First uses are found with atomics, and threads wait for each other's.
        assert "atom.global" in ptx or "red.global" in ptx
        assert "bar.sync" in ptx
    assert "st.global" in compiled(prefetch_kernel, capability, plan_kernel._NUM_WARPS, **shared)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_blocks_of_a_step(capability: int) -> None:
    for lanes in sorted({short_steps.lanes(pairs) for pairs in range(1, short_steps.MOST_PAIRS + 1)}):
        ptx = compiled(short_steps.short_blocks_kernel, capability, short_steps.NUM_WARPS, LANES=lanes)
        # Places that stay empty are written first.
        assert "bar.sync" in ptx
    for one in (False, True):
        constants = {"E": 128, "ONE_WAVE": one, "CHUNK": wave_blocks.BLOCKS_A_PROGRAM}
        assert "st.global" in compiled(wave_blocks.wave_blocks_kernel, capability, wave_blocks.NUM_WARPS, **constants)
