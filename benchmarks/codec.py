"""How long the codec takes in units of the Hadamard product it cannot do without, and how much memory it takes.

    python benchmarks/codec.py [--part speed|memory] [--out FILE.json]

Times are ratios within one run. The unit is the bare float32 block-Hadamard product of the same weights on the same
cores, done in chunks that stay in the cache; the best of several chunk sizes counts. Each time is the median of seven,
taken in turn with the product's, and includes packing. Take them when nothing else runs.

Memory is the peak of a converting process's anonymous memory, with Python and its libraries, for a model made of a
sparse file. It needs disk for what the converters write: 1.4 times the model's size. Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sparse_model import GIB, write_model

from vllm_hlwq.bench import environment
from vllm_hlwq.bench.memory import run_and_watch
from vllm_hlwq.codec import GAIN, NORM, SEARCH, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.codec.hadamard import sylvester

SIDE, BLOCK_SIZE, REPEATS = 4096, 128, 7
CHUNK_SIZES = [2**power for power in range(8, 16)]
LIMITS = {"quantise, norm": 4.0, "quantise, gain": 5.5, "dequantise": 3.0}
"""In units of the product, at 5 bits."""
MEMORY_LIMIT = 1.5 * GIB
BUSY = 1.3
"""A product's slowest time over its median: above it, something else was running."""

CPU = torch.device("cpu")


def product(blocks: torch.Tensor, chunk: int) -> Callable[[], object]:
    """The bare product, ``chunk`` blocks at a time, into memory that is used again."""
    matrix, out = sylvester(BLOCK_SIZE, CPU), torch.empty(chunk, BLOCK_SIZE)

    def run() -> None:
        for start in range(0, len(blocks), chunk):
            part = blocks[start : start + chunk]
            torch.mm(part, matrix, out=out[: len(part)])

    return run


def in_turn(tasks: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each of ``REPEATS`` runs of every task, in turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(REPEATS + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_speed() -> dict[str, Any]:
    """Seconds of the product and of the codec's ways, and their ratios."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.02
    blocks = weight.view(-1, BLOCK_SIZE)
    sizes = in_turn({str(chunk): product(blocks, chunk) for chunk in CHUNK_SIZES})
    best = min(sizes, key=lambda chunk: statistics.median(sizes[chunk]))
    tasks: dict[str, Callable[[], object]] = {"product": product(blocks, int(best))}
    rows: list[dict[str, Any]] = []

    def add(what: str, bits: int, task: Callable[[], object], limit: float | None = None) -> None:
        rows.append({"what": what, "bits": bits, "limit": limit})
        tasks[f"{what} {bits}"] = task

    for bits in (5, 2, 3, 4, 6, 8):
        coder = BlockCoder(codebook("C", bits), BLOCK_SIZE, CPU)
        coded = quantize_matrix(weight, coder, GAIN)
        fits = {"norm": NORM, "gain": GAIN, "search": SEARCH} if bits == 5 else {"gain": GAIN}
        for name, fit in fits.items():
            what = f"quantise, {name}"
            limit = LIMITS.get(what) if bits == 5 else None
            add(what, bits, lambda coder=coder, fit=fit: quantize_matrix(weight, coder, fit), limit)  # type: ignore[misc]
        limit = LIMITS["dequantise"] if bits == 5 else None
        add("dequantise", bits, lambda coder=coder, coded=coded: dequantize_matrix(coded, coder), limit)  # type: ignore[misc]
    seconds = in_turn(tasks)
    unit = statistics.median(seconds["product"])
    for row in rows:
        row["seconds"] = round(statistics.median(seconds[f"{row['what']} {row['bits']}"]), 5)
        row["ratio"] = round(row["seconds"] / unit, 2)
    return {
        "weights": weight.numel(),
        "repeats": REPEATS,
        "product_seconds": round(unit, 5),
        "product_slowest_over_median": round(max(seconds["product"]) / unit, 2),
        "product_blocks_at_a_time": int(best),
        "product_seconds_by_blocks": {size: round(statistics.median(times), 5) for size, times in sizes.items()},
        "rows": rows,
    }


def measure_memory(total_bytes: int) -> dict[str, Any]:
    """Peaks of the three conversions of a model of ``total_bytes``, each in a process of its own."""
    hlwq = shutil.which("hlwq", path=str(Path(sys.executable).parent))
    if hlwq is None:
        raise SystemExit(f"no hlwq command beside {sys.executable}; pip install this project there")
    with tempfile.TemporaryDirectory(prefix="codec-memory-") as folder:
        source, coded, out = (Path(folder) / name for name in ("source", "coded", "out"))
        model_bytes = write_model(source, total_bytes)
        commands: dict[str, Any] = {}
        for command in (["quantize", source, coded], ["export", coded, out], ["dequantize", coded, out]):
            peak, seconds = run_and_watch([hlwq, *map(str, command)])
            commands[str(command[0])] = {"peak": peak, "seconds": round(seconds)}
            shutil.rmtree(out, ignore_errors=True)
    return {"model_bytes": model_bytes, "limit": int(MEMORY_LIMIT), "commands": commands}


def report_speed(speed: dict[str, Any]) -> bool:
    """Print the times; were all bars met?"""
    print(f"product: {speed['product_seconds'] * 1000:.1f} ms, {speed['product_blocks_at_a_time']} blocks at a time")
    for row in speed["rows"]:
        limit = f"  of {row['limit']}" if row["limit"] else ""
        print(f"{row['what']:16} {row['bits']} bits {row['seconds'] * 1000:8.1f} ms {row['ratio']:6.2f}{limit}")
    if speed["product_slowest_over_median"] > BUSY:
        print("the product's times vary: something else was running; measure again", file=sys.stderr)
    return not any(row["limit"] and row["ratio"] > row["limit"] for row in speed["rows"])


def report_memory(memory: dict[str, Any]) -> bool:
    """Print the peaks; was the bar met?"""
    for name, command in memory["commands"].items():
        print(f"{name:12} {command['peak'] / 2**20:8.0f} MiB {command['seconds']:6.0f} s")
    return all(command["peak"] <= memory["limit"] for command in memory["commands"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON; a part that is not measured is kept")
    parser.add_argument("--part", choices=("speed", "memory"), help="measure only this")
    parser.add_argument("--gib", type=float, default=10, help="size of the model for memory")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    met = True
    if arguments.part != "memory":
        result["speed"] = {"environment": environment.describe(), **measure_speed()}
        met &= report_speed(result["speed"])
    if arguments.part != "speed":
        result["memory"] = {"environment": environment.describe(), **measure_memory(int(arguments.gib * GIB))}
        met &= report_memory(result["memory"])
    if arguments.out:
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps({**before, **result}, indent=2) + "\n")
    return int(not met)


if __name__ == "__main__":
    raise SystemExit(main())
