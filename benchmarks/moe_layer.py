"""One mixture-of-experts layer taken apart on a GPU: what each kernel costs, by CUDA events and graph replay.

    python benchmarks/moe_layer.py [--parts gather] [--shape gemma-4-26b-a4b] [--sweep] [--cuda-cpp] [--out DIR]

Prints a table for each part and writes ``DIR/moe_layer.json`` with the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gather_link
import torch

from vllm_hlwq.bench import environment

Part = tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], str]]

PARTS: dict[str, Part] = {
    "gather": (
        lambda chosen: gather_link.measure(gather_link.SHAPES[chosen.shape], chosen.sweep, chosen.cuda_cpp),
        gather_link.table,
    ),
}
"""What can be measured: a part's measurement, and its result as text."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument(
        "--shape", choices=list(gather_link.SHAPES), default="gemma-4-26b-a4b", help="the layer's sizes"
    )
    parser.add_argument("--sweep", action="store_true", help="gather: try grid, chunk and block sizes, about a minute")
    parser.add_argument("--cuda-cpp", action="store_true", help="gather: the CUDA C++ variants too (needs nvcc)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for moe_layer.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if not torch.cuda.is_available():
        print("moe_layer.py measures CUDA kernels; torch finds no CUDA device on this machine", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"environment": environment.describe(), "shape": chosen.shape}
    for name in chosen.parts:
        measure, table = PARTS[name]
        result[name] = measure(chosen)
        print(table(result[name]), flush=True)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "moe_layer.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
