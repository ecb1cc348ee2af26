"""The throughput benchmark on a CPU: real engines, real counters; failures are rows with their reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from engine_process import ENGINE_RUN, Task, failure_reason, measure_side_by_side, shared_processors
from throughput import control_names, graphs_without_compiling, rows_to_keep, whole_numbers
from throughput_report import add_predictions
from vllm.utils import torch_utils

from vllm_hlwq.bench.environment import parse_nvidia_smi

PROJECT = Path(__file__).parent.parent
SIZE, TOO_LARGE = 4, 99


@pytest.fixture(scope="session")
def benchmark_model(tiny_int4: Path) -> Path:
    """An INT4 checkpoint with a tokenizer; its layers have 16 experts, of which a token uses 4."""
    return tiny_int4


def throughput(model: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, str(ENGINE_RUN.with_name("throughput.py")), "--model", str(model),
            "--cache-sizes", f"{SIZE},16,{TOO_LARGE}", "--batches", "1,2", "--prompt-tokens", "12",
            "--new-tokens", "8,6", "--repeats", "1", "--controls", "uva", "--routing", "measured_locality",
            "--prefill-tokens", "40", "--start-together", "2", "--enforce-eager", "--out", str(out), *words,
        ],
        # Threads that wait by spinning steal each other's time on two cores.
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(benchmark_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("throughput") / "result.json"
    done = throughput(benchmark_model, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), out.with_suffix(".png")


def row(result: dict[str, Any], configuration: str, size: int) -> dict[str, Any]:
    return next(r for r in result["rows"] if (r["configuration"], r["cache_size"]) == (configuration, size))


@pytest.mark.server
def test_misses_are_counted_in_the_engine_and_moved_in_whole_records(result: tuple[dict[str, Any], Path]) -> None:
    found = row(result[0], "cache", SIZE)
    assert found["status"] == "ok", found
    cache = found["expert_cache"]
    assert (cache["layers"], cache["experts"], cache["slots"]) == (3, 16, SIZE)
    assert cache["slot_bytes"] == 3 * SIZE * cache["record_bytes"]
    cases = [(m["batch"], m["prompt_tokens"], m["new_tokens"]) for m in found["measurements"]]
    assert cases == [(1, 12, 8), (2, 12, 6), (1, 40, 0)]
    alone, _, prompt = found["measurements"]
    assert prompt["prefill_tokens_per_second"] == pytest.approx(40 / prompt["prefill_seconds"])
    # A prompt of 40 tokens names 9 experts or more of each layer, and 4 were there at most.
    assert 3 * 5 * cache["record_bytes"] <= prompt["prefill_bytes"] <= 3 * 16 * cache["record_bytes"]
    assert alone["counted_decode_steps"] == 8
    # A token needs 4 experts in each of 3 layers, and what is not hit is copied.
    missed = 3 * 4 * (1 - alone["decode_hit_rate"]) * cache["record_bytes"]
    assert alone["decode_bytes_per_token"] == pytest.approx(missed)
    assert 0.2 < alone["decode_hit_rate"] < 0.7  # an expert stays with probability 0.45, whatever the weights say
    assert alone["step_milliseconds"] == pytest.approx(1e3 / alone["decode_tokens_per_second"])


@pytest.mark.server
def test_with_all_experts_resident_nothing_moves_and_the_roofline_stands_on_it(
    result: tuple[dict[str, Any], Path],
) -> None:
    everything, found = row(result[0], "cache", 16), row(result[0], "cache", SIZE)
    assert everything["status"] == "ok", everything
    assert result[0]["roofline_base"] == "cache"
    assert "predicted_step_milliseconds" not in found["measurements"][-1]  # a prompt alone has no steps
    for resident, cached in zip(everything["measurements"][:-1], found["measurements"][:-1], strict=True):
        assert resident["decode_bytes_per_step"] == 0
        transfer = cached["decode_bytes_per_step"] / result[0]["link_bytes_per_second"]
        assert cached["predicted_step_milliseconds"] == pytest.approx(resident["step_milliseconds"] + 1e3 * transfer)


@pytest.mark.server
def test_what_cannot_run_is_a_row_that_says_why(result: tuple[dict[str, Any], Path]) -> None:
    too_large = row(result[0], "cache", TOO_LARGE)
    assert too_large["status"] == "failed"
    assert "--moe-expert-cache-size 99 is more than the model's 16 experts" in too_large["reason"]
    assert "CUDA" in row(result[0], "uva", SIZE)["reason"]
    assert all(
        r.get("reason", "") == r.get("reason", "").strip().splitlines()[0] for r in result[0]["rows"] if "reason" in r
    )


@pytest.mark.server
def test_engines_that_started_together_share_what_only_the_machine_could_say(
    result: tuple[dict[str, Any], Path],
) -> None:
    for size in (SIZE, 16):
        found = row(result[0], "cache", size)
        assert found["host_peak_bytes"] is None
        assert found["start_up_seconds"] is None
    assert result[0]["started_together"] == 2


@pytest.mark.server
def test_a_run_that_was_cut_short_goes_on(
    result: tuple[dict[str, Any], Path], benchmark_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    whole = result[0]
    # As it is after the first engine. Of another number of repeats a row is no part of the run.
    other = json.loads(json.dumps(row(whole, "cache", 16)))
    for found in other["measurements"]:
        found["repeats"] = 2
    out.write_text(json.dumps(whole | {"rows": [row(whole, "cache", SIZE), other]}))
    done = throughput(benchmark_model, out, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads(out.read_text())
    assert [(r["configuration"], r["cache_size"], r["status"]) for r in again["rows"]] == [
        (r["configuration"], r["cache_size"], r["status"]) for r in whole["rows"]
    ]
    kept, measured = row(again, "cache", SIZE)["measurements"], row(again, "cache", 16)["measurements"]
    assert [found["prefill_seconds_each"] for found in kept] == [
        found["prefill_seconds_each"] for found in row(whole, "cache", SIZE)["measurements"]
    ]
    assert [found["repeats"] for found in measured] == [1, 1, 1]
    assert (again["starts"], again["link_bytes_per_second"]) == (2, whole["link_bytes_per_second"])


def test_a_run_goes_on_only_on_its_machine_and_in_its_way(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    header = {
        "environment": {"date": "2026-01-01", "memory_gib": 31.0, "driver": "580"}, "model": "m", "routing": "uniform",
        "attention_backend": "TRITON_ATTN", "compiled": False, "started_together": 3, "link_bytes_per_second": 5e10,
    }  # fmt: skip
    assert rows_to_keep(out, header | {}) == []
    out.write_text(json.dumps(header | {"rows": [{"configuration": "cache"}], "starts": 2}))
    later = {"environment": {"date": "2026-01-02", "memory_gib": 125.9, "driver": "580"}, "link_bytes_per_second": 4e10}
    result = header | later
    assert rows_to_keep(out, result) == [{"configuration": "cache"}]
    assert (result["starts"], result["link_bytes_per_second"]) == (3, 5e10)
    for change, said in (
        ({"environment": {"driver": "590", "date": "2026-01-02"}}, "driver 580, here it is 590"),
        ({"environment": {"driver": "580", "gpu": "NVIDIA H200"}}, "gpu None, here it is NVIDIA H200"),
        ({"routing": "measured_locality"}, "routing uniform, here it is measured_locality"),
    ):
        with pytest.raises(SystemExit) as caught:
            rows_to_keep(out, header | change)
        assert str(caught.value) == f"throughput: --resume: {out} has {said}; give another --out"
    for text in ('{"rows": []}', "[1]", '{"rows"'):
        out.write_text(text)
        with pytest.raises(SystemExit, match=r"result\.json is no result of this command \(.*\); give another --out$"):
            rows_to_keep(out, header | {})


def test_processes_that_start_together_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert shared_processors(1) == {}
    assert [shared_processors(count)["OMP_NUM_THREADS"] for count in (2, 3, 99)] == ["8", "5", "1"]
    # vLLM's name for a number that it chose itself: with it, it serves with one thread as it does alone.
    assert torch_utils.OMP_NUM_THREADS_SET_BY_VLLM in shared_processors(2)


def test_an_interrupt_ends_engines_at_once() -> None:
    tasks = [Task({}), Task({})]
    for task in tasks:
        task.start({"task": "probe"})
    results = measure_side_by_side(tasks, 120)
    next(results)
    # A process that does not end by itself.
    os.kill(tasks[1]._process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert time.monotonic() - begun < 10
    assert all(task._process.poll() is not None for task in tasks)


def test_a_result_is_there_before_the_next_is_measured() -> None:
    tasks = [Task({}), Task({})]
    for task in tasks:
        task.start({"task": "probe"})
    results = measure_side_by_side(tasks, 120)
    assert next(results)["environment"]["device"] == "cpu"
    # The second has started, and is not yet told to measure.
    assert sorted(path.name for path in Path(tasks[1]._scratch.name).iterdir()) == ["log", "started"]
    results.close()
    assert not any(Path(task._scratch.name).exists() for task in tasks)
    assert all(task._process.poll() is not None for task in tasks)


@pytest.mark.server
def test_the_chart_shows_two_panels_with_lines(result: tuple[dict[str, Any], Path]) -> None:
    image = matplotlib.image.imread(result[1])[..., :3]
    assert image.shape[1] > 1.5 * image.shape[0]
    coloured = (image.max(-1) - image.min(-1)) > 0.3  # lines and markers; axes and text are grey
    half = image.shape[1] // 2
    assert coloured[:, :half].any()
    assert coloured[:, half:].any()


def measured(name: str, size: int | None, step: float, slots: int | None = None, moved: float | None = None) -> dict:
    measurement = {"batch": 1, "step_milliseconds": step}
    cache = None if slots is None else {"slots": slots, "experts": 8}
    if moved is not None:
        measurement["decode_bytes_per_step"] = moved
    return {"configuration": name, "cache_size": size, "status": "ok", "expert_cache": cache,
            "measurements": [measurement]}  # fmt: skip


def test_the_roofline_adds_the_transfer_to_marlins_resident_step() -> None:
    rows = [
        measured("cache", 2, 50.0, slots=2, moved=3e9),
        measured("cache", 8, 6.0, slots=8, moved=0.0),
        measured("resident", None, 4.0),
        measured("resident:marlin", None, 5.0),
        measured("uva:marlin", 2, 90.0),
    ]
    result = {"rows": rows, "link_bytes_per_second": 50e9}
    add_predictions(result)
    assert result["roofline_base"] == "resident:marlin"
    assert rows[0]["measurements"][0]["predicted_step_milliseconds"] == pytest.approx(5 + 60)
    assert "predicted_step_milliseconds" not in rows[4]["measurements"][0]


LOG = """\
(EngineCore pid=1) INFO 11-24 08:21:38 [core.py:1] fine
(EngineCore pid=1) ERROR 11-24 08:21:38 [core.py:1512] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (LOG, 1, "OutOfMemoryError: CUDA out of memory. Tried 2 GiB"),
        ("pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
         "  Value error, max_model_len (9) is greater than 4\n    For further information visit", 1,
         "ValidationError: 1 validation error for ModelConfig: Value error, max_model_len (9) is greater than 4"),
        ("[rank0]: ValueError: No common block size", 1, "ValueError: No common block size"),
        ("ERROR 1 [x.py:3] Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor.\n"
         "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue", 1,
         "Worker proc VllmWorker-0 died unexpectedly (exit code: -4)"),
        ("loading", -9, "ended by SIGKILL"),
        ("", 3, "ended with code 3 and no error in its log"),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_error_that_is_no_consequence(log: str, code: int, reason: str) -> None:
    assert failure_reason(log, code) == reason


def test_graphs_are_captured_up_to_the_largest_batch() -> None:
    sizes = {batch: graphs_without_compiling(batch)["cudagraph_capture_sizes"] for batch in (1, 2, 12, 32)}
    assert sizes == {1: [1], 2: [1, 2], 12: [1, 2, 4, 8, 12], 32: [1, 2, 4, 8, 16, 32]}


def test_lists_of_numbers_and_controls() -> None:
    assert whole_numbers("32,8,8") == [8, 32]
    assert control_names("resident,uva:marlin") == ["resident", "uva:marlin"]
    for function, text in ((whole_numbers, "0,4"), (whole_numbers, "a"), (control_names, "uvx")):
        with pytest.raises(ValueError, match=text.split(",")[0]):
            function(text)


def test_the_gpu_is_described_by_nvidia_smi() -> None:
    assert parse_nvidia_smi("NVIDIA H100 80GB HBM3, 570.86.15, 81559, 5, 16\n") == {
        "gpu": "NVIDIA H100 80GB HBM3", "driver": "570.86.15", "gpu_memory_mib": 81559,
        "pcie_generation": 5, "pcie_width": 16,
    }  # fmt: skip
