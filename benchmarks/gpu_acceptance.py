"""Does the expert cache keep its promises on this GPU? One command, no network.

    python benchmarks/gpu_acceptance.py --out DIR [--parts correctness performance] [--layers N]
    python benchmarks/gpu_acceptance.py --judge RESULT.json

Correctness is ``pytest -m gpu`` on kernels, layers and whole engines: a layer in one wave has the bits of stock vLLM's
Marlin, in several waves it differs by no more than Marlin itself between batch shapes, and greedy tokens are those of
the resident model.

Performance is measured on a random checkpoint in the shape of Gemma-4-26B-A4B, each engine in a process of its own with
the same KV cache: stock vLLM on Marlin with all experts resident, the cache at four sizes, and vLLM's own ways to
offload experts at equal GPU memory. Those of which neither start-up nor memory is compared start beside the tests or
beside each other; all are measured in turn. Engines run on CUDA graphs without torch.compile, which takes most of a
start-up and changes nothing that is compared; ``--compile`` leaves vLLM its default.

Prints a line for each promise and writes ``DIR/gpu_acceptance.json`` and, into ``DIR/logs``, what engines and tests
printed. The exit code is 0 if all are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from acceptance_criteria import Criterion, judge
from acceptance_engines import ENGINE_NAMES, GROUPS, Performance, log_of
from engine_process import run_side_by_side, run_task
from make_checkpoint import make_checkpoint
from rich.console import Console
from rich.table import Table

PROJECT = Path(__file__).parent.parent
SHAPE = "gemma-4-26b-a4b"
SUMMARY = re.compile(r"^\d+ (?:passed|failed|skipped).*$", re.MULTILINE)
TESTS = {
    "kernels": ["tests/test_plan_gpu.py", "tests/test_gather_gpu.py"],
    "layer in one wave": ["tests/test_gpu_layer.py", "-k", "gemma4-g64 and one_wave"],
    "layer in waves": ["tests/test_gpu_layer.py", "-k", "gemma4-g64 and waves_round"],
    "layer between steps": ["tests/test_gpu_layer.py", "-k", "gemma4-g64 and not one_wave and not waves_round"],
    "engine with graphs": ["tests/test_gpu.py", "-k", "graphs-v2"],
    "engine without graphs": ["tests/test_gpu.py", "-k", "eager-v1"],
}


def start_tests(logs: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Start the GPU tests, all side by side."""
    # Else each process has as many threads as there are cores, and all of them wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *words],
            cwd=PROJECT, stdout=log_of(name, logs).open("w"), stderr=subprocess.STDOUT, env=environment,
        )
        for name, words in TESTS.items()
    }  # fmt: skip


def results_of(running: dict[str, subprocess.Popen[bytes]], logs: Path) -> dict[str, dict[str, Any]]:
    """Wait for the tests and say of each whether it passed."""
    results = {}
    for name, process in running.items():
        code = process.wait()
        summaries = SUMMARY.findall(log_of(name, logs).read_text(errors="replace"))
        results[name] = {"passed": code == 0, "summary": summaries[-1] if summaries else "no result"}
        print(f"{name} tests: {'passed' if code == 0 else 'FAILED'} {results[name]['summary']}", flush=True)
    return results


def measure_performance(
    performance: Performance,
    options: argparse.Namespace,
    result: dict[str, Any],
    tests: dict[str, subprocess.Popen[bytes]],
    keep: Callable[[], None],
) -> None:
    """Measure the gather kernel and all chosen engines, once the tests are over.

    Args:
        performance: the engines.
        options: of the command.
        result: gets what is found.
        tests: that run; engines start beside them.
        keep: saves ``result``, whenever there is more of it: that much survives whatever comes.

    Raises:
        SystemExit: the gather kernel cannot be measured.
    """
    chosen = [tuple(name for name in group if name in options.engines) for group in GROUPS]
    groups = [group for group in chosen if group]
    performance.start(groups[0], beside=len(tests))
    performance.prepare(("gather",))
    if tests:
        result["tests"] = results_of(tests, performance.logs)
        keep()
    specification = {"task": "gather", "shape": SHAPE}
    (found,) = run_side_by_side({performance.waiting.pop("gather"): specification}, options.timeout)
    if found["status"] != "ok":
        raise SystemExit(f"gpu_acceptance: the gather kernel was not measured: {found['reason']}")
    result["gather"] = found
    for group, following in zip_longest(groups, groups[1:], fillvalue=()):
        if group != groups[0]:
            performance.start(group)
        performance.prepare(following)
        performance.measure(group, keep)


