"""Stock ``vllm serve`` over HTTP with the trained model: tokens, streams, perplexity, start-up line."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from corpus import documents
from openai import OpenAI
from served_tokens import EXACT, NEW_TOKENS, SHIPPED, assert_chosen_by, gaps_to_first_choice, greedy_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server
from vllm_hlwq.bench.teacher_forcing import prompt_logprobs

pytestmark = pytest.mark.server

EXPERTS = 16
RECORD_BYTES = 3 * 256 * 192 // 2 + 3 * 256 * 192 // 64 * 2  # three matrices: packed codes and BF16 scales
COMMON = ("--max-model-len", "1024", "--max-num-seqs", "8", "--served-model-name", "tiny")
EAGER = (*COMMON, "--enforce-eager")


@pytest.fixture(scope="module")
def cached(tiny_int4: Path) -> Iterator[Server]:
    with Server(tiny_int4, "--moe-expert-cache-size", "4", *EAGER) as server:
        yield server


@pytest.fixture(scope="module")
def greedy(cached: Server) -> list[list[int]]:
    return greedy_tokens(cached)


def test_the_coded_checkpoint_itself_serves_the_tokens_of_its_sibling(greedy: list[list[int]]) -> None:
    with Server(SHIPPED, "--moe-expert-cache-size", "4", *EAGER) as server:
        assert greedy_tokens(server) == greedy


def test_the_log_states_layers_slots_and_bytes(cached: Server) -> None:
    line = re.search(r"Expert cache: .*", cached.log)
    assert line is not None
    assert f"3 layers, 4 of 16 experts resident, {RECORD_BYTES} bytes a slot" in line[0]
    assert f"{3 * EXPERTS * RECORD_BYTES} bytes of experts in host memory" in line[0]


def test_a_request_is_counted_and_warm_up_is_not(cached: Server, greedy: list[list[int]]) -> None:
    before = cached.expert_cache_counters()
    body = {"model": "tiny", "prompt": [2, 100], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    cached.post("/v1/completions", body)
    after = cached.expert_cache_counters()
    assert after["steps"] - before["steps"] == 3 * 5
    moved = after["queries"] - before["queries"] - (after["hits"] - before["hits"])
    assert after["h2d_bytes"] - before["h2d_bytes"] == moved * (
        after["h2d_bytes"] // (after["admitted"] + after["staged"])
    )


@pytest.mark.parametrize("cache_size", [1, EXPERTS])
def test_greedy_tokens_are_the_same_at_every_cache_size(
    tiny_int4: Path, cache_size: int, greedy: list[list[int]]
) -> None:
    assert len({token for tokens in greedy for token in tokens}) > 50  # a model stuck on one token proves nothing
    with Server(tiny_int4, "--moe-expert-cache-size", str(cache_size), *EAGER) as server:
        assert greedy_tokens(server) == greedy


def test_tokens_in_16_bit_agree_with_stock_vllm(
    cached: Server, tiny_int4_decoded: Path, tiny_int4_float32: Path, greedy: list[list[int]]
) -> None:
    # No bound for a single token: where a router's choice is tied, rounding alone moves one by up to half a nat.
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    sequences = [[*tokenizer.encode(prompt), *said] for prompt, said in zip(PROMPTS, greedy, strict=True)]
    with Server(tiny_int4_decoded, *EAGER) as stock:
        assert "Expert cache" not in stock.log
        assert not any("moe_expert" in name for name, _ in stock.metrics())
        found = gaps_to_first_choice(stock, greedy)
        ours, theirs = ([log_probabilities(server, ids) for ids in sequences] for server in (cached, stock))
    assert found.count(0) / len(found) >= 0.99
    # The cache adds nothing to the rounding that stock vLLM has too, both against the same model in float32.
    model = AutoModelForCausalLM.from_pretrained(tiny_int4_float32, dtype=torch.float32)
    errors = torch.zeros(2)
    for ids, *rounded in zip(sequences, ours, theirs, strict=True):
        with torch.no_grad():
            exact = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        errors += torch.stack([(torch.tensor(each) - exact[:, 0]).abs().sum() for each in rounded])
    assert errors[0] < 1.2 * errors[1]


def log_probabilities(server: Server, ids: list[int]) -> list[float]:
    """Of each of ``ids`` after the first."""
    return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], prompt_logprobs(server, ids), strict=True)]


@pytest.fixture(scope="module")
def exact(tiny_int4: Path) -> Iterator[Server]:
    with Server(tiny_int4, "--moe-expert-cache-size", "4", *EAGER, *EXACT) as server:
        yield server


def test_tokens_and_log_probabilities_in_float32_are_those_of_stock_vllm(
    exact: Server, tiny_int4_float32: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    with Server(tiny_int4_float32, *EAGER, *EXACT) as stock:
        tokens = greedy_tokens(stock)
        assert greedy_tokens(exact) == tokens
        for prompt, said in zip(PROMPTS, tokens, strict=True):
            ours, theirs = (prompt_logprobs(server, [*tokenizer.encode(prompt), *said]) for server in (exact, stock))
            for position, expected in zip(ours, theirs, strict=True):
                assert {token: entry["logprob"] for token, entry in position.items()} == pytest.approx(
                    {token: entry["logprob"] for token, entry in expected.items()}, abs=1e-4
                )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler, g++ is not there")
def test_the_compiled_server_agrees_with_compiled_stock_vllm(tiny_int4: Path, tiny_int4_float32: Path) -> None:
    with Server(tiny_int4, "--moe-expert-cache-size", "4", *COMMON, *EXACT) as server:
        tokens = greedy_tokens(server)
        assert server.expert_cache_counters()["hits"] > 0
    with Server(tiny_int4_float32, *COMMON, *EXACT) as stock:
        assert_chosen_by(stock, tokens)


@pytest.mark.parametrize("name", ["cached", "exact"])
def test_eight_streams_at_once_say_what_they_say_alone(name: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(name)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def stream(prompt: str) -> tuple[list[int], str]:
        tokens, reason = [], ""
        for chunk in client.completions.create(
            model="tiny", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ):  # fmt: skip
            tokens += chunk.choices[0].token_ids or []
            reason = chunk.choices[0].finish_reason or reason
        return tokens, reason

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        results = list(pool.map(stream, PROMPTS))
    assert [reason for _, reason in results] == ["length"] * len(PROMPTS)
    sequences = [tokens for tokens, _ in results]
    assert [len(tokens) for tokens in sequences] == [NEW_TOKENS] * len(PROMPTS)
    if name == "exact":
        assert_chosen_by(server, sequences)
    else:  # batches change the rounding of vLLM's dense layers
        found = gaps_to_first_choice(server, sequences)
        assert found.count(0) / len(found) >= 0.97


def test_held_out_perplexity_equals_transformers(cached: Server, tiny_int4_decoded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(tiny_int4_decoded, dtype=torch.bfloat16)
    windows = []
    for name, text in documents("held-out"):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) >= 256:
            windows.append((name, ids[:256]))
    windows = windows[::3]
    assert len(windows) >= 10
    ours = theirs = 0.0
    for _, ids in windows:
        entries = prompt_logprobs(cached, ids)
        ours -= sum(entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        theirs += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    count = len(windows) * 255
    perplexities = math.exp(ours / count), math.exp(theirs / count)
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
    assert perplexities[1] < 35
