"""Where metrics land without a server: Prometheus's registry, vLLM's log line, the engine of the Python interface."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_config
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import AggregatedLoggingStatLogger, LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vllm_hlwq import metrics_endpoint
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.metrics import (
    H2D_BYTES,
    HITS,
    QUERIES,
    SLOTS,
    USAGE,
    Metric,
)
from vllm_hlwq.metrics_files import MetricFiles, create_folder, folder_of
from vllm_hlwq.options import ExpertCacheOptions
from vllm_hlwq.plugin import configure

LINE = "vllm.v1.metrics.loggers"


@pytest.fixture
def stop_exposing() -> Iterator[None]:
    yield
    while metrics_endpoint._registered:
        REGISTRY.unregister(metrics_endpoint._registered.pop())
    logging.getLogger(LINE).filters.clear()
    unregister_vllm_metrics()


@pytest.fixture
def exposed(qwen3_moe_bf16: Path, stop_exposing: None) -> Any:
    return engine_config(qwen3_moe_bf16, 4, served_model_name="m")


def exposed_samples(registry: CollectorRegistry = REGISTRY) -> dict[str, float]:
    families = registry.collect()
    return {s.name: s.value for family in families for s in family.samples if "moe_expert" in s.name}


def test_the_collector_outlives_the_start_of_vllms_own(exposed: Any) -> None:
    PrometheusStatLogger(exposed, [0])
    MetricFiles(folder_of(exposed.instance_id), {"model_name": "m", "engine": "0"}).write({(QUERIES, ""): 3})
    assert exposed_samples() == {"vllm:moe_expert_cache_queries_total": 3}


def test_the_newest_engine_of_a_process_is_exposed(exposed: Any, qwen3_moe_bf16: Path) -> None:
    newer = engine_config(qwen3_moe_bf16, 4)
    for config, value in ((exposed, 1), (newer, 2)):
        MetricFiles(folder_of(config.instance_id), {"engine": "0"}).write({(QUERIES, ""): value})
    assert exposed_samples() == {"vllm:moe_expert_cache_queries_total": 2}
    assert len(logging.getLogger(LINE).filters) == 1


@pytest.mark.parametrize(("cache_size", "disable_log_stats"), [(0, False), (4, True)])
def test_nothing_is_registered_when_cache_or_statistics_are_off(
    qwen3_moe_bf16: Path, stop_exposing: None, cache_size: int, disable_log_stats: bool
) -> None:
    config = engine_config(qwen3_moe_bf16, cache_size, disable_log_stats=disable_log_stats)
    assert not metrics_endpoint._registered
    assert not logging.getLogger(LINE).filters
    assert not folder_of(config.instance_id).exists()


def test_the_folder_is_private_and_another_engines_is_left_alone(exposed: Any) -> None:
    folder = folder_of(exposed.instance_id)
    assert folder.stat().st_mode & 0o777 == 0o700
    taken = exposed.instance_id
    assert create_folder(exposed) == folder_of(exposed.instance_id) != folder
    assert exposed.instance_id != taken


def test_several_api_servers_read_vllms_folder_and_only_their_parent_prepares_it(
    qwen3_moe_bf16: Path, stop_exposing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def config_of(rank: int) -> Any:
        arguments = EngineArgs(
            model=str(qwen3_moe_bf16), dtype="bfloat16", max_model_len=512, enforce_eager=True,
            additional_config={"moe_expert_cache_size": 4},
        )  # fmt: skip
        arguments._api_process_count, arguments._api_process_rank = 2, rank
        return arguments.create_engine_config()

    parent, child = config_of(-1), config_of(0)
    assert folder_of(parent.instance_id).resolve() == tmp_path.resolve()
    assert not folder_of(child.instance_id).exists()
    assert not metrics_endpoint._registered
    MetricFiles(folder_of(parent.instance_id), {"engine": "0"}).write({(QUERIES, ""): 3})
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    assert exposed_samples(registry) == {"vllm:moe_expert_cache_queries_total": 3}


def iteration(prompt_tokens: int, cached_tokens: int, generated: int) -> IterationStats:
    stats = IterationStats()
    stats.prompt_token_stats.computed = prompt_tokens
    stats.prompt_token_stats.local_cache_hit = stats.prompt_token_stats.cached_tokens = cached_tokens
    stats.prompt_token_stats.total = prompt_tokens + cached_tokens
    stats.num_generation_tokens = generated
    return stats


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[Any], str]]:
    line_logger = logging.getLogger(LINE)
    line_logger.addHandler(caplog.handler)
    level = line_logger.level
    line_logger.setLevel(logging.INFO)

    def log(stat_logger: Any) -> str:
        caplog.clear()
        stat_logger.log()
        return "\n".join(caplog.messages)

    yield log
    line_logger.removeHandler(caplog.handler)
    line_logger.setLevel(level)


def test_the_log_line_has_the_hit_rate_and_bytes_a_token_since_the_last_line(
    exposed: Any, logged: Callable[[Any], str]
) -> None:
    files = {
        engine: MetricFiles(folder_of(exposed.instance_id), {"model_name": "m", "engine": engine})
        for engine in ("0", "1")
    }
    prometheus = PrometheusStatLogger(exposed, [0, 1])
    loggers = [LoggingStatLogger(exposed, engine) for engine in (0, 1)]
    together = AggregatedLoggingStatLogger(exposed, [0, 1])

    def step(engine: int, stats: IterationStats, report: dict[Metric, int]) -> None:
        for stat_logger in (prometheus, loggers[engine], together):
            stat_logger.record(SchedulerStats(), stats, engine_idx=engine)
        files[str(engine)].write({(metric, ""): value for metric, value in report.items()})

    step(0, iteration(100, 60, 20), {QUERIES: 1000, HITS: 250, H2D_BYTES: 600_000_000})
    step(1, iteration(0, 0, 10), {QUERIES: 100, HITS: 90, H2D_BYTES: 10_000_000})
    first = logged(loggers[0])
    assert first.startswith("Engine 000: Avg prompt throughput")
    assert first.endswith("%, Expert cache hit rate: 25.0%, 5.00 MB/token")
    assert logged(loggers[1]).endswith("%, Expert cache hit rate: 90.0%, 1.00 MB/token")
    assert logged(together).endswith(f"%, Expert cache hit rate: {340 / 11:.1f}%, {610 / 130:.2f} MB/token")

    step(0, iteration(0, 0, 5), {QUERIES: 1100, HITS: 330, H2D_BYTES: 610_000_000})
    assert logged(loggers[0]).endswith("%, Expert cache hit rate: 80.0%, 2.00 MB/token")
    # A long prompt that has not given its first token.
    step(0, IterationStats(), {QUERIES: 1200, HITS: 330, H2D_BYTES: 700_000_000})
    assert logged(loggers[0]).endswith("%, Expert cache hit rate: 0.0%")
    step(0, iteration(0, 0, 5), {})
    without_steps = logged(loggers[0])
    assert without_steps
    assert "Expert cache" not in without_steps


def test_the_layer_label_has_a_switch_of_its_own() -> None:
    options = ExpertCacheOptions.from_additional_config
    assert options({"moe_expert_cache_size": 4}).metrics_per_layer is False
    assert options({"moe_expert_metrics_per_layer": True}).metrics_per_layer is True
    with pytest.raises(ExpertCacheError, match=r"^moe_expert_metrics_per_layer=1: must be true or false$"):
        options({"moe_expert_metrics_per_layer": 1})

    class Config:
        additional_config = {"moe_expert_metrics_per_layer": True}  # noqa: RUF012

    with pytest.raises(ExpertCacheError, match=r"--moe-expert-metrics-per-layer has no meaning without --moe-expert-c"):
        configure(Config())


GRAPHS = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28,
}  # fmt: skip
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


@pytest.mark.server
@pytest.mark.parametrize(
    "arguments",
    [pytest.param({"enforce_eager": True}, id="eager"), pytest.param(GRAPHS, id="cuda-graphs", marks=ON_A_GPU)],
)
def test_an_engine_from_python_has_the_counters_of_its_run(
    tiny_int4: Path, stop_exposing: None, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    llm = LLM(
        str(tiny_int4), additional_config={"moe_expert_cache_size": 4}, disable_log_stats=False, max_model_len=512,
        max_num_seqs=4, **arguments,
    )  # fmt: skip
    llm.generate(["The import statement", "class Queue:"] * 2, SamplingParams(max_tokens=20), use_tqdm=False)
    (layers,) = llm.collective_rpc("expert_cache_counters")
    counted = ("queries", "hits", "evictions", "staged", "waves", "h2d_bytes")
    expected = {f"vllm:moe_expert_cache_{name}": sum(layer[name] for layer in layers.values()) for name in counted}
    assert all(expected.values())
    expected |= {SLOTS.name: 4 * len(layers), USAGE.name: 1}

    def exposed() -> dict[str, float]:
        return {metric.name: metric.value for metric in llm.get_metrics() if "moe_expert" in metric.name}

    deadline = time.monotonic() + 10
    while exposed() != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert exposed() == expected
    llm.llm_engine.engine_core.shutdown()
