"""What the acceptance on a GPU makes of measurements: each promise kept, then broken by one figure."""

from __future__ import annotations

import copy
from typing import Any

import acceptance_engines
import pytest
from acceptance_criteria import PROMISES, judge
from gpu_speed_chart import groups

LINK = 50e9
GATHER = {"rates": [{"experts": 1, "share": 0.5}, {"experts": 8, "share": 0.93}, {"experts": 64, "share": 0.91}]}


def case(batch: int, step: float, **figures: Any) -> dict[str, Any]:
    speed = {"step_milliseconds": step, "decode_tokens_per_second": 1e3 * batch / step}
    return {"batch": batch, "new_tokens": 8, **speed, **figures}


def prompt(seconds: float, **figures: Any) -> dict[str, Any]:
    return {"batch": 1, "new_tokens": 0, "prefill_seconds": seconds, **figures}


def engine(*measurements: dict[str, Any], in_use: int = 0, cache: Any = None, start_up: float = 0) -> dict[str, Any]:
    return {
        "status": "ok", "measurements": list(measurements), "gpu_memory": {"in_use": in_use}, "expert_cache": cache,
        "start_up_seconds": start_up,
    }  # fmt: skip


@pytest.fixture
def engines() -> dict[str, Any]:
    # 10 layers of 8 experts of 1 GB: 80 GB; a dense part of 5 GB. Misses of 1 GB cost 20 ms, 5 GB 100 ms.
    sizes = {"layers": 10, "experts": 8, "record_bytes": 10**9, "slot_bytes": 20 * 10**9, "staging_bytes": 12 * 10**9}
    return {
        "resident": engine(case(1, 5.0), prompt(0.3), case(32, 8.0), in_use=85 * 10**9, start_up=40),
        "cache": engine(
            case(1, 25.4, decode_bytes_per_step=10**9, decode_hit_rate=0.8),
            prompt(0.4, prefill_bytes=19 * 10**9),
            case(32, 108.0, decode_bytes_per_step=5 * 10**9, decode_hit_rate=0.3),
            in_use=37 * 10**9 + 200 * 2**20, cache=sizes, start_up=50,
        ),
        "all_but_one": engine(case(1, 5.25, decode_bytes_per_step=0, timed_misses=2)),
        "all": engine(case(1, 5.05), cache={"host_bytes": 0}),
        "uva": engine(case(1, 60.0), case(32, 109.0)),
        "half": engine(case(32, 60.0)),
        "half_uva": engine(case(32, 400.0)),
        "half_prefetch": engine(case(32, 91.0)),
    }  # fmt: skip


def broken(engines: dict[str, Any], gather: dict[str, Any] = GATHER) -> list[str]:
    return [found.promise for found in judge(engines, gather, LINK) if not found.kept]


def test_every_promise_can_be_kept(engines: dict[str, Any]) -> None:
    found = judge(engines, GATHER, LINK)
    assert [f.promise for f in found if not f.kept] == []
    assert {f.promise for f in found} == set(PROMISES)
    assert len(found) == len(PROMISES) + 1  # a step with misses is judged at two batch sizes


@pytest.mark.parametrize(
    ("name", "measurement", "figure", "value", "promise"),
    [
        ("all_but_one", 0, {"step_milliseconds": 5.4, "decode_tokens_per_second": 185.0}, None, "cache at work"),
        ("all_but_one", 0, {"decode_bytes_per_step": 1}, None, "cache at work"),
        ("all", 0, {"decode_tokens_per_second": 190.0}, None, "all experts resident"),
        ("cache", 0, {"step_milliseconds": 25.6}, None, "a step with misses"),
        ("cache", 2, {"step_milliseconds": 108.6}, None, "a step with misses"),
        ("cache", 0, {"decode_tokens_per_second": 33.0}, None, "a quarter resident, batch 1"),
        ("cache", 1, {"prefill_seconds": 0.43}, None, "prompt of 8,192 tokens"),
        ("half_prefetch", 0, {"decode_tokens_per_second": 356.0}, None, "half resident, batch 32"),
        ("half_uva", 0, {"decode_tokens_per_second": 356.0}, None, "half resident, batch 32"),
        ("uva", 1, {"decode_tokens_per_second": 297.0}, None, "a quarter resident, batch 32"),
        ("cache", None, "gpu_memory", {"in_use": 37 * 10**9 + 257 * 2**20}, "GPU memory"),
        ("cache", None, "start_up_seconds", 52.1, "start-up"),
    ],
)  # fmt: skip
def test_a_figure_beyond_its_limit_breaks_its_promise_alone(
    engines: dict[str, Any], name: str, measurement: int | None, figure: Any, value: Any, promise: str
) -> None:
    changed = copy.deepcopy(engines)
    if measurement is None:
        changed[name][figure] = value
    else:
        changed[name]["measurements"][measurement] |= figure
    assert [found.startswith(promise) for found in broken(changed)] == [True]


def test_a_slow_gather_is_told_by_its_slowest_size(engines: dict[str, Any]) -> None:
    slow = {"rates": [*GATHER["rates"], {"experts": 32, "share": 0.89}]}
    assert broken(engines, slow) == ["gather at 8 or more experts"]
    assert next(f for f in judge(engines, slow, LINK) if not f.kept).measured == "89.0% at 32 experts"


def test_what_did_not_run_is_not_kept_and_named(engines: dict[str, Any]) -> None:
    engines["uva"] = {"status": "failed", "reason": "out of memory"}
    del engines["all"]
    unkept = {found.promise: found.measured for found in judge(engines, GATHER, LINK) if not found.kept}
    assert unkept == {
        "all experts resident": "all did not run",
        "a quarter resident, batch 1": "uva did not run",
        "a quarter resident, batch 32": "uva did not run",
    }


def test_the_chart_shows_decoding_at_each_share_of_experts(engines: dict[str, Any]) -> None:
    shown = {
        group.title: {bar.label: round(bar.tokens_per_second, 1) for bar in group.bars}
        for group in groups({"engines": engines})
    }
    assert shown == {
        "all resident\n1 request": {"cache": 198.0, "stock": 200.0},
        "a quarter resident\n1 request": {"cache": 39.4, "uva": 16.7},
        "half resident\n32 requests": {"cache": 533.3, "uva": 80.0, "prefetch": 351.6},
        "a quarter resident\n32 requests": {"cache": 296.3, "uva": 293.6},
    }


def test_every_engine_is_in_a_group_after_those_that_it_needs() -> None:
    order = [name for group in acceptance_engines.GROUPS for name in group]
    assert sorted(order) == sorted(acceptance_engines.ENGINE_NAMES)
    group_of = {name: number for number, group in enumerate(acceptance_engines.GROUPS) for name in group}
    assert all(group_of[equal] < group_of[name] for name, (equal, _) in acceptance_engines.OFFLOADED.items())
    # What is compared between engines is measured of each alone.
    assert {("resident",), ("cache",)} < set(acceptance_engines.GROUPS)
