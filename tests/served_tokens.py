"""Greedy tokens of a served tiny model, and their comparison with another server's choices."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from vllm_hlwq.bench.server import Server
from vllm_hlwq.bench.teacher_forcing import NEAR_TIE, gaps

SHIPPED = Path(__file__).parent.parent / "examples/tiny_moe/model"
PROMPTS = [
    "The import statement",
    "class Queue:\n    def __init__(self",
    "def main():\n    parser = argparse.ArgumentParser(",
    "Raised when an operation",
    "A list comprehension consists of",
    "    @property\n    def name(self):\n",
    "If the file cannot be",
    '"""Utilities for',
]
NEW_TOKENS = 40


def completion(server: Server, prompt: str | list[int], **changes: object) -> dict[str, object]:
    """The answer to one greedy request of ``NEW_TOKENS`` tokens."""
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer: dict[str, object] = server.post("/v1/completions", body | changes)
    return answer


def greedy_tokens(server: Server) -> list[list[int]]:
    """Greedy continuation of each prompt, one request at a time."""
    return [completion(server, prompt)["choices"][0]["token_ids"] for prompt in PROMPTS]  # type: ignore[index]


def assert_chosen_by(
    server: Server, sequences: list[list[int]], minimum: float, prompts: list[str] | None = None
) -> None:
    """At least ``minimum`` of the sequences' new tokens are the server's first choice too, any other a near-tie."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    agreed = total = 0
    for prompt, tokens in zip(prompts or PROMPTS, sequences, strict=True):
        found = gaps(server, tokenizer.encode(prompt), tokens)
        worst = max(found)
        assert worst < NEAR_TIE, f"{prompt!r}: token {found.index(worst)} is {worst:.3f} nats below the first choice"
        agreed += found.count(0)
        total += len(found)
    assert agreed / total >= minimum, f"{agreed} of {total} tokens agree"
