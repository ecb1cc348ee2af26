"""What ``serve.py`` asks of a server: greedy tokens, a warm-up, and ``vllm bench serve`` between two readings."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_process import BenchProcess
from soak_checks import settled

from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server
from vllm_hlwq.bench.teacher_forcing import gaps, prompt_logprobs

SERVED_NAME = "served"
COPIES = 2
"""How often each prompt is among those that are answered all at once."""
GREEDY_TOKENS = 40
TEXTS, TEXT_TOKENS = 16, 96
"""Fixed texts that every server reads, and the tokens of each."""
WARM_UP_TOKENS = 16
KEPT = (
    "completed", "failed", "total_input_tokens", "total_output_tokens", "duration", "output_throughput",
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "max_concurrent_requests",
)  # fmt: skip


@dataclass(frozen=True)
class Spoken:
    """A prompt's ids and those of its greedy continuation."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TextLogprobs:
    """Log probabilities that a server has of all tokens of the fixed texts.

    alone: each text read by itself.
    at_once: the same, all texts sent together, so that they share steps.
    """

    alone: tuple[float, ...]
    at_once: tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """Metrics of a server by name, and counters of its expert cache, none without one, when nothing is under way."""

    metrics: dict[str, float]
    counters: dict[str, int]

    @classmethod
    def of(cls, server: Server, cached: bool) -> Reading:
        return cls(settled(server), server.expert_cache_counters() if cached else {})


def prompt_ids(server: Server) -> list[list[int]]:
    """The fixed prompts as the server's tokenizer has them."""
    bodies = [{"model": SERVED_NAME, "prompt": prompt} for prompt in PROMPTS]
    return [server.post("/tokenize", body)["tokens"] for body in bodies]


def continuation(server: Server, prompt: Sequence[int], new_tokens: int) -> Spoken:
    body = {
        "model": SERVED_NAME, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    tokens = server.post("/v1/completions", body)["choices"][0]["token_ids"]
    return Spoken(tuple(prompt), tuple(tokens))


def at_once(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Spoken]:
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda prompt: continuation(server, prompt, new_tokens), prompts))


def greedy(server: Server) -> list[Spoken]:
    """Continuation of each prompt, one request at a time, and of all of them at once."""
    prompts = prompt_ids(server)
    alone = [continuation(server, prompt, GREEDY_TOKENS) for prompt in prompts]
    return alone + at_once(server, prompts * COPIES, GREEDY_TOKENS)


def fixed_texts(server: Server) -> list[list[int]]:
    """The prompts one after the other, over and over, from another token on in each text."""
    ids = [token for prompt in prompt_ids(server) for token in prompt]
    starts = [text * len(ids) // TEXTS for text in range(TEXTS)]
    return [list(itertools.islice(itertools.cycle(ids), start, start + TEXT_TOKENS)) for start in starts]


def read_texts(server: Server) -> TextLogprobs:
    """What a server says of the fixed texts, which are the same for servers of one tokenizer."""
    texts = fixed_texts(server)

    def logprobs(text: list[int]) -> list[float]:
        entries = prompt_logprobs(server, text, SERVED_NAME)
        return [float(found[str(token)]["logprob"]) for token, found in zip(text[1:], entries, strict=True)]

    alone = tuple(value for text in texts for value in logprobs(text))
    with ThreadPoolExecutor(len(texts)) as clients:
        return TextLogprobs(alone, tuple(value for values in clients.map(logprobs, texts) for value in values))


def judged(server: Server, sequences: Sequence[Spoken]) -> list[float]:
    """How far each token is below the server's first choice, in nats."""
    return [gap for one in sequences for gap in gaps(server, one.prompt, one.tokens, SERVED_NAME)]


def warm_up(server: Server, clients: int, input_tokens: int, new_tokens: int) -> None:
    """As many requests at once as will be measured, with prompts that the benchmark does not send."""
    ids = [token for prompt in prompt_ids(server) for token in prompt]
    prompts = [list(itertools.islice(itertools.cycle(ids), client, client + input_tokens)) for client in range(clients)]
    at_once(server, prompts, min(new_tokens, WARM_UP_TOKENS))


@dataclass(frozen=True)
class Load:
    """A run of ``vllm bench serve``.

    Args:
        tokenizer: folder that has it; there may be no network.
        concurrency: clients, each of which waits for its answer.
        requests: of all clients.
        input_tokens, new_tokens: of each request.
        timeout: seconds.
    """

    tokenizer: Path
    concurrency: int
    requests: int
    input_tokens: int
    new_tokens: int
    timeout: float

    def run(self, bench: BenchProcess, server: Server, keep_log: Path | None = None) -> dict[str, Any]:
        """The benchmark's own figures.

        Raises:
            BenchmarkFailed: it ended with an error, or not in time.
        """
        with tempfile.TemporaryDirectory(prefix="serve-") as folder:
            arguments = [
                "--backend", "openai", "--base-url", server.url, "--model", SERVED_NAME,
                "--tokenizer", str(self.tokenizer), "--dataset-name", "random", "--seed", "0",
                "--random-input-len", str(self.input_tokens), "--random-output-len", str(self.new_tokens),
                "--num-prompts", str(self.requests), "--max-concurrency", str(self.concurrency),
                "--request-rate", "inf", "--ignore-eos", "--temperature", "0", "--disable-tqdm",
                # Requests that the figures are not of would be on /metrics too: see ``warm_up``.
                "--num-warmups", "0", "--ready-check-timeout-sec", "0",
                "--save-result", "--result-dir", folder, "--result-filename", "result.json",
            ]  # fmt: skip
            bench.run(arguments, keep_log or Path(folder, "log"), self.timeout)
            found = json.loads(Path(folder, "result.json").read_text())
        return {name: found[name] for name in KEPT}