def added_to(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """An earlier result, to which the parts of a new run are added.

    Raises:
        SystemExit: it is of another machine or of other software.
    """
    for name in ("gpu", "driver", "vllm", "torch"):
        if earlier["environment"][name] != result["environment"][name]:
            raise SystemExit(
                f"gpu_acceptance: --add-to: its {name} is {earlier['environment'][name]}, here it is "
                f"{result['environment'][name]}; run all parts on one machine"
            )
    return earlier | {"parts": [*earlier["parts"], *result["parts"]], "earlier_seconds": earlier["seconds"]}


def save(result: dict[str, Any], folder: Path, start: float) -> None:
    result["seconds"] = round(time.monotonic() - start)
    (folder / "gpu_acceptance.json").write_text(json.dumps(result, indent=2) + "\n")


def all_criteria(result: dict[str, Any]) -> list[Criterion]:
    """What a result says of each promise."""
    tests = [
        Criterion(f"{name} tests pass", "", (SUMMARY.findall(found["summary"]) or [""])[0], found["passed"])
        for name, found in result.get("tests", {}).items()
    ]
    if "engines" not in result:
        return tests
    return tests + judge(result["engines"], result["gather"], link_rate(result))


def link_rate(result: dict[str, Any]) -> float:
    """Bytes a second of the copy engine: the fastest that was seen, since others on the host use its memory too."""
    probe: float = result["link_bytes_per_second"]
    return max(probe, *(1e9 * rate["copy_gb_per_s"] for rate in result["gather"]["rates"]))


def report(result: dict[str, Any]) -> int:
    """Print a line for each promise; 0 if all are kept."""
    table = Table("promise", "limit", "measured", "kept", title=f"Expert cache on {result['environment']['device']}")
    criteria = all_criteria(result)
    for found in criteria:
        table.add_row(found.promise, found.limit, found.measured, "yes" if found.kept else "NO")
    Console(width=None if Console().is_terminal else 160).print(table)
    return int(not all(found.kept for found in criteria))


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, metavar="DIR", help="folder for the result")
    wanted.add_argument("--judge", type=Path, metavar="FILE", help="measure nothing: judge this result again")
    parser.add_argument(
        "--parts", nargs="+", choices=("correctness", "performance"), default=["correctness", "performance"]
    )
    parser.add_argument(
        "--model", type=Path, help=f"checkpoint in the shape of {SHAPE} (default: made in a temporary folder)"
    )
    parser.add_argument(
        "--layers", type=int, help="decoder layers of the checkpoint that is made (default: the model's own)"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINE_NAMES, default=ENGINE_NAMES, help="measure only these")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="a result of other parts on the same machine")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as vLLM does by default")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one engine")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    if options.judge is not None:
        return report(json.loads(options.judge.read_text()))
    start = time.monotonic()
    machine = run_task({"task": "probe"}, {}, options.timeout)
    if machine["status"] != "ok":
        raise SystemExit(f"gpu_acceptance: the machine cannot be described: {machine['reason']}")
    if "gpu" not in machine["environment"]:
        raise SystemExit("gpu_acceptance: needs a CUDA GPU; torch finds none on this machine")
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "environment": machine["environment"],
        "link_bytes_per_second": machine["bytes_per_second"],
        "parts": options.parts,
    }
    if options.add_to is not None:
        result = added_to(json.loads(options.add_to.read_text()), result)
    with tempfile.TemporaryDirectory(prefix="acceptance-") as scratch:
        performance = Performance(options.model or Path(scratch) / SHAPE, options.compile, logs, options.timeout)
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            if "correctness" in options.parts:
                running = start_tests(logs)
            if "performance" in options.parts:
                if not options.model:
                    make_checkpoint(SHAPE, performance.model, options.layers)
                result |= {"model": SHAPE, "layers": options.layers, "compiled": options.compile}
                result["engines"] = performance.engines
                measure_performance(performance, options, result, running, lambda: save(result, options.out, start))
            else:
                result["tests"] = results_of(running, logs)
        finally:
            performance.end()
            for process in running.values():
                process.kill()
    result["criteria"] = [vars(found) for found in all_criteria(result)]
    save(result, options.out, start)
    return report(result)


if __name__ == "__main__":
    raise SystemExit(main())
