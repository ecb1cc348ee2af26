"""Prefill and decoding with the expert cache, beside stock vLLM and its own ways of offloading, at equal GPU memory.

    python benchmarks/throughput.py --model MODEL --cache-sizes 8,16,32 --out RESULT.json

Every configuration runs in a process of its own; one that fails is a row that says why. The controls are stock vLLM:
``resident`` (all experts on the GPU), ``uva`` (``--cpu-offload-gb``) and ``prefetch`` (``--offload-backend prefetch``),
the latter two once for each cache size, set so that as many bytes of experts stay on the GPU as that cache's slots and
staging bank take; the KV cache has the same size everywhere. ``NAME:BACKEND`` runs a control on another of vLLM's
expert kernels. Beside the result lies ``RESULT.png``, tokens per second over the cache size.

The prediction is a roofline: a step takes as long as with all experts resident, and the bytes it misses come at the
bandwidth of the copy engine, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from engine_process import Task, run_side_by_side, run_task, shared_processors
from engine_run import WARM_UP_TOKENS
from throughput_report import add_predictions, draw_chart, print_table

from vllm_hlwq.atomic_file import replacing
from vllm_hlwq.bench.controls import ExpertMemory, control_resident_bytes, prefetch_arguments, uva_arguments
from vllm_hlwq.bench.routing import MEASURED_LOCALITY
from vllm_hlwq.options import config_key
from vllm_hlwq.plugin import ROUTING_VARIABLE

ROUTINGS = {"model": "", MEASURED_LOCALITY: MEASURED_LOCALITY, "uniform": "uniform_random"}
OFFLOADING = {"uva": uva_arguments, "prefetch": prefetch_arguments}
CONTROLS = ("resident", *OFFLOADING)
GPU_CONTROLS = "resident,resident:marlin,uva:marlin,prefetch:marlin"
"""Both kernels when resident: on Hopper stock vLLM prefers another than Marlin, which the cache runs on."""
GPU_SHARE = 0.9
"""Of a GPU's memory, for all engines that are on it at a time."""


CASE = ("batch", "prompt_tokens", "new_tokens", "repeats")
"""Of a measurement: what was measured."""
HEADER = ("environment", "model", "routing", "attention_backend", "compiled", "started_together")
"""Of a result: what must be the same if a run goes on."""
MAY_CHANGE = {"date", "memory_gib"}  # of the environment: a virtual machine's memory can grow with its use


@dataclass
class Planned:
    """A configuration to be measured: its row's name and cache size, and what its engine gets beyond the common."""

    name: str
    size: int | None
    arguments: dict[str, Any]
    planned_bytes: int | None = None


