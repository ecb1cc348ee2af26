"""vLLM's features with the expert cache, each beside stock vLLM with the same feature: tokens, and counters in order.

A row of ``docs/composition.md`` names each test. Stock vLLM serves the INT4 checkpoint's values decoded, which
processors without AMX can compute; all servers compute in float32, so that each token has to be the other server's
choice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from corpus import documents
from served_tokens import EXACT, SHIPPED, assert_chosen_by, completion, greedy_tokens
from transformers import AutoTokenizer

from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server
from vllm_hlwq.bench.teacher_forcing import NEAR_TIE, gaps, prompt_logprobs
from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

COMPILED = ("--max-model-len", "1024", "--max-num-seqs", "8", "--served-model-name", "tiny", *EXACT)
EAGER = (*COMPILED, "--enforce-eager")
CACHE = ("--moe-expert-cache-size", "4")
LAYERS = 3
TWO_RANKS = {"VLLM_CPU_SIM_MULTI_NUMA": "1"}  # vLLM's own leave to split a CPU without NUMA nodes


@contextmanager
def serving(model: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with Server(model, *arguments) as server:
            yield server


def assert_in_order(server: Server, ranks: int = 1) -> list[dict[str, dict[str, int]]]:
    """Every layer of every rank was asked, hit and missed, and its cache is in order; returns the counters."""
    found: list[dict[str, dict[str, int]]] = server.post("/collective_rpc", {"method": "expert_cache_counters"})[
        "results"
    ]
    assert len(found) == ranks
    for layers in found:
        for name, counts in layers.items():
            misses = counts["admitted"] + counts["staged"]
            assert counts["queries"] == counts["hits"] + misses, name
            assert min(counts["hits"], misses) > 0, name
    assert server.post("/collective_rpc", {"method": "expert_cache_faults"})["results"] == [[]] * ranks
    return found


# One server: what vLLM does by default, with small blocks and chunks so that little text is enough.

SMALL_CHUNKS = (
    *EAGER, "--max-num-batched-tokens", "64", "--block-size", "32", "--structured-outputs-config",
    json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tiny_int4: Path, tiny_int4_float32: Path) -> Iterator[tuple[Server, Server]]:
    """A server with the cache, and a stock one."""
    with serving(tiny_int4, *CACHE, *SMALL_CHUNKS) as cached, serving(tiny_int4_float32, *SMALL_CHUNKS) as stock:
        yield cached, stock


@pytest.fixture(scope="module")
def passage() -> list[int]:
    """Ids of 300 tokens of text that the model was not trained on."""
    ids = AutoTokenizer.from_pretrained(SHIPPED).encode(next(text for _, text in documents("held-out")))
    assert len(ids) >= 300
    return list(ids[:300])


def total(server: Server, name: str) -> float:
    return sum(value for (found, _), value in server.metrics().items() if found == name)


def choices(server: Server, prompt: str | list[int], **changes: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = completion(server, prompt, **changes)["choices"]  # type: ignore[assignment]
    return found


def assert_near(server: Server, prompt: list[int], tokens: list[int]) -> None:
    assert max(gaps(server, prompt, tokens)) < NEAR_TIE


def test_chunked_prefill_and_prefix_caching(pair: tuple[Server, Server], passage: list[int]) -> None:
    cached, stock = pair
    reused, runs = [], []
    for server in pair:
        before = total(server, "vllm:prefix_cache_hits_total")
        runs.append([choices(server, passage)[0]["token_ids"] for _ in range(2)])
        reused.append(total(server, "vllm:prefix_cache_hits_total") - before)
    assert reused[0] == reused[1] >= 256  # of the second request, in blocks of 32
    for tokens in runs[0]:
        assert_near(stock, passage, tokens)
    (layers,) = assert_in_order(cached)
    # 300 tokens in chunks of 64, then what the blocks lack, and 39 decoding steps after each.
    assert {counts["steps"] for counts in layers.values()} == {5 + 39 + 1 + 39}


def test_several_samples_with_log_probabilities(pair: tuple[Server, Server]) -> None:
    cached, stock = pair
    prompt = AutoTokenizer.from_pretrained(SHIPPED).encode(PROMPTS[0])
    samples = choices(cached, prompt, n=3, temperature=1.0, seed=7, logprobs=2)
    assert len({tuple(sample["token_ids"]) for sample in samples}) == 3
    differences = []
    for sample in samples:
        tokens = sample["token_ids"]
        judged = prompt_logprobs(stock, [*prompt, *tokens])[-len(tokens) :]
        stated = sample["logprobs"]["token_logprobs"]
        differences += [abs(s - j[str(t)]["logprob"]) for s, t, j in zip(stated, tokens, judged, strict=True)]
        assert all(len(top) >= 2 for top in sample["logprobs"]["top_logprobs"])
    assert len(differences) == 3 * 40
    assert max(differences) < NEAR_TIE
    assert_in_order(cached)


def test_structured_output(pair: tuple[Server, Server]) -> None:
    cached, stock = pair
    prompt = AutoTokenizer.from_pretrained(SHIPPED).encode(PROMPTS[2])
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["import", "return"]}, "size": {"enum": [1, 2]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    wanted = {"structured_outputs": {"json": schema}, "ignore_eos": False}
    ours, theirs = (choices(server, prompt, **wanted)[0] for server in pair)
    assert json.loads(ours["text"]).keys() == {"name", "size"}
    assert_near_under_constraint(stock, prompt, ours["token_ids"], theirs["token_ids"])
    wanted = {"structured_outputs": {"regex": r"[a-z]{3}_[0-9]{4}"}, "ignore_eos": False}
    ours, theirs = (choices(server, prompt, **wanted)[0] for server in pair)
    assert re.fullmatch(r"[a-z]{3}_[0-9]{4}", ours["text"])
    assert_near_under_constraint(stock, prompt, ours["token_ids"], theirs["token_ids"])
    assert_in_order(cached)


def assert_near_under_constraint(stock: Server, prompt: list[int], ours: list[int], theirs: list[int]) -> None:
    """Equal, or parted at two tokens that are nearly as likely: unconstrained log probabilities know no grammar."""
    if ours == theirs:
        return
    place = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    one, other = (prompt_logprobs(stock, [*prompt, *s[: place + 1]])[-1][str(s[place])] for s in (ours, theirs))
    assert other["logprob"] - one["logprob"] < NEAR_TIE


def test_embeddings(tiny_int4: Path, tiny_int4_float32: Path) -> None:
    found = []
    arguments = (*EAGER, "--runner", "pooling", "--convert", "embed")
    for model, cache in ((tiny_int4, CACHE), (tiny_int4_float32, ())):
        with serving(model, *cache, *arguments) as server:
            server.post("/v1/embeddings", {"model": "tiny", "input": PROMPTS[0]})  # leaves experts for others to hit
            answer = server.post("/v1/embeddings", {"model": "tiny", "input": PROMPTS})
            found.append(torch.tensor([entry["embedding"] for entry in answer["data"]]))
            if cache:
                assert_in_order(server)
    ours, theirs = found
    between = theirs @ theirs.T - torch.eye(len(PROMPTS))
    assert (ours * theirs).sum(1).min() > 1 - 1e-5
    assert between.max() < 0.99  # other texts are farther apart than that


# Speculative decoding.


def speculating(**settings: Any) -> tuple[str, str]:
    return "--speculative-config", json.dumps(settings)


def assert_speculates(
    model: Path, stock_model: Path, arguments: tuple[str, ...], least_accepted: int
) -> list[dict[str, dict[str, int]]]:
    """Both servers speculate, with success, and say the same; returns our counters."""
    with serving(model, *CACHE, *EAGER, *arguments) as cached:
        tokens = greedy_tokens(cached)
        assert total(cached, "vllm:spec_decode_num_accepted_tokens_total") >= least_accepted
        counters = assert_in_order(cached)
    with serving(stock_model, *EAGER, *arguments) as stock:
        assert_chosen_by(stock, tokens)
        greedy_tokens(stock)
        assert total(stock, "vllm:spec_decode_num_accepted_tokens_total") >= least_accepted
    return counters


def test_ngram_speculation(tiny_int4: Path, tiny_int4_float32: Path) -> None:
    ngram = speculating(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4, prompt_lookup_min=2)
    (layers,) = assert_speculates(tiny_int4, tiny_int4_float32, ngram, least_accepted=40)
    steps = {counts["steps"] for counts in layers.values()}
    assert len(steps) == 1
    assert steps.pop() < 8 * 40  # fewer steps than tokens


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with experts in all layers and the tiny model's tokenizer."""
    out = tmp_path_factory.mktemp("drafting") / "qwen3"
    return with_tokenizer(checkpoints.write(checkpoints.qwen3_moe_config(vocab_size=2048), out))


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder / name)
    return folder


