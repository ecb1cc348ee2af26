"""What serving an HLWQ checkpoint costs at the start, beside its exported INT4 sibling: seconds and host memory.

    python benchmarks/hlwq_load.py [--out FILE.json] [--layers N] [--repeats N] [-- OPTIONS OF vllm serve]

Makes a Qwen3-MoE-shaped model with random BF16 experts, codes it, exports it, and serves both in turn, each time in a
process of its own, and the coded one again with experts that an earlier start has kept
(``--moe-expert-store-cache``). Seconds are those that vLLM logs for loading weights: reading, decoding, quantising to
INT4 and filling the model. Beside them the parts of that work are measured by themselves. Memory is what
``load_memory.py`` calls the peak of the loading process. Exit code 1: a limit was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from load_memory import model_config, start_server, start_watched, write_tokenizer
from transformers import AutoModelForCausalLM

from vllm_hlwq.bench import environment
from vllm_hlwq.checkpoint.export import Int4Export, export_int4
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource

EXPERTS, WIDTH = 64, 512
SECONDS_FACTOR = 2.0
PEAK_EXTRA = 2 * 2**30
TOOK = re.compile(r"Loading weights took ([\d.]+) seconds")


def make_models(folder: Path, layers: int) -> int:
    """Write ``bf16``, ``hlwq`` and ``int4``; return the bytes of the experts in INT4, scales included."""
    config = model_config(EXPERTS, WIDTH, layers)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "bf16")
    write_tokenizer(folder / "bf16", config.vocab_size)
    quantize(folder / "bf16", folder / "hlwq", fit="norm")
    export_int4(HlwqSource(folder / "hlwq"), folder / "int4")
    export = Int4Export(HlwqSource(folder / "hlwq"))
    return sum(
        tensor.bytes
        for group in export.groups
        for tensor in group.tensors
        if ".experts." in tensor.name and tensor.name.endswith(("_packed", "_scale"))
    )


def serve(model: Path, *arguments: str) -> dict[str, float]:
    """Start a server: seconds of loading weights, and until it answers."""
    start = time.monotonic()
    with start_server(model, *arguments) as server:
        ready = time.monotonic() - start
        took = TOOK.search(server.log)
        server.post("/v1/completions", {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
    if took is None:
        raise RuntimeError("vLLM's log says nothing of how long loading weights took")
    return {"loading": float(took[1]), "ready": round(ready, 1)}


def peak_of(model: Path, *arguments: str) -> int:
    """Start a server: the loading process' peak in bytes. Not in ``serve``: watching takes time from it."""
    server, peak = start_watched(model, *arguments)
    with server:
        peak.join()
    return peak.peak


def parts_of_the_work(model: Path) -> dict[str, float]:
    """Seconds of reading and decoding all weights alone, and of making the INT4 sibling's tensors, in this process."""

    def decode() -> None:
        source = HlwqSource(model)
        for name, parameter in source.parameters.items():
            source.rows(name, 0, parameter.rows)

    def export() -> None:
        made = Int4Export(HlwqSource(model))
        for group in made.groups:
            for _ in made.tensors(group):
                pass

    found = {}
    for name, work in {"decode": decode, "decode_and_quantise": export}.items():
        seconds, processor = [], []
        for _ in range(4):
            start, used = time.perf_counter(), time.process_time()
            work()
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
        # The first compiles.
        found[name] = round(statistics.median(seconds[1:]), 3)
        found[f"{name}_processor"] = round(statistics.median(processor[1:]), 3)
        found[f"{name}_first"] = round(seconds[0], 3)
    return found


def summary(runs: dict[str, list[dict[str, float]]], peaks: dict[str, int], expert_bytes: int) -> dict[str, Any]:
    """Medians of the runs, and what they are of their limits."""
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} | {"peak": peaks[name]}
        for name, found in runs.items()
    }
    return {
        **medians,
        "loading_ratio": round(medians["hlwq"]["loading"] / medians["int4"]["loading"], 2),
        "ready_ratio": round(medians["hlwq"]["ready"] / medians["int4"]["ready"], 2),
        "kept_ready_ratio": round(medians["hlwq_kept"]["ready"] / medians["int4"]["ready"], 2),
        "peak_over_limit": round(peaks["hlwq"] / (expert_bytes + PEAK_EXTRA), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers; 3 make 0.56 GiB of BF16 experts")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each server")
    parser.add_argument("server", nargs="*", help="more options of vllm serve, after --")
    arguments = parser.parse_args()
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="hlwq-load-") as scratch:
        folder = Path(scratch)
        expert_bytes = make_models(folder, arguments.layers)
        parts = parts_of_the_work(folder / "hlwq")
        more = tuple(arguments.server)
        kept = ("--moe-expert-store-cache", str(folder / "kept"), *more)
        starts: dict[str, tuple[str, ...]] = {
            "hlwq": ("hlwq", *more), "int4": ("int4", *more), "hlwq_kept": ("hlwq", *kept)
        }  # fmt: skip
        serve(folder / "hlwq", *kept)
        peaks = {name: peak_of(folder / model, *options) for name, (model, *options) in starts.items()}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
        for _ in range(arguments.repeats):
            for name, (model, *options) in starts.items():
                runs[name].append(serve(folder / model, *options))
                print(name, runs[name][-1])
    result = {
        "environment": environment.describe(),
        "load_average_before": load_average,
        "expert_bytes_bf16": arguments.layers * EXPERTS * 3 * WIDTH * 1024 * 2,
        "expert_bytes_int4": expert_bytes,
        "parts": parts,
        "runs": runs,
        **summary(runs, peaks, expert_bytes),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    missed = [
        *(["loading takes longer than twice the sibling's"] if result["loading_ratio"] > SECONDS_FACTOR else []),
        *(["the peak exceeds the INT4 experts and 2 GiB"] if result["peak_over_limit"] > 1 else []),
    ]
    for miss in missed:
        print(f"missed: {miss}")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
