"""The benchmark of whole servers on a CPU, and what its checks make of counts and tokens that do not agree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import render_gpu
import serve
from bench_process import BenchmarkFailed, BenchProcess
from engine_process import ENGINE_RUN
from serve_checks import (
    CACHE,
    COUNTED,
    GENERATED,
    PROMPT,
    REQUESTS,
    cache_checks,
    cache_figures,
    difference,
    shift_figures,
    token_checks,
    token_figures,
    traffic_checks,
)
from serve_client import COPIES, GREEDY_TOKENS, TEXT_TOKENS, TEXTS

from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.teacher_forcing import NEAR_TIE

SIZE, TOO_LARGE = 4, 99
CLIENTS, PER_CLIENT, INPUT, OUTPUT = (1, 2), 2, 24, 8


@pytest.fixture(scope="module")
def result(tiny_int4: Path, tiny_int4_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("serve")
    done = subprocess.run(
        [
            sys.executable, str(ENGINE_RUN.with_name("serve.py")), "--model", str(tiny_int4),
            "--resident-model", str(tiny_int4_float32), "--cache-sizes", f"{SIZE},{TOO_LARGE}",
            "--concurrency", ",".join(map(str, CLIENTS)), "--prompts-per-client", str(PER_CLIENT),
            "--input-tokens", str(INPUT), "--output-tokens", str(OUTPUT), "--start-together",
            "--logs", str(folder / "logs"), "--out", str(folder / "result.json"),
            "--", "--dtype", "float32", "--enforce-eager",
        ],
        # Threads that wait by spinning steal each other's time on two cores.
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # one server is asked for too much
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "result.json"]
    assert len(list((folder / "logs").iterdir())) == 3 + 2 * len(CLIENTS)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def row(result: dict[str, Any], size: int | None) -> dict[str, Any]:
    (found,) = (row for row in result["servers"] if row["cache_size"] == size)
    return found


@pytest.mark.server
def test_servers_answer_what_vllms_benchmark_asks_and_count_it(result: dict[str, Any]) -> None:
    assert result["complete"]
    assert [check for check in result["checks"] if not check["kept"]] == [
        {"what": f"cache of {TOO_LARGE}: serves", "kept": False, "detail": row(result, TOO_LARGE)["reason"]}
    ]
    assert len(result["checks"]) == 3 + len(CLIENTS) * (2 + 3 + 2) + 2
    for size in (SIZE, None):
        assert row(result, size)["status"] == "ok"
        assert not [word for word in row(result, size)["command"] if word.startswith("/")]
        measured = row(result, size)["measurements"]
        assert [found["concurrency"] for found in measured] == list(CLIENTS)
        for found, clients in zip(measured, CLIENTS, strict=True):
            assert found["completed"] == clients * PER_CLIENT
            assert found["total_output_tokens"] == clients * PER_CLIENT * OUTPUT
            assert found["total_input_tokens"] == clients * PER_CLIENT * INPUT
            assert found["output_throughput"] > 0
            assert found["median_ttft_ms"] > found["median_tpot_ms"] > 0
    cache = row(result, SIZE)["expert_cache"]
    assert (cache["slots"], cache["experts"]) == (SIZE, 16)
    for found in row(result, SIZE)["measurements"]:
        assert 0 < found["hit_rate"] < 1
        missed = found["queries"] - found["hits"]
        moved = found["bytes_per_generated_token"] * found["total_output_tokens"]
        assert moved == pytest.approx(missed * cache["record_bytes"])


def test_a_load_that_cannot_be_made_is_a_line_and_the_next_one_runs(tmp_path: Path) -> None:
    bench, log = BenchProcess(), tmp_path / "log"
    try:
        with pytest.raises(BenchmarkFailed, match=r"^vllm bench serve: ended with code 2"):
            bench.run(["--num-prompts", "several"], log, 120)
        assert "invalid int value: 'several'" in log.read_text()
        # Nobody answers at this address, and the benchmark would wait for it.
        nobody = ["--base-url", "http://127.0.0.1:9", "--model", "m", "--ready-check-timeout-sec", "60"]
        with pytest.raises(BenchmarkFailed, match="not done after 1 s"):
            bench.run([*nobody, "--dataset-name", "random"], log, 1)
        bench.run(["--help"], log, 120)
        assert "--max-concurrency" in log.read_text()
        os.killpg(bench._process.pid, signal.SIGKILL)
        with pytest.raises(BenchmarkFailed, match="cannot be run: ended by SIGKILL"):
            bench.run(["--help"], log, 120)
    finally:
        bench.stop()


@pytest.mark.server
def test_the_resident_server_has_judged_all_greedy_tokens(result: dict[str, Any]) -> None:
    assert result["tokens"]["compared"]
    assert set(result["tokens"]["servers"]) == {f"cache of {SIZE}", "resident"}
    for found in result["tokens"]["servers"].values():
        assert found["tokens"] == len(PROMPTS) * (1 + COPIES) * GREEDY_TOKENS
        assert found["distinct"] > 30
        assert found["largest_gap"] < NEAR_TIE  # in float32
        assert found["largest_shift"] < NEAR_TIE
    assert 0 < result["tokens"]["servers"][f"cache of {SIZE}"]["mean_shift"] < NEAR_TIE / 10  # another kernel's sums
    reads = {name: found["read_tokens"] for name, found in result["tokens"]["servers"].items()}
    once = TEXTS * (TEXT_TOKENS - 1)
    assert reads == {f"cache of {SIZE}": 2 * once, "resident": once}


@pytest.mark.server
def test_a_server_that_refuses_is_a_row_that_says_why(result: dict[str, Any]) -> None:
    refused = row(result, TOO_LARGE)
    assert (refused["status"], refused["measurements"]) == ("failed", [])
    assert refused["reason"].startswith(f"--moe-expert-cache-size {TOO_LARGE} is more than the model's 16 experts")
    assert "\n" not in refused["reason"]


def bench(**changes: int) -> dict[str, int]:
    return {"completed": 8, "failed": 0, "total_output_tokens": 128, "total_input_tokens": 512} | changes


def metrics(**changes: float) -> dict[str, float]:
    names = {"requests": REQUESTS, "generated": GENERATED, "prompt": PROMPT}
    grown = {"requests": 8.0, "generated": 128.0, "prompt": 512.0} | changes
    return {names[name]: value for name, value in grown.items()}


@pytest.mark.parametrize(
    ("seen", "counted", "kept"),
    [
        (bench(), metrics(), [True, True]),
        (bench(), metrics(requests=9.0), [True, False]),
        (bench(), metrics(generated=127.0), [True, False]),
        (bench(), metrics(prompt=0.0), [True, False]),
        (bench(completed=7, failed=1), metrics(requests=7.0), [False, True]),
        (bench(total_output_tokens=127), metrics(generated=127.0), [False, True]),
    ],
)
def test_the_benchmark_and_vllms_metrics_have_to_agree(
    seen: dict[str, int], counted: dict[str, float], kept: list[bool]
) -> None:
    checks = traffic_checks("here", seen, counted, requests=8, new_tokens=16)
    assert [check.kept for check in checks] == kept
    assert all(check.what.startswith("here: ") for check in checks)


COUNTERS = {
    "queries": 100, "hits": 60, "admitted": 30, "staged": 10, "evictions": 25, "waves": 12, "copied": 41,
    "h2d_bytes": 410, "steps": 5,
}  # fmt: skip


def shown(counters: dict[str, int]) -> dict[str, float]:
    return {CACHE.format(name): float(counters[name]) for name in COUNTED}


@pytest.mark.parametrize(
    ("counters", "exposed", "kept"),
    [
        (COUNTERS, {}, [True, True, True]),
        (COUNTERS, {"hits": 61}, [False, True, True]),
        (COUNTERS, {"h2d_bytes": 400}, [False, True, True]),
        (COUNTERS | {"hits": 59}, {"hits": 59}, [True, False, True]),
        (COUNTERS | {"h2d_bytes": 400}, {"h2d_bytes": 400}, [True, True, False]),
        (COUNTERS | {"copied": 39, "h2d_bytes": 390}, {"h2d_bytes": 390}, [True, True, False]),
        (dict.fromkeys(COUNTERS, 0), dict.fromkeys(COUNTED, 0), [True, False, True]),
    ],
)
def test_the_caches_counts_have_to_agree_and_add_up(
    counters: dict[str, int], exposed: dict[str, int], kept: list[bool]
) -> None:
    checks = cache_checks("here", shown(COUNTERS | exposed), counters, record_bytes=10, all_resident=False)
    assert [check.kept for check in checks] == kept


def test_nothing_is_counted_where_all_experts_are_resident() -> None:
    nothing = dict.fromkeys(COUNTERS, 0)
    assert all(check.kept for check in cache_checks("here", shown(nothing), nothing, 10, all_resident=True))
    assert [check.kept for check in cache_checks("here", shown(COUNTERS), COUNTERS, 10, all_resident=True)] == [
        True, False, True,
    ]  # fmt: skip
    assert cache_figures(nothing, 16)["hit_rate"] is None
    assert cache_figures(COUNTERS, 16)["hit_rate"] == 0.6
    assert cache_figures(COUNTERS, 41)["bytes_per_generated_token"] == 10


def test_a_metric_that_is_missing_is_not_taken_for_zero() -> None:
    nothing = dict.fromkeys(COUNTERS, 0)
    assert not cache_checks("here", {}, nothing, 10, all_resident=True)[0].kept


def test_differences_count_from_zero_what_was_not_there() -> None:
    assert difference({"a": 5, "b": 2}, {"a": 3}) == {"a": 2, "b": 2}


SAME = {"read_tokens": 100, "mean_shift": 0.0, "largest_shift": 0.0}


def kept(found: list[float], own: list[float], shift: float = 0.0, **moved: float) -> list[bool]:
    """Whether both checks are kept for gaps and a mean shift, the resident server's own log probabilities moving."""
    checks = token_checks(
        "here", token_figures(found) | SAME | {"mean_shift": shift}, token_figures(own) | SAME | moved
    )  # fmt: skip
    return [check.kept for check in checks]


