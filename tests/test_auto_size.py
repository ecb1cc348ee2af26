"""A cache size of ``auto`` becomes a number before the model is built, the same in every worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import LoadedModel, engine_config, start_worker
from vllm.config.multimodal import MultiModalConfig

from vllm_hlwq import auto_size
from vllm_hlwq.auto_size import settle_cache_size
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.engine_sizes import device_demand, device_estimate
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.memory_check import Device
from vllm_hlwq.options import ExpertCacheOptions

GIB = 2**30
AUTO = ExpertCacheOptions(cache_size="auto")
MODEST = {"gpu_memory_utilization": 0.3}
"""On a CPU vLLM wants this part of the memory to be free."""


@pytest.fixture(scope="module")
def qwen3_moe_int4(qwen3_moe_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen3-moe-int4")
    export_int4(qwen3_moe_bf16, out)
    return out


@pytest.fixture(scope="module", autouse=True)
def first_worker(qwen3_moe_int4: Path) -> None:
    """The first worker of a process sets up logging anew, and the process groups that all of them use."""
    start_worker(engine_config(qwen3_moe_int4, "auto", **MODEST))


def config_of(model: Path, **engine_args: Any) -> Any:
    """A configuration as on CUDA: on a CPU vLLM reserves the KV cache by an environment variable."""
    config = engine_config(model, "auto", **MODEST | engine_args)
    config.cache_config.kv_cache_memory_bytes = None
    return config


def settle(config: Any, granted: int, options: ExpertCacheOptions = AUTO, **device: int) -> int:
    """The number that a worker with a GPU comes to; the process groups are those of this process's worker."""
    start_worker(config)
    settle_cache_size(config, options, Device(**{"total": GIB, "free": GIB, "granted": granted} | device))
    slots = config.additional_config["moe_expert_cache_size"]
    assert isinstance(slots, int)
    return slots


def test_on_a_cpu_all_experts_are_resident(qwen3_moe_int4: Path, log: list[str]) -> None:
    loaded = LoadedModel(qwen3_moe_int4, "auto", **MODEST)
    sizes = loaded.worker.expert_cache_sizes()
    assert (sizes["slots"], sizes["experts"], sizes["host_bytes"]) == (16, 16, 0)
    assert log[0] == (
        "Expert cache: --moe-expert-cache-size auto is 16: on a CPU host and device are one memory, so all 16 experts "
        "of a layer are resident"
    )
    output = loaded.run(0, torch.ones(3, 128, dtype=torch.bfloat16), torch.eye(3, 16))
    assert output.shape == (3, 128)
    assert output.isfinite().all()


