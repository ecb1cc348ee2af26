"""What ``hlwq plan`` says of models that need not be there: their configurations alone, in a temporary folder.

    python benchmarks/sizing.py

Writes ``benchmarks/results/sizing.json``, which ``render.py`` makes the tables of ``docs/sizing.md`` of. No machine
changes a digit of it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from make_checkpoint import SHAPES, plan_checkpoint

from vllm_hlwq.gpus import GB, Gpu
from vllm_hlwq.planning import Plan, Settings

RESULT = Path(__file__).resolve().parent / "results/sizing.json"
MODELS = {"gemma-4-26b-a4b": "Gemma-4-26B-A4B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
SETTINGS = Settings(context=4096, max_num_seqs=16)
DETAILED = Gpu("12 GiB at 25 GB/s", 12 * 2**30, 25 * GB, "--link")
"""One GPU of which every part is shown."""


def report(shape: str) -> dict[str, Any]:
    """The plan of a model in INT4, from its ``config.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / shape
        folder.mkdir()
        _, _, config = plan_checkpoint(SHAPES[shape](None), folder)
        (folder / "config.json").write_text(json.dumps(config))
        return Plan(folder, SETTINGS).report(DETAILED)


def reports() -> dict[str, Any]:
    return {name: report(shape) for shape, name in MODELS.items()}


if __name__ == "__main__":
    RESULT.write_text(json.dumps(reports(), indent=2) + "\n")
