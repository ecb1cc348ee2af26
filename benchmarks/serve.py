"""``vllm serve`` with the expert cache and with all experts resident, each under ``vllm bench serve``.

    python benchmarks/serve.py --model MODEL --cache-sizes 32,64 --out RESULT.json -- SERVER ARGUMENTS

Servers are measured one after the other: the cache at each size, then stock vLLM, which also judges the greedy tokens
of all of them. They start one after the other too, or all at once (``--start-together``), which is faster where each
gets a share of the GPU (``--gpu-memory-utilization``). Around each run of the benchmark ``/metrics`` and the worker's
counters are read, and what they grew by must be what the benchmark saw. A server that fails is a row that says why.

What stands after ``--`` goes to every server and wins over what is set here. On a GPU the resident server runs on
Marlin, whose kernels the cache uses. Works with one GPU: counters are those of one worker.

The exit code is 0 if every server ran and every check was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_process import BenchmarkFailed, BenchProcess
from engine_process import failure_reason, run_task, shared_processors
from rich.console import Console
from rich.table import Table
from serve_checks import (
    Check,
    cache_checks,
    cache_figures,
    difference,
    shift_figures,
    token_checks,
    token_figures,
    traffic_checks,
)
from serve_client import (
    COPIES,
    SERVED_NAME,
    Load,
    Reading,
    Spoken,
    TextLogprobs,
    greedy,
    judged,
    read_texts,
    warm_up,
)
from throughput import ROUTINGS, whole_numbers

from vllm_hlwq.atomic_file import replacing
from vllm_hlwq.bench.prompts import PROMPTS
from vllm_hlwq.bench.server import Server, ServerFailed
from vllm_hlwq.options import flag
from vllm_hlwq.plugin import ROUTING_VARIABLE

MIB = 2**20
SHORT, SLACK = 128, 64
"""Tokens that greedy requests fit into, and room for prompts that the benchmark makes longer than it was asked to."""
SIMULATED = "vLLM's simulator picks the experts at random, so tokens say nothing; --routing model compares them"
ENDING_SECONDS = 5
_REFUSED = re.compile(r"^vllm(?: serve)?: error: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Planned:
    """A server to be measured: its name, the cache's size, its checkpoint, and what it alone is told."""

    name: str
    size: int | None
    model: Path
    arguments: tuple[str, ...]


