"""Is a token sequence what a server says? Judged position by position, with the sequence itself as the past.

Greedy sequences of two engines part for good at the first near-tie that falls the other way, and batches change the
rounding of vLLM's own dense layers enough for that. So a sequence is put to the judge as a prompt: each token of it is
compared with the judge's first choice after the same past.

Tokens can be held equal where both serve in float32. In 16 bit, a router's two last choices are now and then so close
that another order of summation picks the other expert, which moves a token by up to half a nat, whatever is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .server import Server

NEAR_TIE = 0.001
"""Nats. Orders of summation move float32 log probabilities by about 1e-5; a wrong expert's are farther apart."""


def prompt_logprobs(server: Server, ids: Sequence[int], model: str = "tiny") -> list[dict[str, dict[str, Any]]]:
    """For each position after the first: log probability and rank of the prompt's token and of the likeliest one."""
    body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    entries: list[dict[str, dict[str, Any]]] = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return entries[1:]


def gaps(server: Server, prompt: Sequence[int], tokens: Sequence[int], model: str = "tiny") -> list[float]:
    """How far each of ``tokens``, which follow ``prompt``, is below the server's first choice there, in nats."""
    if not tokens:
        return []
    entries = prompt_logprobs(server, [*prompt, *tokens], model)[-len(tokens) :]
    return [
        max(entry["logprob"] for entry in found.values()) - float(found[str(token)]["logprob"])
        for token, found in zip(tokens, entries, strict=True)
    ]