class Benchmark:
    """The configurations of one run; rows are dictionaries of JSON values."""

    def __init__(
        self,
        options: argparse.Namespace,
        machine: dict[str, Any],
        save: Callable[[], None],
        earlier: list[dict[str, Any]],
    ) -> None:
        """``earlier`` are rows of the same run, cut short: what they measured stays."""
        self.options, self.earlier = options, earlier
        self.cuda = "gpu" in machine["environment"]
        self.rows: list[dict[str, Any]] = []
        self.save = save
        self.memory: dict[int, ExpertMemory] = {}

    def run(self) -> None:
        """Caches first: the controls get as much memory as they say that they take."""
        sizes = self.options.cache_sizes
        self._measure([Planned("cache", n, {"additional_config": {config_key("cache_size"): n}}) for n in sizes])
        for row in self.rows:
            if row["status"] == "ok":
                self.memory[row["cache_size"]] = expert_memory(row["expert_cache"])
        planned = []
        for control in self.options.controls:
            name, _, backend = control.partition(":")
            arguments = {"moe_backend": backend} if backend else {}
            if name == "resident":
                planned.append(Planned(control, None, arguments))
                continue
            chosen = self.options.control_sizes or sizes
            planned += filter(None, (self._offloading(control, size, arguments) for size in chosen))
        self._measure(planned)

    def _offloading(self, control: str, size: int, arguments: dict[str, Any]) -> Planned | None:
        if not self.cuda:
            self._skip(control, size, "vLLM offloads from CUDA devices to their host; there is no such device here")
        elif size not in self.memory:
            self._skip(control, size, f"the cache of {size} did not run, so the memory to give is not known")
        else:
            offload = OFFLOADING[control.partition(":")[0]](self.memory[size])
            if offload is not None:
                resident = control_resident_bytes(self.memory[size], offload)
                return Planned(control, size, arguments | offload, resident)
            self._skip(control, size, f"all experts fit into the memory that a cache of {size} takes: see resident")
        return None

    def _skip(self, control: str, size: int, reason: str) -> None:
        self._add({"configuration": control, "cache_size": size, "status": "not run", "reason": reason})

    def _measure(self, planned: list[Planned]) -> None:
        """Measure in groups whose engines start together; if so asked, the next group imports vLLM meanwhile."""
        planned = [each for each in planned if not self._keep(each)]
        group = self.options.start_together
        groups = [planned[first : first + group] for first in range(0, len(planned), group)]
        ready: list[Task] = []
        for members, following in zip_longest(groups, groups[1:], fillvalue=[]):
            tasks = ready or self._prepare(members)
            ready = self._prepare(following) if group > 1 else []
            specifications = [self._specification(each, GPU_SHARE / len(members)) for each in members]
            given = dict(zip(tasks, specifications, strict=True))
            with closing(run_side_by_side(given, self.options.timeout)) as results:
                # Each row is saved before the next engine is measured.
                for each, specification, result in zip(members, specifications, results, strict=True):
                    row = {"configuration": each.name, "cache_size": each.size, "engine": specification["engine"]}
                    if each.planned_bytes is not None:
                        row["planned_resident_expert_bytes"] = each.planned_bytes
                    self._add(row | result)

    def _keep(self, planned: Planned) -> bool:
        """Take an earlier row if it is of this configuration, measured in the same way."""
        wanted = self._specification(planned, 0.0)
        cases = [case | {"repeats": wanted["repeats"]} for case in wanted["cases"]]
        for row in self.earlier:
            if (row["configuration"], row["cache_size"], row["status"]) != (planned.name, planned.size, "ok"):
                continue
            measured = [{name: found[name] for name in CASE} for found in row["measurements"]]
            if measured == cases and without_share(row["engine"]) == without_share(wanted["engine"]):
                self._add(row)
                return True
        return False

    def _prepare(self, planned: list[Planned]) -> list[Task]:
        environment = {ROUTING_VARIABLE: ROUTINGS[self.options.routing]}
        if self.cuda:  # else the processors are what is measured
            environment |= shared_processors(len(planned))
        return [Task(environment, self._log_path(each.name, each.size), import_first=True) for each in planned]

    def _specification(self, planned: Planned, gpu_share: float) -> dict[str, Any]:
        options = self.options
        decoding = [
            (batch, options.prompt_tokens, new) for batch, new in zip(options.batches, options.new_tokens, strict=True)
        ]
        prompts = [(1, tokens, 0) for tokens in options.prefill_tokens]
        common: dict[str, Any] = {
            "max_model_len": max(tokens + max(new, WARM_UP_TOKENS) for _, tokens, new in decoding + prompts) + 1,
            "max_num_seqs": max(options.batches),
            "enforce_eager": options.enforce_eager,
            "enable_prefix_caching": False,
            "language_model_only": True,
            "seed": 0,
        }
        if options.no_compile:
            common["compilation_config"] = graphs_without_compiling(max(options.batches))
        if options.prefill_tokens:
            common["max_num_batched_tokens"] = max(options.prefill_tokens)
        if options.attention_backend:
            common["attention_backend"] = options.attention_backend
        if self.cuda:
            common["kv_cache_memory_bytes"] = round(options.kv_cache_gib * 2**30)
            common["gpu_memory_utilization"] = gpu_share
        return {
            "task": "engine", "cuda": self.cuda, "model": str(options.model), "cached": planned.name == "cache",
            "engine": common | planned.arguments, "repeats": options.repeats,
            "cases": [
                {"batch": batch, "prompt_tokens": tokens, "new_tokens": new}
                for batch, tokens, new in decoding + prompts
            ],
        }  # fmt: skip

    def _log_path(self, name: str, size: int | None) -> Path | None:
        if self.options.logs is None:
            return None
        self.options.logs.mkdir(parents=True, exist_ok=True)
        at = "" if size is None else f"-{size}"
        return Path(self.options.logs, f"{name.replace(':', '-')}{at}.log")

    def _add(self, row: dict[str, Any]) -> None:
        at = "" if row["cache_size"] is None else f" at {row['cache_size']}"
        reason = f" ({row['reason']})" if "reason" in row else ""
        print(f"{row['configuration']}{at}: {row['status']}{reason}", flush=True)
        self.rows.append(row)
        self.save()


def without_share(engine: dict[str, Any]) -> dict[str, Any]:
    """An engine's arguments but for its share of the GPU, which depends on how many start at once."""
    return {name: value for name, value in engine.items() if name != "gpu_memory_utilization"}