def test_a_draft_model_with_experts(qwen3: Path) -> None:
    draft = speculating(method="draft_model", model=str(qwen3), num_speculative_tokens=3)
    (layers,) = assert_speculates(qwen3, qwen3, draft, least_accepted=200)
    assert sorted(layers) == [
        f"{prefix}model.layers.{n}.mlp.experts" for prefix in ("draft_model.", "") for n in (0, 1)
    ]


def test_multi_token_prediction(tmp_path: Path) -> None:
    model = with_tokenizer(checkpoints.write_glm4_moe_with_mtp(tmp_path / "glm"))
    mtp = speculating(method="mtp", num_speculative_tokens=1)
    (layers,) = assert_speculates(model, model, mtp, least_accepted=40)
    assert sorted(layers) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


# Several ranks.


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """INT4 in groups that divide half of an expert's 192 rows, and the same decoded."""
    out = tmp_path_factory.mktemp("halves")
    export_int4(open_source(SHIPPED), out / "int4", group_size=32)
    return out / "int4", checkpoints.decode_to_float32(out / "int4", out / "float32")


def test_tensor_and_expert_parallel(halves: tuple[Path, Path]) -> None:
    # Stock vLLM cannot compute expert parallel on a CPU, so both are compared with its tensor parallel.
    tensor = ("--tensor-parallel-size", "2")
    said, asked = [], []
    for extra in ((), ("--enable-expert-parallel",)):
        with serving(halves[0], *CACHE, *EAGER, *tensor, *extra, **TWO_RANKS) as cached:
            said.append(greedy_tokens(cached))
            ranks = assert_in_order(cached, ranks=2)
            asked.append([sum(counts["queries"] for counts in rank.values()) for rank in ranks])
    with serving(halves[1], *EAGER, *tensor, **TWO_RANKS) as stock:
        for tokens in said:
            assert_chosen_by(stock, tokens)
    tensor_parallel, expert_parallel = asked
    assert tensor_parallel[0] == tensor_parallel[1]
    assert sum(expert_parallel) == pytest.approx(tensor_parallel[0], rel=0.02)  # each expert belongs to one rank


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler, g++ is not there")
def test_pipeline_parallel(tiny_int4: Path, tiny_int4_float32: Path) -> None:
    # Compiled: without, vLLM on a CPU fails at the first request.
    arguments = (*COMPILED, "--pipeline-parallel-size", "2")
    with serving(tiny_int4, *CACHE, *arguments, **TWO_RANKS) as cached:
        tokens = greedy_tokens(cached)
        first, second = assert_in_order(cached, ranks=2)
    assert len(first) + len(second) == LAYERS
    assert not first.keys() & second.keys()
    with serving(tiny_int4_float32, *arguments, **TWO_RANKS) as stock:
        assert_chosen_by(stock, tokens)
