"""Record the tiny model's routing through real servers, and hold the replay of it against what the servers counted.

    python benchmarks/routing_traces.py

Serves the shipped model with several cache sizes, each recording a trace of the same requests: prompts one at a time,
a long prompt that streams, and eight requests at once. Writes ``examples/tiny_moe/trace.safetensors`` (the trace of
``SHIPPED_SLOTS``), ``benchmarks/results/routing_traces.json`` and ``docs/routing_traces.png``.
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_hlwq.bench import environment
from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server
from vllm_hlwq.checkpoint.dequantize import open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.simulate import replay, report
from vllm_hlwq.simulate_charts import hit_rates
from vllm_hlwq.trace import Trace

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = PROJECT / "examples/tiny_moe/trace.safetensors"
RESULT = PROJECT / "benchmarks/results/routing_traces.json"
CHART = PROJECT / "docs/routing_traces.png"

SLOTS = (2, 4, 8)
SHIPPED_SLOTS = 4
NEW_TOKENS = 80


def requests(server: Server, model: str) -> None:
    """What is recorded: one request at a time, a long prompt, and all at once."""

    def complete(prompt: str, tokens: int) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        server.post("/v1/completions", body)

    for prompt in PROMPTS[:4]:
        complete(prompt, NEW_TOKENS)
    complete("\n\n".join(PROMPTS) * 4, NEW_TOKENS)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for done in [pool.submit(complete, prompt, NEW_TOKENS) for prompt in PROMPTS]:
            done.result()


def record(model: Path, slots: int, path: Path) -> Trace:
    """The trace of a server with so many slots, complete with its counters."""
    arguments = ("--moe-expert-cache-size", str(slots), "--moe-expert-trace", str(path), "--shutdown-timeout", "25")
    with Server(model, *arguments, "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager") as server:
        requests(server, str(model))
    return Trace.load(path)


def against_the_server(trace: Trace) -> dict[str, Any]:
    """Hits as the server counted them and as a replay of its trace does."""
    (replayed,) = replay(trace, [trace.header.cache_size])
    counters = trace.header.counters
    assert counters is not None
    return {
        "slots": replayed.slots,
        "steps": trace.num_steps,
        "queries": sum(counts["queries"] for counts in counters.values()),
        "live_hits": sum(counts["hits"] for counts in counters.values()),
        "simulated_hits": replayed.all.hits,
        "differences": replayed.differences,
    }


def curves(trace: Trace) -> dict[str, Any]:
    """The report of every number of slots."""
    experts = trace.header.layers[0].experts
    return report(trace, replay(trace, range(1, experts)), link=None)


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a report, what the documents show."""
    return [
        {
            "slots": row["slots"],
            "hit_rate": row["all"]["hit_rate"],
            "optimal_hit_rate": row["all"]["optimal_hit_rate"],
            "decode_bytes_per_token": row["decode"]["bytes_per_token"],
            "layer_hit_rates": [layer["all"]["hit_rate"] for layer in row["layers"]],
        }
        for row in found["slots"]
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-moe-CT"
        export_int4(open_source(PROJECT / "examples/tiny_moe/model"), model)
        traces = {slots: record(model, slots, Path(folder) / f"{slots}.safetensors") for slots in SLOTS}
    shipped = traces[SHIPPED_SLOTS]
    shipped.save(SHIPPED)
    found = curves(shipped)
    CHART.write_bytes(hit_rates(found))
    result = {
        "live": [against_the_server(trace) for trace in traces.values()],
        "shipped_slots": SHIPPED_SLOTS,
        "tokens": found["tokens"],
        "decode_tokens": found["decode_tokens"],
        "file_bytes": SHIPPED.stat().st_size,
        "slots": summary(found),
        "environment": environment.describe(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
