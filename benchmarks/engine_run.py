"""One engine in one process: starts it, measures prefill and decoding, and writes what it found as JSON.

    python benchmarks/engine_run.py RESULT.json [--import-first]

Run by ``engine_process.py``, which gives every configuration a process of its own: memory is clean, and a failure is
that process's. The specification is one line; when the engine has started, an empty file ``started`` lies beside the
result, and it is measured after another line. The process ends at the end of its input. Prompts are fixed token ids,
different for every repetition and equal for every configuration.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

WARM_UP_TOKENS = 3
FIRST_PLAIN_TOKEN = 3  # past padding, end and beginning


def gpu_memory(worker: Any) -> dict[str, int]:
    """Bytes on the worker's GPU: torch's peaks, and what is in use now by whatever process."""
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "in_use": total - free,
    }


@dataclass(frozen=True)
class Decoding:
    """Seconds that a number of steps took."""

    seconds: float
    steps: int


class Engine:
    """vLLM's offline engine with the counters of its expert cache, if it has one."""

    def __init__(self, model: str, cached: bool, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        start = time.perf_counter()
        # With statistics, so that a request's tokens have the engine's own times.
        self.llm = LLM(model, disable_log_stats=False, **arguments)
        self.start_up_seconds = time.perf_counter() - start
        self.cached = cached
        self.sizes = self.llm.collective_rpc("expert_cache_sizes")[0] if cached else None
        self.vocab_size = self.llm.llm_engine.model_config.get_vocab_size()

    def prompts(self, seed: str, count: int, tokens: int) -> list[dict[str, list[int]]]:
        draw = random.Random(seed)
        return [
            {"prompt_token_ids": [draw.randrange(FIRST_PLAIN_TOKEN, self.vocab_size) for _ in range(tokens)]}
            for _ in range(count)
        ]

    def counters(self) -> dict[str, int]:
        """Counters over all layers of the first rank, zero without a cache."""
        if not self.cached:
            return {}
        layers = list(self.llm.collective_rpc("expert_cache_counters")[0].values())
        return {name: sum(layer[name] for layer in layers) for name in layers[0]}

    def timed(self, prompts: list[dict[str, list[int]]], tokens: int) -> float:
        """Seconds to generate exactly ``tokens`` tokens for each prompt."""
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, greedy(tokens), use_tqdm=False)
        seconds = time.perf_counter() - start
        made = {len(output.outputs[0].token_ids) for output in outputs}
        if made != {tokens}:
            raise RuntimeError(f"asked for {tokens} tokens a prompt, the engine made {sorted(made)}")
        return seconds

    def decoded(
        self, prompts: list[dict[str, list[int]]], tokens: int, at_edge: Callable[[], None] = lambda: None
    ) -> Decoding:
        """Generate exactly ``tokens`` tokens for each prompt: the steps in which all of them were decoded.

        Those begin where the last prompt has its first token, and end where the first prompt is done: if that was
        before, there are none. Times are the engine's, which stamps a step's tokens when it has them. ``at_edge`` is
        called at both ends, or, if the engine schedules ahead, some steps later.

        Raises:
            RuntimeError: a prompt got another number of tokens, or not one in each step.
        """
        engine, made, times = self.llm.llm_engine, {}, {}
        names = [f"decoded {number}" for number in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, prompt, greedy(tokens))
        ahead, ended = None, False
        while engine.has_unfinished_requests():
            for output in engine.step():
                count = len(output.outputs[0].token_ids)
                if count > made.get(output.request_id, 0) + 1:
                    raise RuntimeError(f"a step made several tokens of {output.request_id}, so steps cannot be counted")
                made[output.request_id], times[output.request_id] = count, output.metrics
            if ahead is None and len(made) == len(names) and min(made.values()) > 0:
                ahead = max(made.values())
                at_edge()
            if ahead is not None and not ended and max(made.values()) == tokens:
                ended = True
                at_edge()
        if not ended or set(made.values()) != {tokens}:
            raise RuntimeError(f"asked for {tokens} tokens a prompt, the engine made {sorted(made.values())}")
        if any(each.num_preemptions for each in times.values()):
            raise RuntimeError(
                f"{len(prompts)} prompts and {tokens} tokens of each do not fit into the KV cache at once"
            )
        start = max(each.first_token_ts for each in times.values())
        return Decoding(min(each.last_token_ts for each in times.values()) - start, tokens - ahead)

    def counted(self, prompts: list[dict[str, list[int]]], tokens: int) -> dict[str, dict[str, int]]:
        """What the cache counts while the prompts are read, and in the steps in which all of them are decoded.

        An engine that schedules ahead may be some steps beyond an edge when it is asked; the steps that the cache
        counted say how many they are.
        """
        edges = [self.counters()]
        self.decoded(prompts, tokens, lambda: edges.append(self.counters()))
        return {"prefill": difference(edges[1], edges[0]), "decode": difference(edges[2], edges[1])}


def greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def difference(later: dict[str, int], earlier: dict[str, int]) -> dict[str, int]:
    return {name: amount - earlier[name] for name, amount in later.items()}


