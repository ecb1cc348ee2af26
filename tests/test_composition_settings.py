"""What cannot be run here is tested as far as configurations go; and the document says what is so."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import engine_config
from vllm.config import LoRAConfig
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_hlwq.checks import check_engine_config
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.metrics_endpoint import _warn_of_other_machines
from vllm_hlwq.options import ExpertCacheOptions
from vllm_hlwq.plugin import WORKER
from vllm_hlwq.worker import ExpertCacheWorker

DOCUMENT = Path(__file__).parent.parent / "docs/composition.md"
OPTIONS = ExpertCacheOptions(cache_size=4)


def test_pipeline_parallel_is_admitted(qwen3_moe_bf16: Path) -> None:
    config = engine_config(qwen3_moe_bf16, 4, pipeline_parallel_size=2)
    assert config.parallel_config.worker_cls == WORKER


def test_several_nodes_are_admitted(qwen3_moe_bf16: Path, log: list[str]) -> None:
    config = engine_config(
        qwen3_moe_bf16, 4, tensor_parallel_size=2, nnodes=2, node_rank=1, distributed_executor_backend="mp"
    )
    assert config.parallel_config.nnodes == 2
    assert config.parallel_config.worker_cls == WORKER
    assert log == ["Expert cache metrics on /metrics cover only the workers on this machine"]


def config_for_ray(model: Path) -> Any:
    """As if Ray was there: vLLM looks for it when it makes the configuration."""
    config = engine_config(model, 4)
    object.__setattr__(config.parallel_config, "distributed_executor_backend", "ray")
    return config


def worker_of_an_actor(model: Path) -> type:
    """vLLM's Ray actors are wrappers that make the worker which the configuration names."""
    config = config_for_ray(model)
    wrapper = WorkerWrapperBase(rpc_rank=0)
    wrapper.init_worker(
        [{"vllm_config": config, "local_rank": 0, "rank": 0, "distributed_init_method": "", "is_driver_worker": True}]
    )
    return type(wrapper.worker)


def test_workers_of_ray_are_ours(qwen3_moe_bf16: Path, log: list[str]) -> None:
    config = config_for_ray(qwen3_moe_bf16)
    check_engine_config(config, OPTIONS)
    _warn_of_other_machines(config.parallel_config)
    assert log == ["Expert cache metrics on /metrics cover only the workers on this machine"]
    # In a process of its own: vLLM's CPU workers do not start where numba is imported, as by tests before this one.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(worker_of_an_actor, qwen3_moe_bf16).result() is ExpertCacheWorker


def rows() -> list[list[str]]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_each_row_names_a_test_or_a_refusal() -> None:
    assert len(rows()) > 20
    for _, _, state, proof in rows():
        named = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", proof)
        assert state in {"works", "refused", "not run here"}
        assert (named is None) == (state == "refused"), proof
        if named is not None:
            assert f"def {named[2]}(" in (Path(__file__).parent / named[1]).read_text(), proof


REFUSED: dict[str, tuple[str, str, object]] = {
    "data parallel 2": ("parallel_config", "data_parallel_size", 2),
    "LoRA": ("", "lora_config", LoRAConfig()),
    "expert load balancing": ("parallel_config", "enable_eplb", True),
    "elastic expert parallelism": ("parallel_config", "enable_elastic_ep", True),
    "two micro-batches": ("parallel_config", "enable_dbo", True),
    "sleep mode": ("model_config", "enable_sleep_mode", True),
}


@pytest.mark.parametrize("row", [row for row in rows() if row[2] == "refused"], ids=lambda row: row[0])
def test_a_refusal_says_what_the_document_says(qwen3_moe_bf16: Path, row: list[str]) -> None:
    config = engine_config(qwen3_moe_bf16, 4)
    part, name, value = REFUSED[row[0]]
    object.__setattr__(getattr(config, part) if part else config, name, value)
    with pytest.raises(ExpertCacheError) as caught:
        check_engine_config(config, OPTIONS)
    assert str(caught.value) == f"{row[3]}, or remove --moe-expert-cache-size"
