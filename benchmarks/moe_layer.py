"""One mixture-of-experts layer taken apart on a GPU: what each kernel costs, by CUDA events and graph replay.

    python benchmarks/moe_layer.py [--parts gather inside plan layer] [--shape gemma-4-26b-a4b] [--quick] [--out DIR]

``gather``: experts over the link, by the copy engine and by the gather kernel, 1 to 128 of them a launch; ``--sweep``
    tries the kernel's sizes too, and ``--cuda-cpp`` the variants in CUDA C++.
``inside``: the same experts loaded and then multiplied, against read from inside vLLM's GEMM out of host memory, as
    ``--cpu-offload-gb`` lets it (``inside_gemm.py``).
``plan``: microseconds of deciding a step, over experts, top-k, tokens, slots and misses, and whether they grow with the
    misses (``plan_cost.py``).
``layer``: whole steps of ``DeviceExpertCache`` over tokens, slots and misses, against the same layer with every expert
    resident and against the link; what each part of a step takes, and which limits (``layer_step.py``).

``plan`` and ``layer`` run steps whose misses are known beforehand (``known_misses.py``), and fail if the cache's
counters say otherwise. ``--quick`` measures a few of each. Prints a table for each part and writes
``DIR/moe_layer.json`` with the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_hlwq.bench import environment
from vllm_hlwq.bench.moe_shapes import SHAPES

Measured = tuple[dict[str, Any], str]
"""A part's result, and the result as text."""


# A part imports what it measures when it is asked for: the gather kernel needs no vLLM.


def gather(chosen: argparse.Namespace) -> Measured:
    import gather_link

    result = gather_link.measure(SHAPES[chosen.shape], chosen.sweep, chosen.cuda_cpp, chosen.quick)
    return result, gather_link.table(result)


def inside(chosen: argparse.Namespace) -> Measured:
    import inside_gemm

    result = inside_gemm.measure(SHAPES[chosen.shape], chosen.quick)
    return result, inside_gemm.table(result)


def plan(chosen: argparse.Namespace) -> Measured:
    import plan_cost

    result = plan_cost.measure(chosen.quick)
    return result, plan_cost.table(result)


def layer(chosen: argparse.Namespace) -> Measured:
    import layer_step
    import step_report

    result = layer_step.measure(SHAPES[chosen.shape], chosen.quick)
    return result, step_report.table(result)


PARTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "gather": gather, "inside": inside, "plan": plan, "layer": layer,
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument("--shape", choices=list(SHAPES), default="gemma-4-26b-a4b", help="the layer's sizes")
    parser.add_argument("--quick", action="store_true", help="a few of the measurements only")
    parser.add_argument("--sweep", action="store_true", help="gather: try grid, chunk and block sizes, about a minute")
    parser.add_argument(
        "--cuda-cpp", nargs="?", const="", metavar="LIBRARY",
        help="gather: the CUDA C++ variants too, out of a library of gather_bulk.py, which else nvcc builds now",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for moe_layer.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if not torch.cuda.is_available():
        print("moe_layer.py measures CUDA kernels; torch finds no CUDA device on this machine", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"environment": environment.describe(), "shape": chosen.shape}
    for name in chosen.parts:
        result[name], text = PARTS[name](chosen)
        print(text, flush=True)
        if chosen.out:  # after each part: a later one may fail
            chosen.out.mkdir(parents=True, exist_ok=True)
            (chosen.out / "moe_layer.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
