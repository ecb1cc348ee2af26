"""What ``engine_run.Engine`` times in an engine of this process, beside a log of that engine's steps, as JSON.

    python tests/timed_steps.py MODEL

A process of its own, because an engine in one keeps vLLM's process groups. Each step of the engine is logged as it
returns: when that was, and how many tokens each request has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from engine_run import Engine, measure

CHUNK, PROMPT = 16, 12
ARGUMENTS: dict[str, Any] = {
    "additional_config": {"moe_expert_cache_size": 4}, "enforce_eager": True, "max_model_len": 128,
    "max_num_batched_tokens": CHUNK, "max_num_seqs": 4, "enable_prefix_caching": False, "language_model_only": True,
}  # fmt: skip


def log_steps(engine: Engine, log: list[tuple[float, dict[str, int]]]) -> None:
    step = engine.llm.llm_engine.step

    def logged() -> Any:
        outputs = step()
        log.append((time.monotonic(), {each.request_id: len(each.outputs[0].token_ids) for each in outputs}))
        return outputs

    engine.llm.llm_engine.step = logged


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = Engine(sys.argv[1], True, ARGUMENTS)
    log: list[tuple[float, dict[str, int]]] = []
    engine.timed(engine.prompts("warm-up", 4, PROMPT), 3)
    log_steps(engine, log)
    found: dict[str, Any] = {}
    for name, count, tokens in (("four", 4, 20), ("short", 4, 3), ("alone", 1, 9), ("single", 1, 1)):
        log.clear()
        found[name] = asdict(engine.decoded(engine.prompts(name, count, PROMPT), tokens)) | {"log": list(log)}
    found["measured"] = measure(engine, 4, PROMPT, 19, 3)
    try:
        measure(engine, 4, PROMPT, 2, 1)
    except RuntimeError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
