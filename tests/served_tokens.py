"""Greedy tokens of a served tiny model, and their comparison with another server's choices."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server
from vllm_hlwq.bench.teacher_forcing import NEAR_TIE, gaps

SHIPPED = Path(__file__).parent.parent / "examples/tiny_moe/model"
NEW_TOKENS = 40
EXACT = ("--dtype", "float32")
"""Arguments of servers whose tokens are compared; see ``teacher_forcing.py``."""


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


def gaps_to_first_choice(server: Server, sequences: list[list[int]]) -> list[float]:
    """How far each new token of the prompts' sequences is below the server's first choice, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    pairs = zip(PROMPTS, sequences, strict=True)
    return [gap for prompt, tokens in pairs for gap in gaps(server, tokenizer.encode(prompt), tokens)]


def assert_chosen_by(server: Server, sequences: list[list[int]]) -> None:
    """Each token is what the server says there too, or tied with it; both serve in float32."""
    assert "float32" in server.command
    found = gaps_to_first_choice(server, sequences)
    assert len(found) == len(PROMPTS) * NEW_TOKENS
    assert max(found) < NEAR_TIE
