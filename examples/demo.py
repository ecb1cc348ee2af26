"""Export the tiny 5-bit model to INT4, serve it with 4 of its 16 experts a layer resident, and chat with it.

    make demo

The model is three layers that learnt to continue Python's own documentation and sources: expect plausible text,
not answers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from openai import OpenAI

from vllm_hlwq.bench.server import Server

MODEL = Path(__file__).parent / "tiny_moe" / "model"
CACHE_SIZE = 4
PROMPT = "The for statement is used to iterate over"


def export(sibling: Path) -> None:
    """Make the INT4 sibling, by the command that a user would type."""
    print(f"$ hlwq export {MODEL} {sibling}", flush=True)
    subprocess.run([Path(sys.executable).with_name("hlwq"), "export", MODEL, sibling], check=True)


def chat(server: Server, model: str) -> None:
    """Ask for a continuation, print it, and say what the cache did for it."""
    line = next(line for line in server.log.splitlines() if "Expert cache:" in line)
    print(line[line.index("Expert cache:") :], "\n")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=120,
        temperature=0.6,
        seed=7,
    )
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{PROMPT}{bold}{answer.choices[0].message.content}{plain}\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sibling = Path(folder) / "tiny-moe-CT"
        export(sibling)
        arguments = ("--moe-expert-cache-size", str(CACHE_SIZE), "--max-model-len", "1024", "--enforce-eager")
        print(f"$ vllm serve {sibling} {' '.join(arguments)}     (about a minute on two cores)", flush=True)
        with Server(sibling, *arguments) as server:
            chat(server, str(sibling))
            counters = server.expert_cache_counters()
    misses = counters["queries"] - counters["hits"]
    print(
        f"Expert cache over {counters['steps']} layer steps: {counters['queries']} experts needed, "
        f"{counters['hits']} hits ({counters['hits'] / counters['queries']:.0%}), {misses} misses, "
        f"{counters['evictions']} evictions, {counters['h2d_bytes'] / 1e6:.1f} MB moved. Server stopped."
    )


if __name__ == "__main__":
    main()
