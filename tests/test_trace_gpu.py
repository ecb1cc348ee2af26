"""Recording on a CUDA device: in captured graphs, without waiting, and with the counters of the device's planner."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel
from traces import header

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.routing_log import RoutingLog
from vllm_hlwq.routing_ring import RoutingRing
from vllm_hlwq.simulate import COMPARED, replay
from vllm_hlwq.trace import Trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

HEADER = header([(128, 8), (1023, 8)])


def random_ids(layer: int, tokens: int) -> torch.Tensor:
    return torch.randint(-1, HEADER.layers[layer].experts, (tokens, 8), dtype=torch.int32, device="cuda")


def test_a_captured_step_is_recorded_at_every_replay() -> None:
    ring, log = RoutingRing(HEADER.layers, 64, "cuda"), RoutingLog(HEADER.layers)
    inputs = [random_ids(layer, 5) for layer in (0, 1)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for layer, ids in enumerate(inputs):
            ring.append(layer, ids)
    ring.reset()
    wanted: list[list[torch.Tensor]] = [[], []]
    for number in range(500):
        for layer, ids in enumerate(inputs):
            ids.copy_(random_ids(layer, 5))
            wanted[layer].append(ids.cpu().long())
        graph.replay()
        if number % 7 == 0:
            ids = random_ids(1, 2000 + number)  # a prompt outside of the graph, of several blocks of the kernel
            ring.append(1, ids)
            wanted[1].append(ids.cpu().long())
        chunk = ring.poll()
        assert chunk is None or log.add(chunk)
    for chunk in ring.drain():
        assert log.add(chunk)
    trace = log.trace(HEADER)
    for layer in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(trace.steps_of(layer), wanted[layer], strict=True))


def test_nobody_waits_for_the_device() -> None:
    ring = RoutingRing(HEADER.layers, 64, "cuda")
    torch.cuda.synchronize()
    assert ring.poll() is not None
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    ring.append(0, random_ids(0, 3))
    assert ring.poll() is not None  # asked for before the device got busy
    assert ring.poll() is None
    assert not torch.cuda.current_stream().query()
    assert sum(len(chunk.entries) for chunk in ring.drain()) == 1


@pytest.mark.parametrize("cache_size", [2, TOP_K, NUM_EXPERTS // 2, NUM_EXPERTS])
def test_a_replay_counts_what_the_device_counted(cache_size: int, tmp_path: Path) -> None:
    source = checkpoints.write(checkpoints.qwen3_moe_config(), tmp_path / "bf16")
    export_int4(source, tmp_path / "int4", group_size=128)
    path = tmp_path / "trace"
    loaded = LoadedModel(
        tmp_path / "int4", cache_size, trace=path, gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28
    )
    recorder = loaded.worker.trace_recorder
    recorder.start()
    generator = torch.Generator().manual_seed(0)
    for tokens in (300, 1, 1, 8, 40, 1, 300, 2, 8, 1):
        padding = torch.arange(tokens, device="cuda") >= 5 if tokens in (8, 40) else None
        hidden = torch.randn(tokens, 128, generator=generator).bfloat16().cuda()
        with loaded.forward_pass(tokens, padding):
            for runner in loaded.runners:
                runner.forward(hidden.clone(), 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator).cuda())
        recorder.poll()
    live = loaded.worker.expert_cache_counters()
    recorder.close()
    trace = Trace.load(path)
    assert (trace.header.state, trace.num_steps, trace.header.backend) == ("ended", 10, "marlin")
    for layer in range(2):
        padded = [ids for ids in trace.steps_of(layer) if len(ids) in (8, 40)]
        assert all((ids[5:] == -1).all() and (ids[:5] >= 0).all() for ids in padded)
    if cache_size == NUM_EXPERTS:
        return
    (replayed,) = replay(trace, [cache_size])
    assert replayed.differences == []
    for layer in replayed.layers:
        assert layer.counters == {name: live[layer.name][name] for name in COMPARED}
        assert layer.counters["queries"] > layer.counters["hits"] > 0
