"""The progress bar: rate and time left on a terminal, within a parameter too; nothing where nobody sees it."""

from __future__ import annotations

import io
import os
import pty
import re
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_hlwq.checkpoint.conversion import plain_group, run_with_progress
from vllm_hlwq.checkpoint.shard import Group
from vllm_hlwq.checkpoint.sources import PlainSource
from vllm_hlwq.checkpoint.writer import FolderWriter

PIECES = 8
TICKS = threading.Event()
"""Never set: waited for, so that the bar's clock goes on between pieces."""


def convert(source: PlainSource, out: Path) -> None:
    """Copy one parameter in pieces that come slowly enough to be seen."""
    writer = FolderWriter(out, {}, [plain_group(source, "weight")])

    def produce(group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        for piece in source.rows("weight", 0, 64).chunk(PIECES):
            TICKS.wait(0.12)
            yield group.parameter, piece

    run_with_progress(writer, source, produce, "copying")


@pytest.fixture
def source(tmp_path: Path) -> PlainSource:
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.ones(64, 1024, dtype=torch.bfloat16)}, tmp_path / "model/model.safetensors")
    return PlainSource(tmp_path / "model")


def test_a_terminal_shows_rate_and_time_left(
    source: PlainSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        convert(source, tmp_path / "out")
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how a terminal ends on Linux
        os.close(ours)
    updates = [line for line in shown.decode().split("\r") if line.startswith("copying")]
    percents = {int(match[1]) for line in updates if (match := re.search(r"(\d+)%", line))}
    assert {0, 100} < percents, "the bar moves before its one parameter is done"
    under_way = [line for line in updates if re.search(r"[\d.]+k?/131k \[00:0\d<00:0\d, *[\d.]+[kM]B/s\]", line)]
    assert len(under_way) > 2, updates


def test_nothing_is_shown_where_nobody_sees_it(
    source: PlainSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    convert(source, tmp_path / "out")
    assert log.getvalue() == ""
