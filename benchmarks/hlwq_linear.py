"""What computing from HLWQ codes costs in transformers: a linear layer per forward, and decoding while a model loads.

    python benchmarks/hlwq_linear.py [--part linear|load] [--out FILE.json]
    python benchmarks/hlwq_linear.py --sweep [--out FILE.json]    on a GPU: what its kernels' constants should be

A layer of 4096 x 4096 against torch's BF16 product, with activations for 1 to 512 tokens. Both go through several
weights in turn, as a model does, so that none waits in a cache. On a CPU also in the time of one processor, which other
work on the machine disturbs less. With CUDA, the times of kernels are those of replayed graphs.

Loading is ``from_pretrained`` of a model that decodes to half a gigabyte, against the codec's own decoding of the same
matrices in memory, both in weights a second. It includes reading the files and holding every tensor to its SHA-256.
Exit code 1: a limit was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from vllm_hlwq.bench import environment
from vllm_hlwq.codec import NORM, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.hf.coded_weight import CodeFormat, coded_linear

SIDE, BLOCK_SIZE, BITS = 4096, 128, 5
WEIGHTS = {"cpu": 4, "cuda": 16}
"""Enough that BF16's exceed the last cache of a GPU."""
TOKENS = (1, 8, 64, 512)
REPEATS = {"linear": 101, "load": 15}
SLOWER_AT_64 = 3.0
SLOWER_AT_1_ON_CUDA = 1.0
SHARE_OF_CODEC = 0.8
LOADED = {"vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
          "num_attention_heads": 16, "num_key_value_heads": 16}  # fmt: skip


def in_turn(tasks: dict[str, Callable[[int], object]], clock: Callable[[], float], repeats: int) -> dict[str, float]:
    """Median seconds of each task over numbered runs, in turn, after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(repeats + 2):
        for name, task in tasks.items():
            start = clock()
            task(number)
            if number > 1:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def coded_weights(plain: list[torch.Tensor]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], CodeFormat]:
    """Packed codes and norms of weights ``[SIDE, SIDE]``, as ``coded_linear`` takes them, and their format."""
    table = codebook("C", BITS)
    coder = BlockCoder(table, BLOCK_SIZE, plain[0].device)
    coded = [quantize_matrix(weight, coder, NORM) for weight in plain]
    parts = [(each.packed.view(SIDE, -1), each.norms.view(torch.int16)) for each in coded]
    return parts, CodeFormat(table, BLOCK_SIZE, SIDE)


def rotation_seconds() -> float:
    """What rotating one token takes on a GPU, of a product of ``measure_linear``."""
    from vllm_hlwq.bench.cuda_timing import seconds_per_call
    from vllm_hlwq.hf.rotated_kernel import rotate

    layout = CodeFormat(codebook("C", BITS), BLOCK_SIZE, SIDE)
    x = torch.randn(1, SIDE, device="cuda").bfloat16()
    return seconds_per_call(lambda _: void(rotate(x, layout, by_words=True)), 2 * WEIGHTS["cuda"])


def void(_: object) -> None:
    """For calls that are to return nothing."""


def measure_linear() -> dict[str, Any]:
    """Seconds of both products by number of tokens, and their ratio."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = WEIGHTS[device.type]
    plain = [torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(count)]
    parts, layout = coded_weights(plain)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, SIDE, device=device).bfloat16()
        tasks: dict[str, Callable[[int], object]] = {
            "bf16": lambda number, x=x: functional.linear(x, plain[number % count]),  # type: ignore[misc]
            "coded": lambda number, x=x: coded_linear(x, *parts[number % count], layout),  # type: ignore[misc]
        }
        if device.type == "cuda":
            from vllm_hlwq.bench.cuda_timing import seconds_per_call

            seconds = {name: seconds_per_call(task, 2 * count) for name, task in tasks.items()}  # type: ignore[arg-type]
            rows.append({"tokens": tokens, "clock": "device", **_compared(seconds)})
            continue
        with torch.no_grad():
            rows.append(
                {"tokens": tokens, "clock": "wall", **_compared(in_turn(tasks, time.perf_counter, REPEATS["linear"]))}
            )
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # more would spin in wait for one another, which is processor time too
            rows.append(
                {
                    "tokens": tokens,
                    "clock": "one processor",
                    **_compared(in_turn(tasks, time.process_time, REPEATS["linear"])),
                }
            )
            torch.set_num_threads(threads)
    bits = 8 * sum(part.nbytes for part in parts[0]) / SIDE**2
    return {"side": SIDE, "bits_per_weight": bits, "weights": count, "rows": rows}


