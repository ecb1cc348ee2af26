"""Hit rate over a server's first 100 tokens, with slots empty and with slots filled from a profile.

    python benchmarks/warm_start.py [--out FILE.json]

Real servers of the tiny model, a new one for each first request. The profile is what a server left at its shutdown that
had served other prompts; the measured requests are not among them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from vllm_hlwq.bench import environment
from vllm_hlwq.bench.server import Server
from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4

PROJECT = Path(__file__).resolve().parent.parent
RESULT = PROJECT / "benchmarks/results/warm_start.json"

SLOTS = (4, 8, 12)
TOKENS = 100
SERVED_BEFORE = (
    "The import statement",
    "class Queue:\n    def __init__(self",
    "A list comprehension consists of",
    "If the file cannot be",
)
FIRST_REQUESTS = ("Raised when an operation", "def main():\n    parser = argparse.ArgumentParser(", '"""Utilities for')


def serve(model: Path, slots: int, *arguments: str) -> Server:
    limits = ("--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager", "--shutdown-timeout", "25")
    return Server(model, "--moe-expert-cache-size", str(slots), *limits, *arguments)


def complete(server: Server, model: Path, prompt: str) -> list[int]:
    body = {"model": str(model), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    tokens: list[int] = server.post("/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]
    return tokens


def first_tokens(model: Path, slots: int, prompt: str, *arguments: str) -> tuple[dict[str, int], list[int]]:
    """Counters of a new server over its first request, and the tokens of the answer."""
    with serve(model, slots, *arguments) as server:
        tokens = complete(server, model, prompt)
        return server.expert_cache_counters(), tokens


def measured(model: Path, slots: int, folder: Path) -> dict[str, Any]:
    """One number of slots: sums over the first requests."""
    profile = folder / f"profile-{slots}.json"
    with serve(model, slots, "--moe-expert-profile", str(profile)) as server:
        for prompt in SERVED_BEFORE:
            complete(server, model, prompt)
    saved = profile.read_bytes()
    found: dict[str, Any] = {"slots": slots, "profile_bytes": len(saved)}
    rows: dict[str, list[dict[str, int]]] = {"cold": [], "warm": []}
    for prompt in FIRST_REQUESTS:
        profile.write_bytes(saved)
        cold, tokens = first_tokens(model, slots, prompt)
        warm, same_tokens = first_tokens(model, slots, prompt, "--moe-expert-profile", str(profile))
        assert tokens == same_tokens, "a warm start changed an answer"
        rows["cold"].append(cold)
        rows["warm"].append(warm)
    for start, counters in rows.items():
        total = {name: sum(row[name] for row in counters) for name in ("queries", "hits", "h2d_bytes")}
        found[start] = total | {"hit_rate": total["hits"] / total["queries"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "tiny-moe-CT"
        export_int4(open_source(PROJECT / "examples/tiny_moe/model"), model)
        rows = [measured(model, slots, folder) for slots in SLOTS]
    result = {
        "experts": 16,
        "top_k": json.loads((PROJECT / "examples/tiny_moe/model/config.json").read_text())["top_k_experts"],
        "tokens": TOKENS,
        "requests": len(FIRST_REQUESTS),
        "rows": rows,
        "environment": environment.describe(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
