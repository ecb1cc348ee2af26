"""Does the expert cache keep its promises on this GPU? One command, no network.

    python benchmarks/gpu_acceptance.py --out DIR [--parts correctness performance] [--layers N]
    python benchmarks/gpu_acceptance.py --judge RESULT.json

Correctness is ``pytest -m gpu`` on kernels, layers and whole engines: a layer in one wave has the bits of stock vLLM's
Marlin, in several waves it differs by no more than Marlin itself between batch shapes, and greedy tokens are those of
the resident model.

Performance is measured on a random checkpoint in the shape of Gemma-4-26B-A4B, each engine in a process of its own with
the same KV cache: stock vLLM on Marlin with all experts resident, the cache at four sizes, and vLLM's own ways to
offload experts at equal GPU memory. Engines run on CUDA graphs without torch.compile, which takes most of a start-up
and changes nothing that is compared; ``--compile`` leaves vLLM its default.

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
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from acceptance_criteria import Criterion, judge
from engine_process import Task, run_side_by_side, run_task
from make_checkpoint import make_checkpoint
from rich.console import Console
from rich.table import Table
from throughput import GPU_SHARE, OFFLOADING, ROUTING_VARIABLE, expert_memory, graphs_without_compiling

from vllm_hlwq.bench.routing import BUT_ONE, MEASURED_LOCALITY
from vllm_hlwq.options import config_key

PROJECT = Path(__file__).parent.parent
SHAPE = "gemma-4-26b-a4b"
EXPERTS, SLOTS, HALF = 128, 32, 64
SUMMARY = re.compile(r"^\d+ (?:passed|failed|skipped).*$", re.MULTILINE)
KV_CACHE_BYTES = 6 * 2**30
LONG_PROMPT = 8192
ALONE = {"batch": 1, "prompt_tokens": 512, "new_tokens": 192}
MANY = {"batch": 32, "prompt_tokens": 64, "new_tokens": 16}
PROMPT = {"batch": 1, "prompt_tokens": LONG_PROMPT, "new_tokens": 0}
TESTS = {
    "kernels": ["tests/test_plan_gpu.py", "tests/test_gather_gpu.py"],
    "layer in one wave": ["tests/test_gpu_layer.py", "-k", "gemma4-g64 and one_wave"],
    "layer in waves": ["tests/test_gpu_layer.py", "-k", "gemma4-g64 and not one_wave"],
    "engine with graphs": ["tests/test_gpu.py", "-k", "graphs-v2"],
    "engine without graphs": ["tests/test_gpu.py", "-k", "eager-v1"],
}


@dataclass(frozen=True)
class Engine:
    """One engine to measure.

    name: of its row.
    arguments: of vLLM's engine, beyond those that all have.
    cases: what to measure.
    slots: of its cache, None for stock vLLM.
    routing: a strategy of ``bench/routing.py``.
    """

    name: str
    arguments: dict[str, Any]
    cases: tuple[dict[str, int], ...]
    slots: int | None = None
    routing: str = MEASURED_LOCALITY


def cache(name: str, slots: int, *cases: dict[str, int], routing: str = MEASURED_LOCALITY) -> Engine:
    return Engine(name, {"additional_config": {config_key("cache_size"): slots}}, cases, slots, routing)


MARLIN = {"moe_backend": "marlin"}
ENGINES = {
    # The first one compiles what all have in common, so it is none whose start-up is compared.
    "all": cache("all", EXPERTS, ALONE),
    "resident": Engine("resident", MARLIN, (ALONE, PROMPT, MANY)),
    "cache": cache("cache", SLOTS, ALONE, PROMPT, MANY),
    # Long prompts first: experts that are rarely named must be resident before steps without misses are timed.
    "all_but_one": cache("all_but_one", EXPERTS - 1, PROMPT, ALONE, routing=BUT_ONE),
    "half": cache("half", HALF, MANY),
}
OFFLOADED = {
    "uva": ("cache", (ALONE, MANY)), "half_uva": ("half", (MANY,)), "half_prefetch": ("half", (MANY,)),
}  # fmt: skip
"""vLLM's own offloading, the last word of the name, with as much GPU memory as which engine, and what is measured."""
ENGINE_NAMES = [*ENGINES, *OFFLOADED]
GROUPS = (("all",), ("resident",), ("cache",), ("all_but_one", "half", "uva"), ("half_uva", "half_prefetch"))
"""In the order in which they are measured; engines of a group start together, alone those whose start-up and memory are
compared."""


