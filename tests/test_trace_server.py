"""A trace of a real server, compiled: complete after an orderly shutdown, and its replay counts what the server did."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_hlwq.bench.server import Server
from vllm_hlwq.simulate import COMPARED, replay
from vllm_hlwq.trace import Trace

SLOTS = 5


@pytest.mark.server
def test_the_trace_of_a_server_replays_to_its_counters(tiny_int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    arguments = ("--moe-expert-cache-size", str(SLOTS), "--moe-expert-trace", str(path), "--shutdown-timeout", "25")

    def complete(prompt: list[int]) -> None:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        server.post("/v1/completions", body)

    limits = ("--max-model-len", "512", "--max-num-seqs", "4", "--served-model-name", "tiny")
    with Server(tiny_int4, *arguments, *limits) as server:
        complete([2, 100])
        complete(list(range(2, 302)))  # a prompt that streams
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(complete, [2, 200 + number, 17]) for number in range(4)]:
                done.result()
        live = server.post("/collective_rpc", {"method": "expert_cache_counters"})["results"][0]
        (saved,) = server.post("/collective_rpc", {"method": "save_expert_trace"})["results"]
        assert saved == str(path)
        assert Trace.load(path).header.counters == live
        log = server.log
    trace = Trace.load(path)
    assert (trace.header.state, trace.header.counters) == ("ended", live)
    assert trace.tokens.max() >= 300
    assert f"Expert trace: recording 3 layers to {path}" in log
    (replayed,) = replay(trace, [SLOTS])
    assert {layer.name: layer.counters for layer in replayed.layers} == {
        name: {key: counts[key] for key in COMPARED} for name, counts in live.items()
    }
    assert replayed.differences == []
