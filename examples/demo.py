"""Serve the tiny trained mixture-of-experts model with 4 of its 16 experts a layer resident, and chat with it.

    make demo

The model is three layers that learnt to continue Python's own documentation and sources: expect plausible text,
not answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from openai import OpenAI

from vllm_hlwq.bench.server import Server

MODEL = Path(__file__).parent / "tiny_moe" / "model"
CACHE_SIZE = 4
PROMPT = "The for statement is used to iterate over"


def main() -> None:
    print(f"Starting vLLM with --moe-expert-cache-size {CACHE_SIZE} (about a minute on two cores) ...", flush=True)
    arguments = ("--moe-expert-cache-size", str(CACHE_SIZE), "--max-model-len", "1024", "--enforce-eager")
    with Server(MODEL, *arguments) as server:
        line = next(line for line in server.log.splitlines() if "Expert cache:" in line)
        print(line[line.index("Expert cache:") :], "\n")
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=str(MODEL),
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=120,
            temperature=0.6,
            seed=7,
        )
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(f"{PROMPT}{bold}{answer.choices[0].message.content}{plain}\n")
        counters = server.expert_cache_counters()
    misses = counters["queries"] - counters["hits"]
    print(
        f"Expert cache over {counters['steps']} layer steps: {counters['queries']} experts needed, "
        f"{counters['hits']} hits ({counters['hits'] / counters['queries']:.0%}), {misses} misses, "
        f"{counters['evictions']} evictions, {counters['h2d_bytes'] / 1e6:.1f} MB moved. Server stopped."
    )


if __name__ == "__main__":
    main()