@dataclass
class Performance:
    """Engines of one checkpoint, measured one after the other."""

    model: Path
    compiled: bool
    logs: Path
    timeout: float
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    prepared: dict[str, Task] = field(default_factory=dict)

    def run(self, names: tuple[str, ...], following: tuple[str, ...]) -> None:
        """Measure engines that start together, while the processes of the next ones import vLLM."""
        for name in (*names, *following):
            self.prepare(name)
        engines = {name: ENGINES.get(name) or self.offloading(name) for name in names}
        wanted = {name: engine for name, engine in engines.items() if engine is not None}
        for name in names:
            if name not in wanted:
                self.prepared.pop(name).end()
        if wanted:
            self.measure(list(wanted.values()))

    def prepare(self, name: str) -> None:
        if name not in self.prepared:
            routing = ENGINES[name].routing if name in ENGINES else MEASURED_LOCALITY
            self.prepared[name] = Task({ROUTING_VARIABLE: routing}, log_of(name, self.logs), import_first=True)

    def end(self) -> None:
        for task in self.prepared.values():
            task.end()

    def offloading(self, name: str) -> Engine | None:
        """vLLM's own offloading with as much GPU memory for experts as a cache has, which must be known by now."""
        equal, cases = OFFLOADED[name]
        sizes = self.engines.get(equal, {}).get("expert_cache")
        if sizes is None:
            return None
        arguments = OFFLOADING[name.rpartition("_")[2]](expert_memory(sizes))
        assert arguments is not None  # not all experts are resident
        return Engine(name, arguments | MARLIN, cases)

    def measure(self, engines: list[Engine]) -> None:
        start = time.monotonic()
        specifications = [self.specification(engine, GPU_SHARE / len(engines)) for engine in engines]
        tasks = [self.prepared.pop(engine.name) for engine in engines]
        results = run_side_by_side(dict(zip(tasks, specifications, strict=True)), self.timeout)
        for engine, specification, result in zip(engines, specifications, results, strict=True):
            print(f"{engine.name}: {result['status']} {result.get('reason', '')}", flush=True)
            self.engines[engine.name] = {"engine": specification["engine"], "routing": engine.routing, **result}
        print(f"in {time.monotonic() - start:.0f} s", flush=True)

    def specification(self, engine: Engine, gpu_share: float) -> dict[str, Any]:
        common: dict[str, Any] = {
            "max_model_len": LONG_PROMPT + 64,
            "max_num_batched_tokens": LONG_PROMPT,
            "max_num_seqs": MANY["batch"],
            "enable_prefix_caching": False,
            "attention_backend": "TRITON_ATTN",
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "gpu_memory_utilization": gpu_share,
            "seed": 0,
        }
        if not self.compiled:
            common["compilation_config"] = graphs_without_compiling(MANY["batch"])
        return {
            "task": "engine", "cuda": True, "model": str(self.model), "cached": engine.slots is not None,
            "engine": common | engine.arguments, "cases": list(engine.cases), "repeats": 3,
        }  # fmt: skip


def log_of(name: str, logs: Path) -> Path:
    return logs / f"{name.replace(' ', '_')}.log"


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


def gather_rates(folder: Path) -> dict[str, Any]:
    """The gather part of ``moe_layer.py``: bytes per second of kernel and copy engine."""
    command = [sys.executable, str(Path(__file__).with_name("moe_layer.py")), "--parts", "gather", "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / "moe_layer.json").read_text())
    return found["gather"]


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
        running = start_tests(logs) if "correctness" in options.parts else {}
        model = options.model or Path(scratch) / SHAPE
        if "performance" in options.parts and not options.model:
            make_checkpoint(SHAPE, model, options.layers)
        if running:
            result["tests"] = results_of(running, logs)
        if "performance" in options.parts:
            result |= {"model": SHAPE, "layers": options.layers, "compiled": options.compile}
            result["gather"] = gather_rates(Path(scratch))
            performance = Performance(model, options.compile, logs, options.timeout)
            result["engines"] = performance.engines
            try:
                chosen = [tuple(name for name in group if name in options.engines) for group in GROUPS]
                groups = [group for group in chosen if group]
                for names, following in zip_longest(groups, groups[1:], fillvalue=()):
                    performance.run(names, following)
                    save(result, options.out, start)  # what is known by now survives whatever comes
            finally:
                performance.end()
    result["criteria"] = [vars(found) for found in all_criteria(result)]
    save(result, options.out, start)
    return report(result)


if __name__ == "__main__":
    raise SystemExit(main())
