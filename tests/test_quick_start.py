"""The commands for cards of 12, 16 and 24 GB find room there, by the plan that ``auto`` makes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import sizing

PROJECT = Path(__file__).resolve().parent.parent
CARD = re.compile(r"^## A card of (\d+) GB$(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^vllm serve (?:.*\\\n)*.*$", re.MULTILINE)
PLANNED = {
    "--max-model-len": "context",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--moe-expert-kv-floor-seqs": "kv_floor_seqs",
}
"""Flags that take a number which the plan knows, with its name there."""
COMMANDS = {
    int(memory): COMMAND.findall(section)
    for memory, section in CARD.findall((PROJECT / "docs/quickstart.md").read_text())
}
SLOTS = """
import json, sys, tempfile
from pathlib import Path
from make_checkpoint import SHAPES, plan_checkpoint
from vllm_hlwq.gpus import GB, Gpu
from vllm_hlwq.planning import Plan, Settings
shape, memory, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
with tempfile.TemporaryDirectory() as folder:
    config = plan_checkpoint(SHAPES[shape](None), Path(folder))[2]
    Path(folder, "config.json").write_text(json.dumps(config))
    print(Plan(Path(folder), Settings(**settings)).on(Gpu("", memory * 2**30, 25 * GB, ""))["slots"])
"""


def test_there_is_a_command_for_each_card() -> None:
    assert {memory: len(found) for memory, found in COMMANDS.items()} == {12: 1, 16: 1, 24: 1}


@pytest.mark.parametrize("memory", COMMANDS)
@pytest.mark.parametrize("shape", sizing.MODELS)
def test_an_eighth_of_the_experts_and_more_fit(shape: str, memory: int) -> None:
    words = COMMANDS[memory][0].replace("\\\n", " ").split()
    settings = {PLANNED[flag]: int(value) for flag, value in pairwise(words) if flag in PLANNED}
    assert words[2:5] == ["MODEL-CT", "--moe-expert-cache-size", "auto"]
    assert {"context", "max_num_seqs"} <= settings.keys()
    # In a process of its own: vLLM's fallback to transformers, once used, changes transformers' model classes.
    done = subprocess.run(
        [sys.executable, "-c", SLOTS, shape, str(memory), json.dumps(settings)],
        cwd=Path(sizing.__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 16
