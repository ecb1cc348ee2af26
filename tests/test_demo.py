"""The demo as a user runs it: it serves, chats, prints what the cache did, and leaves no server behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples/demo.py"


@pytest.mark.server
def test_the_demo_prints_text_and_counters_and_stops_its_server() -> None:
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    text = done.stdout[done.stdout.index("The for statement is used to iterate over") :]
    assert len(re.findall(r"[A-Za-z]{3,}", text.partition("Expert cache over")[0])) > 20
    last = done.stdout.strip().splitlines()[-1]
    needed, hits, misses = (
        int(n) for n in re.search(r"(\d+) experts needed, (\d+) hits .*, (\d+) misses", last).groups()
    )
    assert needed == hits + misses
    assert hits > 0
    assert misses > 0
    assert last.endswith("Server stopped.")
    processes = subprocess.run(["pgrep", "-f", f"vllm serve {DEMO.parent}"], capture_output=True)
    assert processes.returncode == 1, "a server of the demo is still running"