def test_tokens_are_held_against_the_resident_servers_own() -> None:
    own = [0.0] * 950 + [0.2] * 50
    assert token_figures(own) == {
        "tokens": 1000, "first_choices": 0.95, "mean_gap": pytest.approx(0.01), "largest_gap": 0.2,
    }  # fmt: skip
    assert kept(own, own) == [True, True]
    assert kept([0.0] * 930 + [0.4] * 70, own)[0]
    assert not kept([0.0] * 999 + [0.41], own)[0]
    assert not kept([0.0] * 999 + [0.41], own, largest_shift=0.3)[0]  # said beside it, but no excuse
    few = token_checks("here", token_figures([0.0] * 890 + [0.1] * 110) | SAME, token_figures(own) | SAME)[0]
    assert not few.kept
    assert "89.0% first choices" in few.detail
    exact = [0.0] * 1000
    assert kept([0.0] * 999 + [0.09], exact)[0]  # below what counts as a gap
    assert not kept([0.0] * 999 + [0.11], exact)[0]


def test_what_is_read_is_held_against_how_far_the_resident_servers_own_moves() -> None:
    assert shift_figures([-1.0, -2.5, 0.0], [-1.0, -2.0, -1.0]) == {
        "read_tokens": 3, "mean_shift": 0.5, "largest_shift": 1.0,
    }  # fmt: skip
    gaps = [0.0] * 10
    assert [kept(gaps, gaps, shift=shift)[1] for shift in (0.019, 0.021)] == [True, False]
    assert [kept(gaps, gaps, shift=shift, mean_shift=0.3)[1] for shift in (0.44, 0.46)] == [True, False]


