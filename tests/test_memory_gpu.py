"""Memory on a real GPU: banks are as large as was foreseen, and what cannot fit is refused before weights are read."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import TOP_K
from engines import LoadedModel, engine_config, start_worker

from vllm_hlwq.bank_sizes import ExpertShape
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.device_loading import conversion_bytes, load_cache, taken_bytes
from vllm_hlwq.engine_sizes import device_demand
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.marlin_moe import MarlinBackend
from vllm_hlwq.options import ExpertCacheOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma4-g64": (checkpoints.gemma4_config, {"group_size": 64}),
    "gemma4-g32-asymmetric": (checkpoints.gemma4_config, {"group_size": 32, "symmetric": False}),
    "gemma4-padded": (lambda: checkpoints.gemma4_config(moe_intermediate_size=96), {"group_size": 32}),
    "qwen3_moe-channel": (checkpoints.qwen3_moe_config, {"group_size": None}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("memory")
    for name, (config, export) in FORMATS.items():
        export_int4(checkpoints.write(config(), root / f"{name}-bf16"), root / name, **export)
    return {name: root / name for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("staging_size", [None, 3])
def test_banks_are_as_large_as_foreseen(exports: dict[str, Path], name: str, staging_size: int | None) -> None:
    loaded = LoadedModel(
        exports[name], 5, staging_size=staging_size, gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28
    )
    options = ExpertCacheOptions(cache_size=5, staging_size=staging_size)
    demand = device_demand(loaded.config, options, torch.cuda.mem_get_info()[1])
    sizes = loaded.worker.expert_cache_sizes()
    assert demand.banks.records == (sizes["record_bytes"],) * 2
    assert demand.banks.slot_bytes(5) == sizes["slot_bytes"]
    assert demand.banks.staging_bytes(5) == sizes["staging_bytes"]
    backend = loaded.runners[0].routed_experts._backend
    step = loaded.config.scheduler_config.max_num_batched_tokens
    shapes = backend.workspace_shapes(step, backend.moe_config.hidden_dim, TOP_K)
    assert demand.workspace == sum(math.prod(shape) for shape in shapes) * 2
    # Of a checkpoint's tensors a model holds some as buffers, which its state has too.
    weights = {w.data_ptr(): w.nbytes for w in loaded.worker.get_model().state_dict().values() if w.is_cuda}
    assert demand.dense <= sum(weights.values()) <= 1.1 * demand.dense


def test_a_real_worker_refuses_before_weights_are_read(exports: dict[str, Path]) -> None:
    model, options = exports["gemma4-g64"], ExpertCacheOptions(cache_size=12, staging_size=1)
    total = torch.cuda.mem_get_info()[1]
    demand = device_demand(engine_config(model, 12, staging_size=1), options, total)
    share = {"gpu_memory_utilization": (demand.bytes(10) + 1000) / total, "staging_size": 1}
    config = engine_config(model, 12, **share)
    worker = start_worker(config)
    before = torch.cuda.memory_allocated()
    with pytest.raises(ExpertCacheError) as caught:
        worker.load_model()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--moe-expert-cache-size 12: {demand.dense} bytes of weights outside the experts, ")
    assert f"grants {worker.requested_memory}; " in message
    assert message.endswith("the largest number that can fit is 10")
    assert torch.cuda.memory_allocated() == before
    assert config.compilation_config.static_forward_context == {}
    # What is proposed is accepted, and loads.
    assert LoadedModel(model, 10, **share).worker.expert_cache_sizes()["slots"] == 10


# Banks larger than the GPU, of experts in host memory that is mapped but never written: nothing is taken of the GPU.

WIDTH, HIDDEN, GROUP = 2**15, 128, 64
RECORD = ExpertShape(HIDDEN, WIDTH, GROUP).record_bytes
LAYERS = 3


@pytest.fixture(scope="module")
def backend(exports: dict[str, Path]) -> MarlinBackend:
    """Of experts wide enough that a few thousand exceed a GPU."""
    loaded = LoadedModel(exports["gemma4-g64"], 4, gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28)
    ours = loaded.runners[0].routed_experts._backend
    moe_config = copy.copy(ours.moe_config)
    moe_config.intermediate_size_per_partition = WIDTH
    return MarlinBackend(ours.expert_format, moe_config)


def raw_store(experts: int) -> HostStore:
    fields = {
        "w13_weight_packed": ((2 * WIDTH, HIDDEN // 8), torch.int32),
        "w2_weight_packed": ((HIDDEN, WIDTH // 8), torch.int32),
        "w13_weight_scale": ((2 * WIDTH, HIDDEN // GROUP), torch.bfloat16),
        "w2_weight_scale": ((HIDDEN, WIDTH // GROUP), torch.bfloat16),
    }
    return HostStore(experts, RecordLayout(fields))


@pytest.fixture(scope="module")
def huge() -> HostStore:
    """More experts than the GPU holds of their gate and up weights, which are the first field that a bank makes."""
    w13 = 2 * WIDTH * HIDDEN // 2
    try:
        return raw_store(torch.cuda.mem_get_info()[1] * 11 // 10 // w13)
    except ExpertCacheError as error:
        pytest.skip(f"this machine does not map so much memory: {error}")


def refusal(
    huge: HostStore, backend: MarlinBackend, slots: int, staging: int | None, others: list[Any]
) -> tuple[str, int]:
    """The message of a layer that does not fit, and the bytes that it calls free."""
    device, before = torch.device("cuda"), torch.cuda.memory_allocated()
    with pytest.raises(ExpertCacheError) as caught:
        load_cache(huge, backend, slots, LAYERS, TOP_K, 8, staging, others, device)
    message = str(caught.value)
    assert "\n" not in message
    assert torch.cuda.memory_allocated() == before
    found = re.search(r"where (\d+) bytes are free", message)
    assert found is not None
    available = int(found[1])
    assert available <= torch.cuda.mem_get_info()[1] + taken_bytes(others)
    return message, available


def test_slots_that_do_not_fit(huge: HostStore, backend: MarlinBackend) -> None:
    slots = huge.num_experts - 1
    message, available = refusal(huge, backend, slots, 1, [])
    assert message.startswith(
        f"--moe-expert-cache-size {slots}: {slots * LAYERS * RECORD} bytes of {slots} slots in each of 3 layers, "
        f"{2 * RECORD} of staging and about {conversion_bytes(huge)} to convert a layer do not fit the device"
    )
    most = (available - conversion_bytes(huge) - 2 * RECORD) // (LAYERS * RECORD)
    assert message.endswith(f"the largest number that fits, before the KV cache, is {most}")


def test_all_experts_that_do_not_fit(huge: HostStore, backend: MarlinBackend) -> None:
    message, _ = refusal(huge, backend, huge.num_experts, None, [])
    assert (
        f"{huge.num_experts * LAYERS * RECORD} bytes of {huge.num_experts} slots in each of 3 layers, 0 of" in message
    )


def test_staging_that_does_not_fit(huge: HostStore, backend: MarlinBackend) -> None:
    message, _ = refusal(huge, backend, 1, huge.num_experts - 1, [])
    assert (
        f"{LAYERS * RECORD} bytes of 1 slots in each of 3 layers, {2 * (huge.num_experts - 1) * RECORD} of" in message
    )
    assert message.endswith("not even 1 fits: lower --moe-expert-staging-size or take a GPU with more memory")


def test_banks_of_other_layers_count_as_room(huge: HostStore, backend: MarlinBackend) -> None:
    device = torch.device("cuda")
    first = load_cache(raw_store(6), backend, 2, LAYERS, TOP_K, 8, 3, [], device)
    second = load_cache(raw_store(6), backend, 2, LAYERS, TOP_K, 8, 3, [first], device)
    assert second.staging_bank is first.staging_bank
    assert taken_bytes([first, second]) == (2 * 2 + 2 * 3) * RECORD
    slots = huge.num_experts - 1
    message, available = refusal(huge, backend, slots, 1, [first, second])
    assert f"{slots * LAYERS * RECORD} bytes of {slots} slots in each of 3 layers" in message
    most = (available - conversion_bytes(huge) - 2 * RECORD) // (LAYERS * RECORD)
    assert message.endswith(f"is {most}")
