"""Soak test: load on a server with the expert cache, then faults, and what must hold all the while.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--out benchmarks/results/soak.json]

The tiny model that ships, decoded, with 4 of 16 experts in slots, on this machine's processor and over the loopback
interface. Clients stream, leave, abort, send long prompts and bursts; meanwhile slot tables, counters and the bytes in
slots are audited. Then that server is told to end, and another loses a process, each in the middle of streams; stock
vLLM goes through the same. What clients heard is compared with a transcript made before the load, and stock vLLM judges
the transcript and all that differs from it. Exit code 1 if anything does not hold.

All in float32: in 16 bit, batches change the rounding of vLLM's own layers, and where two experts are nearly tied in a
router another one is chosen, which can move a token by half a nat. That happens to stock vLLM as well, and would hide
what is looked for here. In float32 it does not happen, so a token that is not in the transcript means something.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soak_checks import (
    Verdict,
    faults_of_counters,
    faults_of_ends,
    faults_of_memory,
    judge,
    settled,
    transcript,
    unlike,
)
from soak_faults import FAULTS, Fault, more_than_stock, own_temporary_folder, strike
from soak_load import Heard, Load, Prompt
from soak_processes import MemoryWatch
from transformers import AutoTokenizer

from vllm_hlwq.bench.environment import describe
from vllm_hlwq.bench.server import Server
from vllm_hlwq.checkpoint.dequantize import dequantize, open_source

PROJECT = Path(__file__).resolve().parent.parent
sys.path.append(str(PROJECT / "examples/tiny_moe"))

from corpus import documents  # noqa: E402 - the tiny model's own module, beside its recipe

SHIPPED = PROJECT / "examples/tiny_moe/model"
# Few blocks, so that bursts and long prompts push each other out of the KV cache.
ARGUMENTS = (
    "--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "512", "--num-gpu-blocks-override",
    "24", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager",
)  # fmt: skip
CACHE = ("--moe-expert-cache-size", "4")
SHORT_PROMPTS, LONG_PROMPTS, LASTING_PROMPTS = 16, 4, 4
LASTING_TOKENS = 200
AUDIT_SECONDS = 5
FAULT_TOKENS = 900
STREAM_TRANSCRIPT = 100
"""More than a stream has said when the fault comes; what goes beyond is put to the judge."""


def make_prompts(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Beginnings of held-out documents: short ones, and ones of several prefill chunks' length."""
    chance = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    held_out = [tokenizer.encode(text[:6000]) for _, text in documents("held-out")]
    beginnings = chance.sample([ids for ids in held_out if len(ids) >= 120], SHORT_PROMPTS)
    passages = chance.sample([ids for ids in held_out if len(ids) >= 950], LONG_PROMPTS)
    short = [Prompt(tuple(ids[: chance.randint(4, 120)]), 32) for ids in beginnings]
    return short, [Prompt(tuple(ids[: chance.randint(600, 950)]), 12) for ids in passages]


class Auditor:
    """Asks the engine every few seconds what is wrong with its caches, until it is stopped."""

    def __init__(self, server: Server) -> None:
        self.audits, self.faults = 0, []
        self._server = server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(AUDIT_SECONDS):
            (faults,) = self._server.post("/collective_rpc", {"method": "expert_cache_faults"})["results"]
            self.faults += faults
            self.audits += 1

    def stop(self) -> dict[str, Any]:
        self._stopping.set()
        self._thread.join()
        return {"audits": self.audits, "faults": self.faults}