def rows_to_keep(out: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result that was cut short, after which ``result`` counts the starts and has the first's link.

    Raises:
        SystemExit: it is of another machine, model or way to measure, or no result at all.
    """
    if not out.exists():
        return []
    try:
        earlier = json.loads(out.read_text())
        header = {name: earlier[name] for name in HEADER}
        rows: list[dict[str, Any]] = earlier["rows"]
        link = earlier["link_bytes_per_second"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"throughput: --resume: {out} is no result of this command ({error}); give another --out"
        ) from None
    for name, before in header.items():
        now = result[name]
        if name == "environment":
            changed = [key for key in now.keys() | before.keys() if before.get(key) != now.get(key)]
            name = min(set(changed) - MAY_CHANGE, default="")
            before, now = before.get(name), now.get(name)
        if before != now:
            raise SystemExit(f"throughput: --resume: {out} has {name} {before}, here it is {now}; give another --out")
    result["starts"] = earlier.get("starts", 1) + 1
    result["link_bytes_per_second"] = link
    return rows


def graphs_without_compiling(largest_batch: int) -> dict[str, Any]:
    """vLLM's compilation settings for CUDA graphs of decoding steps up to a batch, without torch.compile."""
    sizes = [2**power for power in range(largest_batch.bit_length()) if 2**power < largest_batch]
    return {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [*sizes, largest_batch]}


def expert_memory(sizes: dict[str, Any]) -> ExpertMemory:
    """What a cache reports, as the planner of controls wants it."""
    total = sizes["layers"] * sizes["experts"] * sizes["record_bytes"]
    return ExpertMemory(sizes["layers"], total, sizes["slot_bytes"], sizes["staging_bytes"])


def whole_numbers(text: str) -> list[int]:
    """Positive numbers in order, each once."""
    return sorted(set(numbers_as_given(text)))


def numbers_as_given(text: str) -> list[int]:
    """Positive numbers as they stand."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def control_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if any(name.partition(":")[0] not in CONTROLS for name in names):
        raise ValueError(text)
    return names


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--cache-sizes", type=whole_numbers, required=True, help="experts resident per layer: 8,16,32")
    parser.add_argument("--batches", type=whole_numbers, default=[1, 4, 8, 32], help="requests at once (1,4,8,32)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument(
        "--new-tokens", type=numbers_as_given, default=[64], metavar="N,N",
        help="tokens after the first, so at most as many timed steps: one number, or one for each of --batches, from "
        "the smallest (64)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--controls", type=control_names,
        help=f"of {', '.join(CONTROLS)}, each with :BACKEND or without (default on a GPU: {GPU_CONTROLS})",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-tokens", type=whole_numbers, default=[], metavar="N,N",
        help="prompts alone, each in one step: 2048,8192",
    )  # fmt: skip
    parser.add_argument("--control-sizes", type=whole_numbers, help="cache sizes that get controls (default: all)")
    parser.add_argument(
        "--start-together", type=int, default=1, metavar="N",
        help="start N engines at once and measure them in turn: faster, but start-up and host memory stay unknown",
    )  # fmt: skip
    parser.add_argument("--routing", choices=sorted(ROUTINGS), default="model", help="who picks the experts")
    parser.add_argument("--attention-backend", help="vLLM's --attention-backend")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs and no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="CUDA graphs, but no torch.compile, which takes long")
    parser.add_argument("--kv-cache-gib", type=float, default=4.0, help="the same for every configuration on a GPU")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one configuration")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what each engine prints, a file each, in DIR")
    parser.add_argument("--out", type=Path, help="write the result as JSON and a chart beside it")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that --out has of this machine: measure what it lacks"
    )
    options = parser.parse_args(words)
    if options.resume and options.out is None:
        parser.error("--resume goes on with the result that --out names: give --out")
    if len(options.new_tokens) == 1:
        options.new_tokens *= len(options.batches)
    if len(options.new_tokens) != len(options.batches):
        parser.error(
            f"--new-tokens has {len(options.new_tokens)} numbers for {len(options.batches)} batches: give one, or one "
            "for each of --batches"
        )
    return options


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    machine = run_task({"task": "probe"}, {}, options.timeout)
    if machine["status"] != "ok":
        raise SystemExit(f"throughput: the machine cannot be described: {machine['reason']}")
    cuda = "gpu" in machine["environment"]
    if not cuda and options.routing != "model" and not options.enforce_eager:
        raise SystemExit(
            f"throughput: --routing {options.routing} needs --enforce-eager on a CPU, where torch.compile would trace "
            "vLLM's routing simulator and cannot"
        )
    if options.controls is None:
        options.controls = control_names(GPU_CONTROLS) if cuda else list(CONTROLS)
    result: dict[str, Any] = {
        "environment": machine["environment"],
        "link_bytes_per_second": machine["bytes_per_second"],
        "model": options.model.resolve().name,
        "routing": options.routing,
        "attention_backend": options.attention_backend or "vLLM's choice",
        "compiled": not (options.no_compile or options.enforce_eager),
        "started_together": options.start_together,
    }

    def save() -> None:
        add_predictions(result)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(options.out) as file:
                os.write(file, (json.dumps(result, indent=2) + "\n").encode())

    earlier = rows_to_keep(options.out, result) if options.resume else []
    benchmark = Benchmark(options, machine, save, earlier)
    result["rows"] = benchmark.rows
    benchmark.run()
    print_table(result)
    if options.out:
        draw_chart(result, options.out.with_suffix(".png"))
    return int(not any(row["status"] == "ok" for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