RECORD = 3 * (128 * 128 // 2 + 128 * 2)
"""Of an expert of ``qwen3_moe_int4``: three matrices of 128 x 128 in groups of 128."""
SMALL = {"max_num_batched_tokens": 128, "max_num_seqs": 8}
ONE_STAGED = ExpertCacheOptions(cache_size="auto", staging_size=1)


def test_as_many_slots_as_the_estimate_admits_and_not_one_more(qwen3_moe_int4: Path, log: list[str]) -> None:
    config = config_of(qwen3_moe_int4, **SMALL)
    estimate = device_estimate(config, ONE_STAGED, GIB)
    taken = estimate.beside_banks + 2 * 7 * RECORD + 2 * 1 * RECORD  # two layers, two staging banks
    assert settle(config, taken, ONE_STAGED) == 7
    assert log == [
        f"Expert cache: --moe-expert-cache-size auto is 7: {estimate.dense} for weights outside the experts, "
        f"{128 * 4 * (3 * 128 + 128) * 2} for the experts' working memory, {estimate.activations} for other "
        f"activations, {estimate.sampler} for the sampler, 0 for CUDA graphs, {2 * 2 * 2 * 2 * 32 * (512 + 128) * 2} "
        f"for the KV cache of 2 sequences of 512 tokens and a margin of {estimate.margin} of {taken} bytes, where "
        f"--gpu-memory-utilization 0.3 grants {taken}, leave {16 * RECORD} for slots and staging: 7 slots in each of 2 "
        f"layers take {14 * RECORD}, staging {2 * RECORD}"
    ]
    assert settle(config_of(qwen3_moe_int4, **SMALL), taken - 1, ONE_STAGED) == 6
    assert settle(config_of(qwen3_moe_int4, **SMALL), taken + 2 * RECORD, ONE_STAGED) == 8


def test_where_all_experts_fit_all_are_resident(qwen3_moe_int4: Path, log: list[str]) -> None:
    config = config_of(qwen3_moe_int4)
    estimate = device_estimate(config, AUTO, GIB)
    assert settle(config, estimate.beside_banks + 2 * 16 * RECORD) == 16
    assert log[0].endswith(f"and all 16 experts of 2 layers take {32 * RECORD}")


def test_the_floor_is_what_the_user_says(qwen3_moe_int4: Path) -> None:
    config = config_of(qwen3_moe_int4)
    caches = [
        device_estimate(config, ExpertCacheOptions(cache_size="auto", kv_floor_seqs=n), GIB).kv_cache for n in (1, 2, 5)
    ]
    assert caches == [caches[0], 2 * caches[0], 5 * caches[0]]
    assert device_estimate(config, AUTO, GIB).kv_cache == caches[1]


def test_who_reserves_a_kv_cache_may_use_all_that_is_free(qwen3_moe_int4: Path, log: list[str]) -> None:
    config = config_of(qwen3_moe_int4)
    config.cache_config.kv_cache_memory_bytes = 12_345
    estimate = device_estimate(config, ONE_STAGED, GIB)
    assert estimate.kv_cache == 12_345
    assert settle(config, 0, ONE_STAGED, free=estimate.bytes(5)) == 5
    assert "12345 for KV cache by --kv-cache-memory-bytes" in log[0]


def refusal(config: Any, granted: int, options: ExpertCacheOptions = AUTO) -> str:
    with pytest.raises(ExpertCacheError) as caught:
        settle(config, granted, options)
    assert config.additional_config["moe_expert_cache_size"] == "auto"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_certainly_does_not_fit_is_refused_as_a_number_is(qwen3_moe_int4: Path) -> None:
    config = config_of(qwen3_moe_int4)
    message = refusal(config, device_demand(config, AUTO, GIB).bytes(1) - 1)
    assert message.startswith("--moe-expert-cache-size 1: ")
    assert "the model does not fit at all, not even with 1: raise --gpu-memory-utilization" in message


def test_what_may_not_fit_is_refused_with_the_number_that_may(qwen3_moe_int4: Path) -> None:
    config = config_of(qwen3_moe_int4)
    estimate, demand = device_estimate(config, ONE_STAGED, GIB), device_demand(config, ONE_STAGED, GIB)
    message = refusal(config, estimate.bytes(1) - 1, ONE_STAGED)
    assert message.startswith("--moe-expert-cache-size auto: not even 1 fits surely: ")
    assert f"are {estimate.bytes(1)} bytes on each GPU, where --gpu-memory-utilization 0.3 grants" in message
    assert message.endswith(f"or try a number, {demand.most_slots(estimate.bytes(1) - 1)} at most")


UNKNOWN = {
    "several layers' GPUs": ("parallel_config", "world_size", 2, "layers or sequences are dealt to several GPUs"),
    "a name": ("model_config", "model", "owner/name", "owner/name is no local folder"),
    "a KV cache of another kind": ("model_config", "is_hybrid", True, "reserve it (--kv-cache-memory-bytes)"),
    "a tower of images and videos": (
        "model_config",
        "multimodal_config",
        MultiModalConfig(limit_per_prompt={"image": 0}),
        "--language-model-only",
    ),
    "towers": ("model_config", "multimodal_config", MultiModalConfig(), "--language-model-only"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_not_guessed(qwen3_moe_int4: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, setting, value, reason = UNKNOWN[case]
    config = config_of(qwen3_moe_int4)
    start_worker(config)
    if setting == "is_hybrid":
        monkeypatch.setattr(type(config.model_config), setting, value)
    else:
        object.__setattr__(getattr(config, part), setting, value)
    with pytest.raises(ExpertCacheError) as caught:
        settle_cache_size(config, AUTO, Device(GIB, GIB, GIB))
    message = str(caught.value)
    assert message.startswith("--moe-expert-cache-size auto: ")
    assert reason in message
    assert message.endswith("; give a number")


def test_drafts_with_weights_of_their_own_are_not_guessed(qwen3_moe_bf16: Path) -> None:
    drafting = {"num_speculative_tokens": 2}
    with_text = config_of(qwen3_moe_bf16, speculative_config={**drafting, "method": "ngram", "prompt_lookup_max": 3})
    assert device_estimate(with_text, AUTO, GIB) == device_estimate(config_of(qwen3_moe_bf16), AUTO, GIB)
    draft = {**drafting, "method": "draft_model", "model": str(qwen3_moe_bf16)}
    message = refusal(config_of(qwen3_moe_bf16, speculative_config=draft), GIB)
    assert message.startswith(
        "--moe-expert-cache-size auto: what the draft of speculative decoding (draft_model) takes"
    )


TWO_RANKS = """
import sys
from vllm.distributed.parallel_state import destroy_distributed_environment, init_distributed_environment
from vllm_hlwq.auto_size import least_of_ranks
rank = int(sys.argv[1])
init_distributed_environment(2, rank, sys.argv[2], rank, "gloo")
print(least_of_ranks((9, 4)[rank]), least_of_ranks((3, 0)[rank]), flush=True)
# As vLLM's workers do: a process that ends with Gloo's threads still running may be aborted by the C++ runtime.
destroy_distributed_environment()
"""


def test_all_ranks_take_the_least(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), f"file://{tmp_path}/rendezvous"],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0].strip().splitlines()[-1:] for rank in ranks]
    assert outputs == [["4 0"], ["4 0"]]
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_a_rank_with_room_stops_with_one_that_has_none(qwen3_moe_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_size, "least_of_ranks", lambda slots: 0)
    assert refusal(config_of(qwen3_moe_int4), GIB).endswith("no number fits the GPU of another worker, which says why")


def test_a_rank_takes_what_another_has_room_for(
    qwen3_moe_int4: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setattr(auto_size, "least_of_ranks", lambda slots: 5)
    assert settle(config_of(qwen3_moe_int4), 2 * GIB) == 5
    assert "auto is 5, for which the GPU with the least room has room: " in log[0]