def loaded(server: Server, short: Sequence[Prompt], long: Sequence[Prompt], minutes: float, seed: int) -> Any:
    """Load a server, and check what can be checked without a judge.

    Returns:
        Findings, the transcript of the server before the load, and what clients heard.
    """
    lasting = [Prompt(prompt.ids, LASTING_TOKENS) for prompt in short[:LASTING_PROMPTS]]
    reference = transcript(server, [*short, *long, *lasting])
    alone = [Heard(prompt, tokens, "length") for prompt, tokens in reference.items()]
    load = Load(server.url, short, long, lasting, seed)
    memory, auditor = MemoryWatch(server, min(2.0, minutes * 60 / 30)), Auditor(server)
    load.run(minutes * 60)
    audits, grown = auditor.stop(), memory.stop()
    metrics = settled(server)
    (sizes,) = server.post("/collective_rpc", {"method": "expert_cache_sizes"})["results"]
    counters = server.expert_cache_counters()
    kept = ("queries", "hits", "admitted", "evictions", "staged", "waves", "h2d_bytes")
    findings = {
        "requests": load.kinds,
        "ends": dict(Counter(one.end for one in load.heard)),
        "preemptions": int(metrics["vllm:num_preemptions_total"]),
        "counters": {name: counters[name] for name in kept},
        "audits": audits["audits"],
        "memory": grown,
        "problems": [
            *audits["faults"],
            *([] if audits["audits"] else ["no audit was made"]),
            *faults_of_ends(load.heard),
            *faults_of_counters(metrics, counters, sizes, [*alone, *load.heard]),
            *faults_of_memory(grown, minutes),
        ],
    }
    return findings, reference, load.heard


def suffer(
    model: Path, arguments: Sequence[str], fault: str, stream: Prompt, before: Callable[[Server], None]
) -> tuple[Fault, list[Heard]]:
    """Start a server, do something with it, and let a fault happen to it."""
    with own_temporary_folder() as folder, Server(model, *arguments) as server:
        before(server)
        return strike(server, fault, stream, folder)


def soak(model: Path, minutes: float, seed: int, names: Sequence[str] = tuple(FAULTS)) -> dict[str, Any]:
    """Everything, as JSON values; ``problems`` is empty if all holds.

    Args:
        model: a checkpoint that stock vLLM can serve too.
        minutes: of load.
        seed: of prompts and load.
        names: of the faults.
    """
    begun = time.monotonic()
    short, long = make_prompts(seed)
    stream = Prompt(short[0].ids, FAULT_TOKENS)
    findings: dict[str, Any] = {}
    reference: dict[Prompt, tuple[int, ...]] = {}
    heard: list[Heard] = []
    verdicts: list[Verdict] = []

    def load_once(server: Server) -> None:
        if not findings:
            found, said, clients = loaded(server, short, long, minutes, seed)
            findings.update(found)
            (beginning,) = transcript(server, [Prompt(stream.ids, STREAM_TRANSCRIPT)]).values()
            reference.update(said | {stream: beginning})
            heard.extend(clients)

    def judge_once(server: Server) -> None:
        if not verdicts:
            verdicts.append(judge([*reference.items(), *different], server))

    ours = {}
    for name in names:
        ours[name], until_then = suffer(model, [*ARGUMENTS, *CACHE], name, stream, load_once)
        heard += until_then
    different = unlike(heard, reference)
    stock = {name: suffer(model, ARGUMENTS, name, stream, judge_once)[0] for name in names}
    (verdict,) = verdicts
    spoken = [one for one in heard if one.tokens]
    problems = [
        *findings.pop("problems"),
        *(problem for name in names for problem in more_than_stock(ours[name], stock[name])),
        *([f"{verdict.wrong} wrong tokens"] if verdict.wrong else []),
    ]
    return {
        "load_minutes": minutes,
        "total_minutes": round((time.monotonic() - begun) / 60, 1),
        "seed": seed,
        "arguments": [*ARGUMENTS, *CACHE],
        **findings,
        "tokens": {
            "sequences": len(spoken),
            "tokens": sum(len(one.tokens) for one in spoken),
            "unlike_transcript": len(different),
            "judged": asdict(verdict),
        },
        "faults": [{"ours": asdict(ours[name]), "stock": asdict(stock[name])} for name in names],
        "problems": problems,
        "environment": describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of load; starting, judging and faults come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks/results/soak.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        dequantize(open_source(SHIPPED), model)
        result = soak(model, arguments.minutes, arguments.seed)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["problems"], indent=2) if result["problems"] else "everything holds")
    raise SystemExit(bool(result["problems"]))


if __name__ == "__main__":
    main()
