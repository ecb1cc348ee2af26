"""Counters on CUDA are read while steps run: no step waits for the reading, and the reading waits for no step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import checkpoints
import pytest
import torch
from checkpoints import NUM_EXPERTS
from engines import LoadedModel

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.counter_block import CounterBlock
from vllm_hlwq.expert_cache import COUNTERS
from vllm_hlwq.plan_kernel import DeviceSlotTable, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

CYCLES_OF_A_SECOND = 2_000_000_000  # at about 2 GHz


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("metrics")
    export_int4(checkpoints.write(checkpoints.qwen3_moe_config(), folder / "bf16"), folder / "int4", group_size=128)
    return LoadedModel(folder / "int4", 4, gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Torch raises where this process would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and router logits of a step, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 128, generator=generator).bfloat16()
    return hidden.cuda(), 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator).cuda()


def counts(model: LoadedModel) -> list[list[int]]:
    """Counters by the way that waits for the device, without ``h2d_bytes``."""
    return [list(layer.values())[:-1] for layer in model.worker.expert_cache_counters().values()]


def test_a_reading_waits_for_no_step(cached: LoadedModel, request: pytest.FixtureRequest) -> None:
    cached.run(0, *step(3, 0))
    expected = counts(cached)
    assert any(expected[0])
    reader = cached.worker._counter_block.reader()
    request.getfixturevalue("no_synchronisation")
    torch.cuda._sleep(CYCLES_OF_A_SECOND)
    assert reader.read() == expected
    assert not torch.cuda.current_stream().query(), "the device had finished its work before the reading came"


def test_readings_while_steps_run_never_fall_and_end_exact(cached: LoadedModel) -> None:
    steps = [step(tokens, seed) for seed, tokens in enumerate((1, 3, 9, 1, 40, 2) * 20)]
    reader, done, readings = cached.worker._counter_block.reader(), threading.Event(), []

    def follow() -> None:
        while not done.is_set():
            readings.append(reader.read())

    thread = threading.Thread(target=follow)
    thread.start()
    for inputs in steps:
        for layer in range(len(cached.runners)):
            cached.run(layer, *inputs)
    torch.cuda.synchronize()
    done.set()
    thread.join()
    readings.append(reader.read())
    assert len({str(reading) for reading in readings}) > 3, "nothing was read while steps ran"
    for earlier, later in pairwise(readings):
        assert (torch.tensor(later) >= torch.tensor(earlier)).all()
    assert readings[-1] == counts(cached)


def test_a_captured_step_counts_in_the_block() -> None:
    tables = [DeviceSlotTable(16, 4, 4, max_tokens=8, top_k=2, device="cuda") for _ in range(2)]
    block = CounterBlock(tables)
    ids = torch.tensor([[3, 5], [5, 9]], device="cuda")
    for table in tables:
        plan(table, ids)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(tables[1], ids)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    first, second = (dict(zip(COUNTERS, row, strict=True)) for row in block.reader().read())
    assert (first["steps"], first["queries"], first["hits"]) == (1, 3, 0)
    assert (second["steps"], second["queries"], second["hits"]) == (4, 12, 9)
