"""The whole engine on a CUDA device: captured graphs, both model runners, every cache size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

PROMPTS = [
    "The import statement",
    "class Queue:\n    def __init__(self",
    "Raised when an operation",
    '"""Utilities for',
]


class Engine:
    """One engine's greedy continuations, its log probabilities of given ones, and its counters."""

    def __init__(self, model: Path, cache_size: int, **arguments: Any) -> None:
        options = {"moe_expert_cache_size": cache_size}
        self.llm = LLM(
            str(model), additional_config=options, max_model_len=512, max_num_seqs=16, gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=2**28, attention_backend="TRITON_ATTN", enable_prefix_caching=False, **arguments,
        )  # fmt: skip

    def greedy(self) -> list[list[int]]:
        """Continuation of each prompt, one request at a time."""
        sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        return [list(self.llm.generate([p], sampling, use_tqdm=False)[0].outputs[0].token_ids) for p in PROMPTS]

    def together(self) -> list[list[int]]:
        """Continuation of each prompt, four times over, all at once."""
        sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        return [list(r.outputs[0].token_ids) for r in self.llm.generate(PROMPTS * 4, sampling, use_tqdm=False)]

    def gaps(self, prompts: list[str], sequences: list[list[int]]) -> list[float]:
        """How many nats each token of the sequences lies below the engine's first choice."""
        tokenizer = self.llm.get_tokenizer()
        found = []
        for prompt, tokens in zip(prompts, sequences, strict=True):
            ids = tokenizer.encode(prompt) + tokens
            sampling = SamplingParams(max_tokens=1, prompt_logprobs=1)
            entries = self.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].prompt_logprobs
            for token, entry in zip(tokens, entries[-len(tokens) :], strict=True):
                found.append(max(e.logprob for e in entry.values()) - entry[token].logprob)
        return found

    def counters(self) -> dict[str, int]:
        layers = list(self.llm.collective_rpc("expert_cache_counters")[0].values())
        return {name: sum(layer[name] for layer in layers) for name in layers[0]}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")  # FlashInfer need not be installed
    # vLLM's V1 model runner forbids captures in this process when it has made its own; its V2 never allows them again.
    monkeypatch.setattr("vllm.compilation.monitor.cudagraph_capturing_enabled", True)
    return monkeypatch


def share_chosen(gaps: list[float]) -> float:
    """How many tokens are the first choice."""
    return sum(gap == 0 for gap in gaps) / len(gaps)


GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
MODES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # vLLM's default takes long to start, so that a single cache size stands for it.
    "compiled": ({}, (4,)),
    "graphs": (GRAPHS, (4, 16)),
    "graphs-extremes": (GRAPHS, (1, 15)),
    "float16": (GRAPHS | {"dtype": "float16"}, (4, 16)),
    "eager": ({"enforce_eager": True}, (4, 16)),
    "eager-extremes": ({"enforce_eager": True}, (1, 15)),
}


@pytest.mark.parametrize("runner", ["v2", "v1"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_stock_marlin(
    tiny_int4: Path, in_process: pytest.MonkeyPatch, runner: str, mode: str
) -> None:
    in_process.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "v2")))
    arguments, cache_sizes = MODES[mode]
    stock = Engine(tiny_int4, 0, moe_backend="marlin", **arguments)
    wanted = stock.greedy()
    assert len({token for tokens in wanted for token in tokens}) > 30
    # Decoded one by one and read at once, stock itself comes to other logits: no more is asked of the cache.
    control = stock.gaps(PROMPTS, wanted) + stock.gaps(PROMPTS * 4, stock.together())
    assert share_chosen(control) > 0.9
    for cache_size in cache_sizes:
        engine = Engine(tiny_int4, cache_size, **arguments)
        before = engine.counters()
        assert not any(before.values()), "warm-up left a trace"
        alone, together = engine.greedy(), engine.together()
        counters = engine.counters()
        for prompts, sequences in ((PROMPTS, alone), (PROMPTS * 4, together)):
            gaps = stock.gaps(prompts, sequences)
            assert max(gaps) <= max(0.1, 2 * max(control)), f"{sorted(gaps)[-9:]}, stock: {sorted(control)[-9:]}"
            assert share_chosen(gaps) >= share_chosen(control) - 0.02
        if cache_size == 16:
            assert alone == wanted
            assert not any(counters.values())
        else:
            # 3 layers; one prefill and 39 decodes a prompt alone, and as many again at most together.
            assert 3 * 4 * 40 < counters["steps"] <= 3 * 4 * 40 + 3 * (4 + 40)
            assert counters["queries"] == counters["hits"] + counters["admitted"] + counters["staged"]
            assert counters["hits"] > 0
        del engine


@pytest.mark.parametrize(
    ("dtype", "enforce_eager"), [("bfloat16", False), ("bfloat16", True), ("float16", False)]
)  # fmt: skip
def test_16_bit_tokens_are_those_of_stock_triton(
    tiny_bf16: Path, in_process: pytest.MonkeyPatch, dtype: str, enforce_eager: bool
) -> None:
    stock = Engine(tiny_bf16, 0, moe_backend="triton", dtype=dtype, enforce_eager=enforce_eager)
    wanted = stock.greedy()
    assert len({token for tokens in wanted for token in tokens}) > 30
    del stock
    for cache_size in (4, 1, 16):
        engine = Engine(tiny_bf16, cache_size, dtype=dtype, enforce_eager=enforce_eager)
        assert not any(engine.counters().values()), "warm-up left a trace"
        # The kernel's bits do not depend on slots and waves, so every token is the same.
        assert engine.greedy() == wanted, f"{cache_size} slots"
        assert (engine.counters()["hits"] > 0) == (cache_size < 16)
        del engine
