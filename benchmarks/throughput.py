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
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from throughput_report import add_predictions, draw_chart, print_table

from vllm_hlwq.bench.controls import ExpertMemory, control_resident_bytes, prefetch_arguments, uva_arguments
from vllm_hlwq.bench.routing import MEASURED_LOCALITY
from vllm_hlwq.bench.server import ENVIRONMENT
from vllm_hlwq.options import config_key
from vllm_hlwq.plugin import ROUTING_VARIABLE

ENGINE_RUN = Path(__file__).with_name("engine_run.py")
ROUTINGS = {"model": "", MEASURED_LOCALITY: MEASURED_LOCALITY, "uniform": "uniform_random"}
OFFLOADING = {"uva": uva_arguments, "prefetch": prefetch_arguments}
CONTROLS = ("resident", *OFFLOADING)
GPU_CONTROLS = "resident,resident:marlin,uva:marlin,prefetch:marlin"
"""Both kernels when resident: on Hopper stock vLLM prefers another than Marlin, which the cache runs on."""
SAMPLE_SECONDS = 0.1
_RAISED = re.compile(
    r"^(?:\[rank\d+\]: )?(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?"  # what vLLM and torch put before a traceback's lines
    r"(?:\w+\.)*(\w*(?:Error|Exception|Failed|Unsupported)\w*: \S.*)$"
)
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
_CONSEQUENCES = ("EngineDeadError", "Engine core initialization failed", "RuntimeError: cancelled", "WorkerProc init")


class HostMemory(threading.Thread):
    """The most host memory that was in use while a process ran, over what was in use before.

    Available memory of the whole machine, because memory that a driver locks is nobody's resident set: true on a
    machine that does nothing else.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.process, self.before = process, psutil.virtual_memory().available
        self.peak = 0

    def run(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, self.before - psutil.virtual_memory().available)
            time.sleep(SAMPLE_SECONDS)


def failure_reason(log: str, returncode: int) -> str:
    """One line that says why a process failed: the first error in its log that is no consequence of another."""
    for line in log.splitlines():
        match = _RAISED.match(line)
        if match and not any(consequence in match[1] for consequence in _CONSEQUENCES):
            return match[1]
    died = _DIED.search(log)
    if died:
        return died[0]
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    return f"ended with code {returncode} and no error in its log"


def run_task(
    specification: dict[str, Any], environment: dict[str, str], timeout: float, keep_log: Path | None = None
) -> dict[str, Any]:
    """Run a task of ``engine_run.py`` in a new process group; its result, or the reason why there is none.

    What it prints is written to ``keep_log`` and stays there, or is removed with the task.
    """
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        out, log = Path(scratch) / "result.json", keep_log or Path(scratch) / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, str(ENGINE_RUN), str(out)],
                stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **environment},
            )  # fmt: skip
        host = HostMemory(process)
        host.start()
        try:
            process.communicate(json.dumps(specification), timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not done after {timeout:.0f} s (--timeout)"}
        finally:
            stop_group(process)
        if process.returncode or not out.exists():
            return {"status": "failed", "reason": failure_reason(log.read_text(errors="replace"), process.returncode)}
        return {"status": "ok", "host_peak_bytes": host.peak, **json.loads(out.read_text())}


def stop_group(process: subprocess.Popen[str]) -> None:
    """End what a process has started and left behind, and it itself if it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended by itself
    process.wait()


