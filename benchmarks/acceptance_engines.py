"""The engines that ``gpu_acceptance.py`` measures: which, in what order, and how they are started."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_process import Task, measure_side_by_side, shared_processors
from throughput import GPU_SHARE, OFFLOADING, ROUTING_VARIABLE, expert_memory, graphs_without_compiling

from vllm_hlwq.bench.routing import BUT_ONE, MEASURED_LOCALITY
from vllm_hlwq.options import config_key

EXPERTS, SLOTS, HALF = 128, 32, 64
KV_CACHE_BYTES = 3 * 2**30
LONG_PROMPT = 8192
ALONE = {"batch": 1, "prompt_tokens": 512, "new_tokens": 192}
MANY = {"batch": 32, "prompt_tokens": 64, "new_tokens": 16}
PROMPT = {"batch": 1, "prompt_tokens": LONG_PROMPT, "new_tokens": 0}


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
GROUPS = (("all", "all_but_one", "half"), ("resident",), ("cache",), ("uva", "half_uva", "half_prefetch"))
"""In the order in which they are measured; engines of a group start together, alone those whose start-up and memory are
compared. The first group starts beside the tests, and compiles what all have in common."""


@dataclass
class Performance:
    """Engines of one checkpoint, measured one after the other."""

    model: Path
    compiled: bool
    logs: Path
    timeout: float
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: dict[str, Task] = field(default_factory=dict)
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)

    def prepare(self, names: tuple[str, ...], beside: int = 0) -> None:
        """Let processes import vLLM, which takes long, before they are needed; ``beside`` others that work then."""
        processors = shared_processors(len(names) + beside)
        for name in names:
            if name not in self.waiting:
                routing = ENGINES[name].routing if name in ENGINES else MEASURED_LOCALITY
                environment = {ROUTING_VARIABLE: routing} | processors
                self.waiting[name] = Task(environment, log_of(name, self.logs), import_first=True)

    def start(self, names: tuple[str, ...], beside: int = 0) -> None:
        """Begin to start engines; one that is to have another's memory does not, if that one has failed."""
        self.prepare(names, beside)
        engines = {name: ENGINES.get(name) or self.offloading(name) for name in names}
        wanted = {name: engine for name, engine in engines.items() if engine is not None}
        for name, engine in engines.items():
            if engine is None:
                self.waiting.pop(name).end()
            else:
                specification = self.specification(engine, GPU_SHARE / len(wanted))
                self.begun[name] = {"engine": specification["engine"], "routing": engine.routing}
                self.waiting[name].start(specification)

    def measure(self, names: tuple[str, ...], keep: Callable[[], None]) -> None:
        """Measure engines that have been started, and end them; ``keep`` is called after each."""
        tasks = {name: self.waiting.pop(name) for name in names if name in self.begun}
        if not tasks:
            return
        start = time.monotonic()
        with closing(measure_side_by_side(list(tasks.values()), self.timeout)) as results:
            for name, result in zip(tasks, results, strict=True):
                print(f"{name}: {result['status']} {result.get('reason', '')}", flush=True)
                self.engines[name] = self.begun.pop(name) | result
                keep()
        print(f"in {time.monotonic() - start:.0f} s", flush=True)

    def end(self) -> None:
        for task in self.waiting.values():
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
