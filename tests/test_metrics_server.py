"""/metrics of real servers: equal to the counters of the run, whoever serves it and however many ranks count."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_hlwq.bench.server import ENVIRONMENT, VLLM, Server
from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.metrics import METRICS

pytestmark = pytest.mark.server

PROJECT = Path(__file__).parent.parent
PREFIX = "vllm:moe_expert_cache_"
COUNTED = ("queries", "hits", "evictions", "staged", "waves", "h2d_bytes")
LABELS = {"model_name": "tiny", "engine": "0"}
LAYERS, SLOTS = 3, 4
ARGUMENTS = (
    "--moe-expert-cache-size", str(SLOTS), "--max-model-len", "1024", "--max-num-seqs", "8",
    "--served-model-name", "tiny", "--enforce-eager",
)  # fmt: skip


@contextmanager
def started(model: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server with a folder of its own for temporary files, in which it must leave nothing of ours."""
    with (
        tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as folder,  # short: sockets are made in it
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {"TMPDIR": folder, **environment}.items():
            patch.setenv(name, value)
        with Server(model, *ARGUMENTS, *arguments) as server:
            assert len(list(Path(folder).glob("vllm-hlwq-*"))) == 1
            yield server
        assert not list(Path(folder).glob("vllm-hlwq-*"))


@pytest.fixture(scope="module")
def single(tiny_int4: Path) -> Iterator[Server]:
    with started(tiny_int4, VLLM_LOG_STATS_INTERVAL="6") as server:
        yield server


def complete(server: Server, prompt: str, tokens: int) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", body)


def counters(server: Server) -> list[dict[str, dict[str, int]]]:
    """Counters of each rank and layer, read by way of the engine."""
    ranks: list[dict[str, dict[str, int]]] = server.post("/collective_rpc", {"method": "expert_cache_counters"})[
        "results"
    ]
    return ranks


def exposed(server: Server) -> dict[tuple[str, str], float]:
    """Our samples on /metrics by name, without the prefix, and layer."""
    found = {}
    for (name, labels), value in server.metrics().items():
        if name.startswith(PREFIX):
            rest = dict(labels)
            layer = rest.pop("layer", "")
            assert rest == LABELS
            found[name.removeprefix(PREFIX), layer] = value
    return found


def assert_soon_exposed(server: Server, expected: dict[tuple[str, str], float]) -> None:
    deadline = time.monotonic() + 10
    while (found := exposed(server)) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == expected


def totals(layers: dict[str, dict[str, int]]) -> dict[str, int]:
    return {name: sum(layer[name] for layer in layers.values()) for name in COUNTED}


def test_a_server_exposes_the_counters_of_its_run(single: Server) -> None:
    assert_soon_exposed(
        single,
        {**{(f"{name}_total", ""): 0 for name in COUNTED}, ("slots", ""): LAYERS * SLOTS, ("usage_perc", ""): 0},
    )
    for prompt in ("The import statement", "class Queue:\n    def __init__(self"):
        complete(single, prompt, 20)
    (rank,) = counters(single)
    run = totals(rank)
    assert all(run.values())
    expected = {(f"{name}_total", ""): float(value) for name, value in run.items()}
    assert_soon_exposed(single, {**expected, ("slots", ""): LAYERS * SLOTS, ("usage_perc", ""): 1})
    assert single.metrics()["vllm:generation_tokens_total", tuple(sorted(LABELS.items()))] == 40


def test_metrics_after_vllms_own_benchmark_are_the_counters_of_its_run(
    single: Server, tiny_int4: Path, tmp_path: Path
) -> None:
    def metric(name: str) -> float:
        return sum(value for (found, _), value in single.metrics().items() if found == name)

    requests, new_tokens = 12, 16
    before, tokens = totals(counters(single)[0]), metric("vllm:generation_tokens_total")
    command = [
        VLLM, "bench", "serve", "--base-url", single.url, "--model", "tiny", "--tokenizer", str(tiny_int4),
        "--dataset-name", "random", "--random-input-len", "40", "--random-output-len", str(new_tokens),
        "--num-prompts", str(requests), "--max-concurrency", "4", "--ignore-eos", "--disable-tqdm",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (requests, requests * new_tokens)
    # The benchmark asks once, to see whether the server answers, before it begins.
    assert metric("vllm:generation_tokens_total") - tokens in (requests * new_tokens, (requests + 1) * new_tokens)
    run = totals(counters(single)[0])
    assert all(run[name] > before[name] for name in COUNTED)
    gauges = {("slots", ""): LAYERS * SLOTS, ("usage_perc", ""): 1}
    assert_soon_exposed(single, {**{(f"{name}_total", ""): float(value) for name, value in run.items()}, **gauges})


LOG_LINE = re.compile(
    r"Engine 000: Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s, "
    r".*?(?:Expert cache hit rate: ([\d.]+)%(?:, ([\d.]+) MB/token)?)?$",
    re.MULTILINE,
)


def log_lines_at_work(server: Server, start: int) -> list[tuple[str, ...]]:
    """Hit rate and MB a token, as text, of lines past ``start`` characters with tokens or experts in their interval."""
    found = [match.groups("") for match in LOG_LINE.finditer(server.log, start)]
    return [parts[2:] for parts in found if parts[:2] != ("0.0", "0.0") or parts[2]]


def test_the_log_line_has_the_hit_rate_and_bytes_a_token_of_its_interval(single: Server) -> None:
    prompt, new_tokens = "If the file cannot be", 30
    for _ in range(5):  # a request can fall on both sides of a line, and its counters come half a second later
        time.sleep(7)  # what came before is logged
        start, before = len(single.log), totals(counters(single)[0])
        complete(single, prompt, new_tokens)
        after = totals(counters(single)[0])
        time.sleep(13)
        lines = log_lines_at_work(single, start)
        if len(lines) == 1:
            break
    ((rate, megabytes),) = lines
    run = {name: after[name] - before[name] for name in COUNTED}
    prompt_tokens = len(single.post("/tokenize", {"model": "tiny", "prompt": prompt})["tokens"])
    assert float(rate) == pytest.approx(100 * run["hits"] / run["queries"], abs=0.051)
    assert float(megabytes) == pytest.approx(run["h2d_bytes"] / (prompt_tokens + new_tokens) / 1e6, abs=0.0051)


def test_the_dashboard_shows_what_there_is(single: Server) -> None:
    text = (PROJECT / "examples/grafana/expert_cache.json").read_text()
    board = json.loads(text)
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    used = {name for expression in expressions for name in re.findall(r"\bvllm:\w+", expression)}
    labels_of: dict[str, set[str]] = {}
    for name, labels in single.metrics():
        labels_of.setdefault(name, set()).update(dict(labels))
    assert used <= set(labels_of)
    assert {metric.exposed_name for metric in METRICS} <= used
    for expression in expressions:
        for name, selector in re.findall(r"(vllm:\w+)\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)=", selector)) <= labels_of[name], expression
    by = {label for e in expressions for group in re.findall(r"by \((.*?)\)", e) for label in group.split(", ")}
    assert by == {"model_name", "engine", "layer"}  # layer: see the next test


def test_two_api_servers_expose_the_same_sums_by_layer(tiny_int4: Path) -> None:
    with started(tiny_int4, "--api-server-count", "2", "--moe-expert-metrics-per-layer") as server:
        for index in range(6):
            complete(server, f"A list comprehension {index}", 8)
        (rank,) = counters(server)
        expected: dict[tuple[str, str], Any] = {
            (f"{name}_total", layer): float(counts[name]) for layer, counts in rank.items() for name in COUNTED
        }
        for layer in rank:
            expected |= {("slots", layer): SLOTS, ("usage_perc", layer): 1}
        assert len(expected) == LAYERS * len(METRICS)
        assert_soon_exposed(server, expected)
        # Connections are spread over the servers; each must say the same.
        assert all(exposed(server) == expected for _ in range(8))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_tensor_parallel_ranks_count_experts_once_and_bytes_each(tmp_path: Path, expert_parallel: bool) -> None:
    # Half of an expert's 192 rows must be whole groups.
    export_int4(open_source(PROJECT / "examples/tiny_moe/model"), tmp_path / "int4", group_size=32)
    extra = ["--enable-expert-parallel"] if expert_parallel else []
    environment = {"VLLM_CPU_SIM_MULTI_NUMA": "1"}
    with started(tmp_path / "int4", "--tensor-parallel-size", "2", *extra, **environment) as server:
        complete(server, "The import statement", 20)
        first, second = (totals(rank) for rank in counters(server))
        if expert_parallel:
            assert first != second
            expected = {name: first[name] + second[name] for name in COUNTED}
        else:
            assert first == second
            expected = {**first, "h2d_bytes": 2 * first["h2d_bytes"]}
        gauges = {("slots", ""): LAYERS * SLOTS * (2 if expert_parallel else 1), ("usage_perc", ""): 1}
        assert_soon_exposed(server, {**{(f"{name}_total", ""): float(v) for name, v in expected.items()}, **gauges})