def measure(engine: Engine, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Prefill and decoding of one case: medians of seconds, and the counters of one request more.

    A request of one token is its prefill; it is timed whole. Decoding, if ``new_tokens`` is not 0, is a request of
    1 + ``new_tokens`` tokens from where all its prompts have one: its prefill is not in it.
    """
    case = f"{batch} {prompt_tokens}"
    engine.timed(engine.prompts(f"warm-up {case}", batch, prompt_tokens), WARM_UP_TOKENS)
    before = engine.counters()
    prefills, decodings = [], []
    for repeat in range(repeats):
        prompts = engine.prompts(f"{repeat} {case}", batch, prompt_tokens)
        prefills.append(engine.timed(prompts, 1))
        if new_tokens:
            decodings.append(engine.decoded(prompts, 1 + new_tokens))
    timed = difference(engine.counters(), before)
    prefill_seconds = median(prefills)
    figures = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "prefill_seconds_each": prefills,
        "prefill_seconds": prefill_seconds,
        "prefill_tokens_per_second": batch * prompt_tokens / prefill_seconds,
        **({"timed_misses": timed["queries"] - timed["hits"]} if timed else {}),
        **cache_figures(engine, engine.prompts(f"counted {case}", batch, prompt_tokens), new_tokens),
    }
    return figures | (decode_figures(decodings, batch, prompt_tokens) if new_tokens else {})


def decode_figures(decodings: list[Decoding], batch: int, prompt_tokens: int) -> dict[str, Any]:
    """Of steps of the whole batch, the middle repeat's."""
    if min(found.steps for found in decodings) < 1:
        raise RuntimeError(
            f"of {batch} prompts of {prompt_tokens} tokens the first was done before the last had begun, so no step "
            "decodes them all: measure with more --new-tokens"
        )
    each = [1e3 * found.seconds / found.steps for found in decodings]
    return {
        "timed_steps": [found.steps for found in decodings],
        "step_milliseconds_each": each,
        "step_milliseconds": median(each),
        "decode_tokens_per_second": 1e3 * batch / median(each),
    }


def cache_figures(engine: Engine, prompts: list[dict[str, list[int]]], new_tokens: int) -> dict[str, Any]:
    """Hit rates and bytes moved; nothing without a cache, no rate where all experts are resident."""
    if not engine.cached:
        return {}
    counts, layers = engine.counted(prompts, 1 + new_tokens), engine.sizes["layers"]
    prefill, decode = counts["prefill"], counts["decode"]
    figures = {
        "prefill_hit_rate": prefill["hits"] / prefill["queries"] if prefill["queries"] else None,
        "prefill_bytes": prefill["h2d_bytes"],
    }
    if not new_tokens:
        return figures
    steps = decode["steps"] / layers
    moved = decode["h2d_bytes"] / steps if steps else 0.0  # all resident: the cache counts no step
    return figures | {
        "decode_hit_rate": decode["hits"] / decode["queries"] if decode["queries"] else None,
        "decode_bytes_per_step": moved,
        "decode_bytes_per_token": moved / len(prompts),
        "counted_decode_steps": steps,
    }


def run(specification: dict[str, Any], started: Callable[[], None]) -> dict[str, Any]:
    """Start the specified engine, say so and wait, and measure it in all cases.

    Whether there is a GPU is in the specification: torch, asked here, would begin to use it, and vLLM forks.
    """
    if not specification["cuda"]:
        # Else the engine is ahead of this process by some steps when its counters are read.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = Engine(specification["model"], specification["cached"], specification["engine"])
    started()
    measurements = [measure(engine, **case, repeats=specification["repeats"]) for case in specification["cases"]]
    return {
        "start_up_seconds": engine.start_up_seconds,
        "expert_cache": engine.sizes,
        "gpu_memory": engine.llm.collective_rpc(gpu_memory)[0] if specification["cuda"] else None,
        "measurements": measurements,
    }


def probe(_: dict[str, Any], started: Callable[[], None]) -> dict[str, Any]:
    """The machine and its link, in a process that gives its GPU memory back."""
    from vllm_hlwq.bench import environment
    from vllm_hlwq.bench.link import host_to_device_bandwidth

    started()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"environment": environment.describe(), "bytes_per_second": host_to_device_bandwidth(device)}


def gather(specification: dict[str, Any], started: Callable[[], None]) -> dict[str, Any]:
    """The gather part of ``moe_layer.py`` for the shape that is specified."""
    from gather_link import measure as measure_gather

    from vllm_hlwq.bench.moe_shapes import SHAPES

    started()
    return measure_gather(SHAPES[specification["shape"]], swept=False, cuda_cpp=None)


TASKS = {"probe": probe, "engine": run, "gather": gather}


def main(out: Path) -> None:
    """Do the task of the first line; measure after the second; end when there will be no more."""

    def started() -> None:
        out.with_name("started").touch()
        if not sys.stdin.readline():
            raise SystemExit("ended before it was measured")

    given = json.loads(sys.stdin.readline() or "null")
    if given is None:  # it was prepared in vain
        return
    result = TASKS[given["task"]](given, started)
    unfinished = out.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(out)
    sys.stdin.read()


if __name__ == "__main__":
    if "--import-first" in sys.argv:  # while another engine is measured, for instance
        import vllm  # noqa: F401
    main(Path(sys.argv[1]))