def measure_sweep() -> dict[str, Any]:
    """``hlwq_linear_sweep.py`` over the weights that ``measure_linear`` has."""
    from hlwq_linear_sweep import Sweep, on_device, summary, sweep

    plain = [torch.randn(SIDE, SIDE, device="cuda").bfloat16() for _ in range(WEIGHTS["cuda"])]
    found = sweep(Sweep(plain, *coded_weights(plain), on_device))
    print(summary(found))
    return {"side": SIDE, "weights": len(plain), **found}


def _compared(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{name}_seconds": round(value, 7) for name, value in seconds.items()} | {
        "ratio": round(seconds["coded"] / seconds["bf16"], 2)
    }


def measure_load() -> dict[str, Any]:
    """Weights a second of loading with decoding, and of the codec alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from vllm_hlwq.checkpoint.quantize import quantize
    from vllm_hlwq.checkpoint.reader import HlwqSource

    with tempfile.TemporaryDirectory(prefix="hlwq-load-") as folder:
        source, coded = Path(folder) / "source", Path(folder) / "coded"
        AutoModelForCausalLM.from_config(LlamaConfig(**LOADED), dtype=torch.bfloat16).save_pretrained(source)
        quantize(source, coded, fit="norm")
        reader = HlwqSource(coded)
        matrices = [
            (matrix, reader.coder(stored))
            for name in reader.matrices
            for matrix, stored in zip(list(reader.coded(name)), reader.matrices[name], strict=True)
        ]
        weights = sum(reader.parameters[name].bytes // 2 for name in reader.matrices)

        def decode(_: int) -> None:
            for matrix, coder in matrices:
                dequantize_matrix(matrix, coder)

        def load(_: int) -> None:
            AutoModelForCausalLM.from_pretrained(coded)

        seconds = in_turn({"load": load, "codec": decode}, time.perf_counter, REPEATS["load"])
        processor = in_turn({"load": load, "codec": decode}, time.process_time, REPEATS["load"])
    return {
        "weights": weights,
        **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
        **{f"{name}_processor_seconds": round(value, 4) for name, value in processor.items()},
        "share_of_codec": round(seconds["codec"] / seconds["load"], 3),
        "share_of_codec_processor": round(processor["codec"] / processor["load"], 3),
    }


def misses(result: dict[str, Any]) -> list[str]:
    """The limits that a result does not keep."""
    found = []
    for row in result.get("linear", {}).get("rows", ()):
        limit = {64: SLOWER_AT_64}.get(row["tokens"])
        if row["clock"] == "device" and row["tokens"] == 1:
            limit = SLOWER_AT_1_ON_CUDA
        if limit is not None and row["ratio"] > limit:
            found.append(f"{row['tokens']} tokens, {row['clock']} time: {row['ratio']} times BF16's, limit {limit}")
    share = result.get("load", {}).get("share_of_codec", 1.0)
    if share < SHARE_OF_CODEC:
        found.append(f"loading decodes at {share:.0%} of the codec's rate, limit {SHARE_OF_CODEC:.0%}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON; a part that is not measured is kept")
    parser.add_argument("--part", choices=("linear", "load"), help="measure only this")
    parser.add_argument("--sweep", action="store_true", help="time other shapes of the kernels, and nothing else")
    arguments = parser.parse_args()
    if arguments.sweep and not torch.cuda.is_available():
        parser.error("--sweep needs a CUDA device, this machine has none")
    parts = {"sweep": measure_sweep} if arguments.sweep else {"linear": measure_linear, "load": measure_load}
    result: dict[str, Any] = {
        name: {"environment": environment.describe(), "load_average_before": os.getloadavg()[0], **measure()}
        for name, measure in parts.items()
        if arguments.sweep or arguments.part in (None, name)
    }
    if not arguments.sweep or not arguments.out:
        print(json.dumps(result, indent=2))
    if arguments.out:
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.write_text(json.dumps({**before, **result}, indent=2) + "\n")
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