def test_what_follows_two_dashes_is_for_the_servers() -> None:
    words = ["--model", "m", "--cache-sizes", "64,32", "--", "--attention-backend", "TRITON_ATTN"]
    options = serve.parse(words)
    assert options.server_arguments == ["--attention-backend", "TRITON_ATTN"]
    assert (options.cache_sizes, options.concurrency, options.routing) == ([32, 64], [1, 8, 32], "model")
    common = serve.common_arguments(options)
    assert common[common.index("--max-num-seqs") + 1] == "32"
    assert int(common[common.index("--max-model-len") + 1]) >= 256 + 64


SHIFT = {"read_tokens": 100, "mean_shift": 0.125, "largest_shift": 1.0}


def gpu_result() -> dict[str, Any]:
    times = {"output_throughput": 1234.5, "median_ttft_ms": 98.76, "median_tpot_ms": 7.654}
    cached = {"concurrency": 8, **times, "hit_rate": 0.425, "bytes_per_generated_token": 3.5 * 2**20}
    tokens = token_figures([0.0] * 9 + [0.25]) | {"distinct": 7}
    return {
        "environment": {
            "gpu": "H100", "pcie_generation": 5, "pcie_width": 16, "vllm": "0.32.0", "torch": "2.11.0", "date": "today",
        },
        "model": "gemma", "routing": "model", "input_tokens": 256, "output_tokens": 64, "prompts_per_client": 4,
        "servers": [
            {"server": "cache of 32", "status": "ok", "measurements": [cached]},
            {"server": "cache of 64", "status": "failed", "reason": "OutOfMemoryError: no room", "measurements": []},
            {"server": "resident", "status": "ok", "measurements": [{"concurrency": 8, **times}]},
        ],
        "tokens": {"compared": True, "servers": {"cache of 32": tokens | SHIFT, "resident": tokens}},
        "checks": [
            {"what": "a", "kept": True, "detail": "1"},
            {"what": "cache of 64: serves", "kept": False, "detail": "OutOfMemoryError: no room"},
        ],
    }  # fmt: skip


def test_the_document_has_a_line_for_each_server_and_load() -> None:
    text = render_gpu.serve(gpu_result())
    assert "| cache of 32 | 8 | 1,234 | 99 | 7.65 | 42.5% | 3.50 |\n" in text
    assert "| resident | 8 | 1,234 | 99 | 7.65 |  |  |\n" in text
    assert "| cache of 32 | 10 | 7 | 90.0% | 0.025 | 0.250 | 0.1250 |\n" in text
    assert "| resident | 10 | 7 | 90.0% | 0.025 | 0.250 | not read |\n" in text
    assert "1 of 2 checks are kept" in text
    assert "- **missed**: cache of 64: serves (OutOfMemoryError: no room)\n" in text
    assert "H100, PCIe 5 x16" in text
    simulated = gpu_result() | {"tokens": {"compared": False, "why": "the simulator picks"}}
    assert "Tokens are not compared: the simulator picks." in render_gpu.serve(simulated)
