"""The layer benchmark as far as a machine without a GPU goes: its options, arithmetic, tables and CUDA C++ source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gather_bulk
import gather_link
import inside_gemm
import layer_step
import moe_layer
import plan_cost
import pytest
import render
import render_gpu
import step_report
import torch

from vllm_hlwq.bench.moe_shapes import SHAPES, MoeShape


def test_options_name_parts_and_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = moe_layer.parse(["--parts", "gather", "layer", "--shape", "qwen3-30b-a3b", "--sweep"])
    assert (chosen.parts, chosen.shape, chosen.sweep) == (["gather", "layer"], "qwen3-30b-a3b", True)
    chosen = moe_layer.parse([])
    assert (chosen.parts, chosen.quick, chosen.out) == (["gather", "inside", "plan", "layer"], False, None)
    with pytest.raises(SystemExit):
        moe_layer.parse(["--parts", "router"])
    assert "gather" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert moe_layer.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_record_is_an_experts_codes_and_scales(shape: MoeShape) -> None:
    weights = 3 * shape.hidden * shape.width
    assert shape.marlin_layout().record_bytes == weights // 2 + weights // shape.group_size * 2


def test_the_table_shows_rates_and_the_best_of_a_sweep() -> None:
    slow, fast = ({"programs": n, "gb_per_s": {"1": n / 2, "8": n / 4}} for n in (16, 64))
    text = gather_link.table(
        {
            "record_bytes": 3159552,
            "pcie": {"pcie.link.gen.current": "5"},
            "empty_us": 3.44,
            "rates": [{"experts": 8, "copy_gb_per_s": 55.0, "gather_gb_per_s": 49.5, "share": 0.9}],
            "sweep": [slow, fast],
        }
    )
    assert "empty gather 3.4 us" in text
    assert text.splitlines()[2].split() == ["8", "55.0", "49.5", "90%"]
    assert text.index("32.0 GB/s  {'programs': 64}") < text.index("8.0 GB/s  {'programs': 16}")


def test_the_cases_cover_slots_tokens_and_misses() -> None:
    shape = SHAPES["gemma-4-26b-a4b"]
    assert layer_step.cases(shape, 128, quick=False) == [
        (1, 8, 0), (8, 41, 0), (32, 80, 0), (2048, 128, 0), (8192, 128, 0)
    ]  # fmt: skip
    assert layer_step.cases(shape, 32, quick=True) == [(1, 8, 0), (1, 8, 8), (8, 41, 9), (8, 41, 41), (2048, 128, 96)]
    half = layer_step.cases(shape, 64, quick=False)
    assert [misses for tokens, _, misses in half if tokens == 1] == [0, 1, 2, 4, 8]
    assert half[-2:] == [(2048, 128, 64), (8192, 128, 64)]
    assert plan_cost.miss_cases(128, 32, 8) == [0, 4, 8]
    assert plan_cost.miss_cases(128, 127, 64) == [0, 1]


PARTS = {"plan": 8.0, "align": 5.0, "blocks": 2.0, "gather": 1.5, "combine": 3.0, "compute": 100.0}


@pytest.mark.parametrize(
    ("step_us", "link_us", "parts", "overhead_us", "gaps_us", "limit"),
    [
        (120.0, 0.0, PARTS, 20.0, 0.5, "compute"),
        (600.0, 460.0, PARTS, 40.0, 20.5, "link"),
        (300.0, 90.0, PARTS | {"compute": 95.0}, 110.0, 95.5, "launches"),
        (300.0, 90.0, PARTS | {"plan": 110.0}, 110.0, -11.5, "plan"),
        # Loads behind compute: less than both together, and nothing is left over for gaps.
        (400.0, 380.0, PARTS | {"compute": 390.0}, -80.0, -389.5, "compute"),
    ],
)
def test_a_step_is_held_against_the_resident_layer_and_the_link(
    step_us: float, link_us: float, parts: dict[str, float], overhead_us: float, gaps_us: float, limit: str
) -> None:
    row = step_report.judged(step_us, 100.0, link_us, parts)
    assert (row["step_us"], row["resident_us"], row["link_us"], row["parts_us"]) == (step_us, 100.0, link_us, parts)
    assert row["over_us"] == step_us - 100
    assert (row["overhead_us"], row["gaps_us"], row["limit"]) == (overhead_us, gaps_us, limit)


def test_a_resident_step_has_neither_plan_nor_loads() -> None:
    parts = {"align": 5.0, "combine": 3.0, "compute": 100.0}
    row = step_report.judged(110.0, 110.0, 0.0, parts)
    assert (row["over_us"], row["overhead_us"], row["gaps_us"], row["limit"]) == (0, 0, 2, "compute")


def layer_result() -> dict[str, Any]:
    resident = step_report.judged(110.0, 110.0, 0.0, {"align": 5.0, "combine": 3.0, "compute": 100.0})
    loading = step_report.judged(600.0, 110.0, 460.0, PARTS)
    sizes = {"tokens": 1, "distinct": 8}
    return {
        "record_bytes": 3159552,
        "copy_gb_per_s": 54.94,
        "rows": [sizes | {"slots": 128, "misses": 0} | resident, sizes | {"slots": 32, "misses": 8} | loading],
    }


def inside_result() -> dict[str, Any]:
    record = 3_162_500
    few = inside_gemm.compared(8 * record, gather=550e-6, inside=1100e-6, resident=50e-6)
    many = inside_gemm.compared(128 * record, gather=9e-3, inside=16e-3, resident=1e-3)
    rows = [
        {"experts": 8, "tokens": 1, "top_k": 8, "blocks": 1, "same_bits": True} | few,
        {"experts": 128, "tokens": 2048, "top_k": 8, "blocks": 2, "same_bits": False} | many,
    ]
    return {"record_bytes": record, "copy_gb_per_s": 54.94, "rows": rows}


def plan_result() -> dict[str, Any]:
    plans = [{"misses": misses, "us": us} for misses, us in ((0, 8.0), (4, 8.25), (8, 9.0))]
    row = {
        "experts": 128, "top_k": 8, "slots": 32, "distinct": 8, "waves": 1, "align_us": 5.04, "blocks_us": 2.0,
        "plans": plans, "growth": 1.125, "every_expert_us": None,
    }  # fmt: skip
    long = row | {"tokens": 8192, "every_expert_us": 61.26}
    return {"rows": [row | {"tokens": 1}, long], "worst_growth": 1.125}


def test_the_layers_table_shows_each_part_and_what_limits() -> None:
    lines = [" ".join(line.split()) for line in step_report.table(layer_result()).splitlines()]
    assert "3,159,552 bytes, copy engine 54.9 GB/s; limits: compute 1, link 1" in lines[0]
    assert lines[1].startswith("tokens slots distinct misses step resident over link overhead plan align blocks gather")
    assert lines[2] == "1 128 8 0 110.0 110.0 0.0 0.0 0.0 0.0 5.0 0.0 0.0 100.0 3.0 2.0 compute"
    assert lines[3] == "1 32 8 8 600.0 110.0 490.0 460.0 30.0 8.0 5.0 2.0 1.5 100.0 3.0 20.5 link"


def test_the_table_of_reading_inside_shows_both_ways() -> None:
    lines = [" ".join(line.split()) for line in inside_gemm.table(inside_result()).splitlines()]
    assert "3,162,500 bytes, copy engine 54.9 GB/s; same bits in 1 of 2 cases" in lines[0]
    assert lines[1].startswith("experts tokens top-k blocks gather+GEMM inside resident")
    assert lines[2] == "8 1 8 1 550.0 1100.0 50.0 46.0 23.0 0.50"
    assert lines[3] == "128 2048 8 2 9000.0 16000.0 1000.0 45.0 25.3 0.56"


def test_the_cases_of_reading_inside_cover_experts_and_blocks() -> None:
    found = inside_gemm.cases(SHAPES["gemma-4-26b-a4b"], quick=False)
    assert [(case.experts, case.tokens, case.top_k) for case in found] == [
        (1, 1, 1), (2, 1, 2), (4, 1, 4), (8, 1, 8), (16, 2, 8), (32, 4, 8), (64, 8, 8), (128, 16, 8),
        (128, 512, 8), (128, 2048, 8), (128, 8192, 8),
    ]  # fmt: skip
    assert [case.tokens for case in inside_gemm.cases(SHAPES["gemma-4-26b-a4b"], quick=True)] == [1, 1, 2048]


@pytest.mark.parametrize("case", inside_gemm.cases(SHAPES["gemma-4-26b-a4b"], quick=False), ids=str)
def test_ids_name_all_experts_equally_often(case: inside_gemm.Case) -> None:
    experts = torch.randperm(128)[: case.experts]
    ids = inside_gemm.ids_naming(experts, case.tokens, case.top_k)
    assert (ids.dtype, ids.shape, ids.is_contiguous()) == (torch.int32, (case.tokens, case.top_k), True)
    assert all(len(set(token)) == case.top_k for token in ids.tolist())
    named, times = ids.unique(return_counts=True)
    assert named.tolist() == sorted(experts.tolist())
    assert set(times.tolist()) == {case.tokens * case.top_k // case.experts}


@pytest.mark.parametrize(("count", "tokens", "top_k"), [(7, 3, 8), (17, 2, 8)])
def test_ids_that_cannot_name_them_are_refused(count: int, tokens: int, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens of {top_k} experts cannot name {count}"):
        inside_gemm.ids_naming(torch.arange(count), tokens, top_k)


def test_the_planners_table_shows_whether_cost_grows_with_misses() -> None:
    lines = [" ".join(line.split()) for line in plan_cost.table(plan_result()).splitlines()]
    assert "the most misses against none: 1.12 times at worst" in lines[0]
    assert lines[2] == "128 8 32 1 8 5.0 2.0 1 1.12 0: 8.0, 4: 8.2, 8: 9.0"
    assert lines[3].endswith("8: 9.0, every expert named: 61.3")


def test_the_documents_show_the_parts_that_a_result_has() -> None:
    committed = json.loads((render.RESULTS / "moe_layer.json").read_text())
    committed = {name: part for name, part in committed.items() if name not in ("plan", "layer")}
    alone = render_gpu.moe_layer(committed)
    text = render_gpu.moe_layer(committed | {"plan": plan_result(), "layer": layer_result()})
    assert text.startswith(alone.partition("\n(")[0])
    assert "| 1 | 32 | 8 | 600 | 110 | 460 | 30 | link |" in text
    assert "| 128 | 8 | 32 | 8192 | 8.0 | 9.0 | 61.3 | 5.0 | 2.0 |" in text
    assert "1.12 times" in text
    assert "microseconds" not in alone
    assert alone.endswith("made by `benchmarks/moe_layer.py --sweep`.)\n")
    steps = render_gpu.moe_layer({"environment": committed["environment"], "layer": layer_result()})
    assert steps.startswith("One layer's step in microseconds")
    assert steps.endswith("made by `benchmarks/moe_layer.py --parts layer`.)\n")
    inside = render_gpu.inside_gemm({"environment": committed["environment"], "inside": inside_result()})
    assert "| 8 | 1 | 1 | 550 | 1,100 | 50 | 46.0 | 23.0 | 0.50 |\n| 128 | 2048 | 2 | 9,000 |" in inside
    assert "(copy engine: 54.9)" in inside


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_kernels_compile(tmp_path: Path) -> None:
    gather_bulk.build(tmp_path / "gather.so", (9, 0))
    library = gather_bulk.load(tmp_path / "gather.so")
    assert library.gather_launch
