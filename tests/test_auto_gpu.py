"""``auto`` on a real GPU: what was estimated is taken, vLLM's KV cache holds the floor, and long prompts fit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_config, start_worker
from make_checkpoint import make_checkpoint
from vllm import LLM, SamplingParams

from vllm_hlwq.engine_sizes import device_demand, device_estimate
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.options import ExpertCacheOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

LAYERS, EXPERTS, LENGTH, FLOOR = 6, 128, 4096, 3
WANTED = 40
"""Slots for which the GPU is given just enough."""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of Gemma-4-26B-A4B, random."""
    out = tmp_path_factory.mktemp("auto") / "gemma"
    make_checkpoint("gemma-4-26b-a4b", out, layers=LAYERS)
    return out


ENGINE: dict[str, Any] = {
    "max_model_len": LENGTH,
    "max_num_batched_tokens": LENGTH,
    "max_num_seqs": 16,
    "enable_prefix_caching": False,
    "attention_backend": "TRITON_ATTN",
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "enforce_eager": False,
}
OPTIONS = ExpertCacheOptions(cache_size="auto", kv_floor_seqs=FLOOR)


@pytest.mark.parametrize("runner", ["v2", "v1"])
def test_the_floor_is_there_and_long_prompts_run(gemma: Path, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "v2")))
    total = torch.cuda.mem_get_info()[1]
    config = engine_config(gemma, "auto", **ENGINE)
    estimate = device_estimate(config, OPTIONS, total)
    share = (estimate.bytes(WANTED) + estimate.banks.slot_bytes(1) // 2) / total
    llm = LLM(
        str(gemma), gpu_memory_utilization=share, dtype="bfloat16",
        additional_config={"moe_expert_cache_size": "auto", "moe_expert_kv_floor_seqs": FLOOR}, **ENGINE,
    )  # fmt: skip
    (sizes,) = llm.collective_rpc("expert_cache_sizes")
    assert (sizes["slots"], sizes["experts"], sizes["layers"]) == (WANTED, EXPERTS, LAYERS)
    planned = [estimate.banks.slot_bytes(WANTED), estimate.banks.staging_bytes(WANTED)]
    reported = [sizes["slot_bytes"], sizes["staging_bytes"]]
    assert all(abs(have - wanted) <= 0.03 * wanted for have, wanted in zip(planned, reported, strict=True))
    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.kv_cache_size_tokens >= FLOOR * LENGTH
    # Several prompts of full length at once, longer than a step together.
    prompts = [{"prompt_token_ids": [3 + (7 * p + i) % 2000 for i in range(LENGTH - 8)]} for p in range(FLOOR + 1)]
    outputs = llm.generate(prompts, SamplingParams(temperature=1, top_p=0.9, max_tokens=8, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * (FLOOR + 1)
    # The estimate is safe, but not so safe that most of the GPU is left to the KV cache.
    (available,) = llm.collective_rpc(lambda worker: worker.available_kv_cache_memory_bytes)
    unused = estimate.margin + estimate.activations + estimate.graphs + (estimate.dense + estimate.kv_cache) // 10
    assert available - estimate.kv_cache <= unused
    del llm
    gc.collect()


def test_a_gpu_that_may_not_hold_one_slot_is_refused_before_weights_are_read(gemma: Path) -> None:
    total = torch.cuda.mem_get_info()[1]
    settings = {**ENGINE, "enforce_eager": True}
    config = engine_config(gemma, "auto", **settings)
    options = ExpertCacheOptions(cache_size="auto")
    short = device_estimate(config, options, total).bytes(1) - 2**20
    assert device_demand(config, options, total).bytes(1) < short
    worker = start_worker(engine_config(gemma, "auto", gpu_memory_utilization=short / total, **settings))
    before = torch.cuda.memory_allocated()
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-cache-size auto: not even 1 fits surely: "):
        worker.load_model()
    assert torch.cuda.memory_allocated() == before
