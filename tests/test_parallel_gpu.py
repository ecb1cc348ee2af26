"""Several GPUs say what one says: tensor, expert and pipeline parallel by real servers, with the cache and graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served_tokens import NEW_TOKENS, SHIPPED, gaps_to_first_choice, greedy_tokens

from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server
from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 CUDA devices, this machine has {torch.cuda.device_count()}"
    ),
]

COMMON = (
    "--served-model-name", "tiny", "--max-model-len", "1024", "--max-num-seqs", "8",
    "--attention-backend", "TRITON_ATTN", "--gpu-memory-utilization", "0.1",
    "--kv-cache-memory-bytes", str(2**28), "--compilation-config",
    json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}),
)  # fmt: skip
STOCK = (*COMMON, "--moe-backend", "marlin")
CACHED = (*COMMON, "--moe-expert-cache-size", "4")
TENSOR = ("--tensor-parallel-size", "2")
LAYERS, EXPERTS, TOP_K = 3, 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT4 in groups that divide half of an expert's 192 rows."""
    out = tmp_path_factory.mktemp("parallel") / "int4"
    export_int4(open_source(SHIPPED), out, group_size=32)
    return out


@pytest.fixture(scope="module")
def judge(model: Path) -> Iterator[Server]:
    """Stock vLLM on one GPU with all experts resident."""
    with Server(model, *STOCK) as server:
        yield server


@pytest.fixture(scope="module")
def control(model: Path, judge: Server) -> list[float]:
    """How far stock's own tokens are below its first choice on one GPU: decoded there, and by two GPUs."""
    found = gaps_to_first_choice(judge, greedy_tokens(judge))
    with Server(model, *STOCK, *TENSOR) as stock:
        return found + gaps_to_first_choice(judge, greedy_tokens(stock))


def share_chosen(gaps: list[float]) -> float:
    return sum(gap == 0 for gap in gaps) / len(gaps)


def counters(server: Server) -> list[dict[str, dict[str, int]]]:
    """Of every rank, by layer; the slots of all of them have been held against their host's bytes."""
    ranks: list[dict[str, Any]] = server.post("/collective_rpc", {"method": "expert_cache_counters"})["results"]
    assert server.post("/collective_rpc", {"method": "expert_cache_faults"})["results"] == [[]] * len(ranks)
    assert len(ranks) == 2
    for layers in ranks:
        for name, counts in layers.items():
            misses = counts["admitted"] + counts["staged"]
            assert counts["queries"] == counts["hits"] + misses, name
            assert min(counts["hits"], misses) > 0, name
    return ranks


@pytest.mark.parametrize(
    "ways",
    [TENSOR, (*TENSOR, "--enable-expert-parallel"), ("--pipeline-parallel-size", "2")],
    ids=["tensor", "expert", "pipeline"],
)
def test_tokens_are_those_of_one_gpu(model: Path, judge: Server, control: list[float], ways: tuple[str, ...]) -> None:
    with Server(model, *CACHED, *ways) as server:
        tokens = greedy_tokens(server)
        ranks = counters(server)
    gaps = gaps_to_first_choice(judge, tokens)
    assert len(gaps) == len(PROMPTS) * NEW_TOKENS
    assert max(gaps) <= max(0.1, 2 * max(control)), f"{sorted(gaps)[-9:]}, stock: {sorted(control)[-9:]}"
    assert share_chosen(gaps) >= share_chosen(control) - 0.02
    asked = [sum(counts["queries"] for counts in layers.values()) for layers in ranks]
    if "--enable-expert-parallel" in ways:
        # Each expert belongs to one rank: together they are asked what one cache would be for every decoded token.
        decoded = LAYERS * TOP_K * len(PROMPTS) * (NEW_TOKENS - 1)
        assert decoded <= sum(asked) <= decoded + LAYERS * EXPERTS * len(PROMPTS)
    elif ways == TENSOR:
        assert ranks[0] == ranks[1]  # the same plan on both, to the last counter
    else:
        assert len(ranks[0]) + len(ranks[1]) == LAYERS
        assert not ranks[0].keys() & ranks[1].keys()
