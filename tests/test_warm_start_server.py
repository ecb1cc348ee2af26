"""Real servers that save their slots and experts: however they end, the next one starts from what they left."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from vllm_hlwq.bench.server import Server

pytestmark = pytest.mark.server

SLOTS = 5
LAYERS = 3
LIMITS = ("--max-model-len", "512", "--max-num-seqs", "4", "--served-model-name", "tiny", "--enforce-eager")


def serve(model: Path, folder: Path, *arguments: str) -> Server:
    files = ("--moe-expert-profile", str(folder / "profile.json"), "--moe-expert-store-cache", str(folder / "store"))
    return Server(model, "--moe-expert-cache-size", str(SLOTS), *files, *LIMITS, *arguments)


def complete(server: Server, prompt: list[int]) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    tokens: list[int] = server.post("/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]
    return tokens


def layers(path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(path.read_text())["layers"]
    return found


def test_a_server_starts_where_the_one_before_ended(tiny_int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with serve(tiny_int4, tmp_path, "--shutdown-timeout", "25") as server:
        tokens = complete(server, [2, 100])
        assert f"Expert profile: {path} is not there yet" in server.log
        assert f"Expert store cache: 0 of {LAYERS} layers read" in server.log
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
    saved = layers(path)
    assert all(len(experts) >= SLOTS for experts in saved.values())
    assert len(saved) == LAYERS
    with serve(tiny_int4, tmp_path) as server:
        assert f"Expert profile: {LAYERS * SLOTS} of {LAYERS * SLOTS} slots in 3 of 3 layers filled" in server.log
        assert f"Expert store cache: {LAYERS} of {LAYERS} layers read" in server.log
        counters = server.expert_cache_counters()
        assert not any(counters.values())
        usage = [
            value for (name, _), value in server.metrics().items() if name.endswith("usage_perc") and "moe" in name
        ]
        assert usage == [1.0]
        assert complete(server, [2, 100]) == tokens
        counters = server.expert_cache_counters()
        assert counters["admitted"] == counters["evictions"] > 0

        # Killed without notice: the file is whole, and the next server takes it.
        server.post("/collective_rpc", {"method": "save_expert_profile"})
        saved = layers(path)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
    assert layers(path) == saved
    time.sleep(1)  # what was killed lets go of its lock on temporary files
    with serve(tiny_int4, tmp_path) as server:
        assert complete(server, [2, 100]) == tokens
    assert set(layers(path)) == set(saved), "stopped in the middle of whatever it did, it has left a whole file"