@dataclass
class Benchmark:
    """The servers of one run.

    Attributes:
        bench: runs vLLM's benchmark.
        result: JSON values, true of what was measured so far.
        spoken: greedy tokens of each server by its name.
        read: what each server says of the fixed texts, by its name.
    """

    options: argparse.Namespace
    bench: BenchProcess
    result: dict[str, Any]
    spoken: dict[str, list[Spoken]] = field(default_factory=dict)
    read: dict[str, TextLogprobs] = field(default_factory=dict)

    def run(self) -> None:
        """Measure all servers; they end when they have been measured, and at the latest when this does."""
        options = self.options
        backend = ("--moe-backend", "marlin") if "gpu" in self.result["environment"] else ()
        planned = [
            Planned(f"cache of {size}", size, options.model, (flag("cache_size"), str(size)))
            for size in options.cache_sizes
        ] + [Planned("resident", None, options.resident_model or options.model, backend)]
        together = shared_processors(len(planned)) if options.start_together and backend else {}
        with ExitStack() as stack:
            started = {each: self.start(each, stack, together) for each in planned if options.start_together}
            for each in planned:
                self.serve(each, *(started.get(each) or self.start(each, stack, together)))
        self.result["complete"] = True
        self.save()

    def start(
        self, planned: Planned, stack: ExitStack, processors: dict[str, str]
    ) -> tuple[Server, Callable[[], object]]:
        """Start a server, which ends with ``stack`` or when the function is called that comes with it."""
        environment = {ROUTING_VARIABLE: ROUTINGS[self.options.routing]} | processors
        words = (*common_arguments(self.options), *planned.arguments, *self.options.server_arguments)
        server, own = Server(planned.model, *words, environment=environment), ExitStack()
        own.callback(self.put_away, server, planned.name)
        stack.push(own)
        return server, own.close

    def serve(self, planned: Planned, server: Server, end: Callable[[], object]) -> None:
        """Measure one server and end it: a row, and checks."""
        name = planned.name
        row: dict[str, Any] = {
            "server": name, "cache_size": planned.size, "status": "failed", "measurements": [],
            "command": [word.replace(str(planned.model), planned.model.name) for word in server.command[1:]],
        }  # fmt: skip
        checks: list[Check] = []
        begun = time.monotonic()
        try:
            server.wait_until_healthy()
            row["start_up_seconds"] = None if self.options.start_together else time.monotonic() - begun
            self.measure(server, row, checks)
            row["status"] = "ok"
        except (ServerFailed, BenchmarkFailed, OSError) as error:
            row["reason"] = reason_of(error, server)
        finally:
            end()
        row["seconds"] = time.monotonic() - begun
        checks.append(Check(f"{name}: serves", row["status"] == "ok", row.get("reason", "all was measured")))
        self.result["servers"].append(row)
        self.result["checks"] += [vars(check) for check in checks]
        print(f"{name}: {row['status']} in {row['seconds']:.0f} s {row.get('reason', '')}", flush=True)
        self.save()

    def measure(self, server: Server, row: dict[str, Any], checks: list[Check]) -> None:
        name = row["server"]
        if row["cache_size"] is not None:
            (row["expert_cache"],) = server.post("/collective_rpc", {"method": "expert_cache_sizes"})["results"]
        if self.options.routing == "model":
            self.spoken[name], self.read[name] = greedy(server), read_texts(server)
            if row["cache_size"] is None:
                checks += self.judge(server)
        for concurrency in self.options.concurrency:
            row["measurements"].append(self.load(server, row, concurrency, checks))

    def load(self, server: Server, row: dict[str, Any], concurrency: int, checks: list[Check]) -> dict[str, Any]:
        """One run of the benchmark, with what grew on the server's side while it ran."""
        options, cache = self.options, row.get("expert_cache")
        requests = concurrency * options.prompts_per_client
        where = f"{row['server']}, {concurrency} at once"
        warm_up(server, concurrency, options.input_tokens, options.output_tokens)
        before = Reading.of(server, cache is not None)
        load = Load(options.model, concurrency, requests, options.input_tokens, options.output_tokens, options.timeout)
        found = load.run(self.bench, server, self.log_path(f"{row['server']} bench {concurrency}"))
        after = Reading.of(server, cache is not None)
        metrics = difference(after.metrics, before.metrics)
        checks += traffic_checks(where, found, metrics, requests, options.output_tokens)
        figures: dict[str, Any] = {"concurrency": concurrency, **found}
        if cache is not None:
            counters = difference(after.counters, before.counters)
            resident = cache["slots"] == cache["experts"]
            checks += cache_checks(where, metrics, counters, cache["record_bytes"], resident)
            figures |= cache_figures(counters, found["total_output_tokens"])
        return figures

    def judge(self, server: Server) -> list[Check]:
        """The resident server's word on all greedy tokens and on what was read of the fixed texts, its own too."""
        tokens, wanted = self.result["tokens"], self.read["resident"].alone
        for name, sequences in self.spoken.items():
            found = self.read[name]
            # Its own texts, read alone, are what all is compared with.
            readings = [found.at_once] if name == "resident" else [found.alone, found.at_once]
            tokens["servers"][name] = {
                **token_figures(judged(server, sequences)),
                "distinct": len({token for one in sequences for token in one.tokens}),
                **shift_figures([value for reading in readings for value in reading], wanted * len(readings)),
            }
        own = tokens["servers"]["resident"]
        others = {name: found for name, found in tokens["servers"].items() if found is not own}
        return [check for name, found in others.items() for check in token_checks(name, found, own)]

    def log_path(self, name: str) -> Path | None:
        logs: Path | None = self.options.logs
        return logs and logs / f"{name.replace(' ', '_')}.log"

    def put_away(self, server: Server, name: str) -> None:
        """End a server and keep its log, if logs are kept."""
        server.stop()
        if (log := self.log_path(name)) is not None:
            shutil.copy(server.log_path, log)
        server.log_path.unlink()

    def save(self) -> None:
        if self.options.out is not None:
            with replacing(self.options.out) as file:
                os.write(file, (json.dumps(self.result, indent=2) + "\n").encode())