class Benchmark:
    """The configurations of one run; rows are dictionaries of JSON values."""

    def __init__(self, options: argparse.Namespace, machine: dict[str, Any]) -> None:
        self.options = options
        self.cuda = "gpu" in machine["environment"]
        self.rows: list[dict[str, Any]] = []
        self.memory: dict[int, ExpertMemory] = {}

    def run(self) -> list[dict[str, Any]]:
        for size in self.options.cache_sizes:
            row = self._engine("cache", size, {"additional_config": {config_key("cache_size"): size}})
            if row["status"] == "ok":
                self.memory[size] = expert_memory(row["expert_cache"])
        for control in self.options.controls:
            name, _, backend = control.partition(":")
            arguments = {"moe_backend": backend} if backend else {}
            if name == "resident":
                self._engine(control, None, arguments)
                continue
            for size in self.options.cache_sizes:
                self._offloading(control, size, arguments)
        return self.rows

    def _offloading(self, control: str, size: int, arguments: dict[str, Any]) -> None:
        if not self.cuda:
            self._skip(control, size, "vLLM offloads from CUDA devices to their host; there is no such device here")
        elif size not in self.memory:
            self._skip(control, size, f"the cache of {size} did not run, so the memory to give is not known")
        else:
            offload = OFFLOADING[control.partition(":")[0]](self.memory[size])
            if offload is None:
                self._skip(control, size, f"all experts fit into the memory that a cache of {size} takes: see resident")
                return
            row = self._engine(control, size, arguments | offload)
            row["planned_resident_expert_bytes"] = control_resident_bytes(self.memory[size], offload)

    def _skip(self, control: str, size: int, reason: str) -> None:
        self._add({"configuration": control, "cache_size": size, "status": "not run", "reason": reason})

    def _engine(self, name: str, size: int | None, arguments: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        common: dict[str, Any] = {
            "max_model_len": options.prompt_tokens + options.new_tokens + 1,
            "max_num_seqs": max(options.batches),
            "enforce_eager": options.enforce_eager,
            "enable_prefix_caching": False,
            "language_model_only": True,
            "seed": 0,
        }
        if options.attention_backend:
            common["attention_backend"] = options.attention_backend
        if self.cuda:
            common["kv_cache_memory_bytes"] = round(options.kv_cache_gib * 2**30)
        specification = {
            "task": "engine", "cuda": self.cuda, "model": str(options.model), "cached": name == "cache",
            "engine": common | arguments, "repeats": options.repeats,
            "cases": [
                {"batch": batch, "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
                for batch in options.batches
            ],
        }  # fmt: skip
        routing = {ROUTING_VARIABLE: ROUTINGS[options.routing]}
        result = run_task(specification, routing, options.timeout, self._log_path(name, size))
        row = {"configuration": name, "cache_size": size, "engine": specification["engine"], **result}
        self._add(row)
        return row

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


def expert_memory(sizes: dict[str, Any]) -> ExpertMemory:
    """What a cache reports, as the planner of controls wants it."""
    total = sizes["layers"] * sizes["experts"] * sizes["record_bytes"]
    return ExpertMemory(sizes["layers"], total, sizes["slot_bytes"], sizes["staging_bytes"])


def whole_numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
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
    parser.add_argument("--new-tokens", type=int, default=64, help="decoding steps that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--controls", type=control_names,
        help=f"of {', '.join(CONTROLS)}, each with :BACKEND or without (default on a GPU: {GPU_CONTROLS})",
    )  # fmt: skip
    parser.add_argument("--routing", choices=sorted(ROUTINGS), default="model", help="who picks the experts")
    parser.add_argument("--attention-backend", help="vLLM's --attention-backend")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs and no torch.compile")
    parser.add_argument("--kv-cache-gib", type=float, default=4.0, help="the same for every configuration on a GPU")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one configuration")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what each engine prints, a file each, in DIR")
    parser.add_argument("--out", type=Path, help="write the result as JSON and a chart beside it")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    machine = run_task({"task": "probe"}, {}, options.timeout)
    if machine["status"] != "ok":
        raise SystemExit(f"throughput: the machine cannot be described: {machine['reason']}")
    benchmark = Benchmark(options, machine)
    if not benchmark.cuda and options.routing != "model" and not options.enforce_eager:
        raise SystemExit(
            f"throughput: --routing {options.routing} needs --enforce-eager on a CPU, where torch.compile would trace "
            "vLLM's routing simulator and cannot"
        )
    if options.controls is None:
        options.controls = control_names(GPU_CONTROLS) if benchmark.cuda else list(CONTROLS)
    result: dict[str, Any] = {
        "environment": machine["environment"],
        "link_bytes_per_second": machine["bytes_per_second"],
        "model": options.model.resolve().name,
        "routing": options.routing,
        "attention_backend": options.attention_backend or "vLLM's choice",
        "rows": benchmark.run(),
    }
    add_predictions(result)
    print_table(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        draw_chart(result, options.out.with_suffix(".png"))
    return int(not any(row["status"] == "ok" for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