def common_arguments(options: argparse.Namespace) -> list[str]:
    """Of every server."""
    length = max(options.input_tokens + options.output_tokens, SHORT) + SLACK
    return [
        "--served-model-name", SERVED_NAME, "--max-model-len", str(length), "--seed", "0",
        "--max-num-seqs", str(max(*options.concurrency, COPIES * len(PROMPTS))), "--no-enable-prefix-caching",
    ]  # fmt: skip


def reason_of(error: Exception, server: Server) -> str:
    """One line: what the server's log says if it has ended, else what went wrong with it."""
    with suppress(subprocess.TimeoutExpired):  # it serves on
        server.process.wait(ENDING_SECONDS)
        refused = _REFUSED.search(server.log)
        reason = refused[1] if refused else failure_reason(server.log, server.process.returncode)
        return reason if isinstance(error, ServerFailed) else f"the server ended while it was measured: {reason}"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def print_table(result: dict[str, Any]) -> None:
    """A line for each server and concurrency, one for each server's tokens, and one for each check."""
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(
        "server", "clients", "output tok/s", "TTFT ms", "TPOT ms", "hits", "MiB/token",
        title=f"{result['model']} on {result['environment']['device']}, routing: {result['routing']}, medians of "
        f"{result['input_tokens']} + {result['output_tokens']} tokens",
    )  # fmt: skip
    for row in result["servers"]:
        for found in row["measurements"]:
            rate, moved = found.get("hit_rate"), found.get("bytes_per_generated_token")
            table.add_row(
                row["server"], str(found["concurrency"]), f"{found['output_throughput']:,.1f}",
                f"{found['median_ttft_ms']:,.1f}", f"{found['median_tpot_ms']:,.2f}",
                "" if rate is None else f"{rate:.1%}", "" if moved is None else f"{moved / MIB:,.2f}",
            )  # fmt: skip
        if "reason" in row:
            table.add_row(row["server"], row["status"])
    console.print(table)
    if not result["tokens"]["compared"]:
        console.print(f"tokens are not compared: {result['tokens']['why']}", markup=False, soft_wrap=True)
    for check in result["checks"]:
        kept = "kept" if check["kept"] else "NOT KEPT"
        console.print(f"{kept}: {check['what']} ({check['detail']})", markup=False, highlight=False, soft_wrap=True)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder, with a tokenizer")
    parser.add_argument(
        "--resident-model", type=Path, help="what stock vLLM serves instead: it has no INT4 kernel for most CPUs"
    )
    parser.add_argument("--cache-sizes", type=whole_numbers, required=True, help="experts resident per layer: 32,64")
    parser.add_argument("--concurrency", type=whole_numbers, default=[1, 8, 32], help="clients at once (1,8,32)")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prompts-per-client", type=int, default=4)
    parser.add_argument(
        "--start-together", action="store_true", help="start all servers at once; start-up stays unknown"
    )
    parser.add_argument("--routing", choices=sorted(ROUTINGS), default="model", help="who picks the experts")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run of the benchmark")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what servers and benchmarks print in DIR")
    parser.add_argument("--out", type=Path, help="write the result as JSON, anew after each server")
    parser.add_argument("server_arguments", nargs="*", help="after --: for every server")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    machine = run_task({"task": "probe"}, {}, options.timeout)
    if machine["status"] != "ok":
        raise SystemExit(f"serve: the machine cannot be described: {machine['reason']}")
    simulated = options.routing != "model"
    if simulated and "gpu" not in machine["environment"] and "--enforce-eager" not in options.server_arguments:
        raise SystemExit(f"serve: --routing {options.routing} on a CPU needs --enforce-eager after --")
    for folder in filter(None, (options.logs, options.out and options.out.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "environment": machine["environment"],
        "link_bytes_per_second": machine["bytes_per_second"],
        "model": options.model.resolve().name,
        "routing": options.routing,
        "input_tokens": options.input_tokens,
        "output_tokens": options.output_tokens,
        "prompts_per_client": options.prompts_per_client,
        "started_together": options.start_together,
        "server_arguments": options.server_arguments,
        "complete": False,
        "servers": [],
        "tokens": {"compared": False, "why": SIMULATED} if simulated else {"compared": True, "servers": {}},
        "checks": [],
    }
    bench = BenchProcess()
    try:
        Benchmark(options, bench, result).run()
    finally:
        bench.stop()
    print_table(result)
    return int(not all(check["kept"] for check in result["checks"]))


if __name__ == "__main__":
    raise SystemExit(main())
