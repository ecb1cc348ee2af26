"""The text that the tiny model is trained and judged on: what every Python installation ships.

Documents are the standard library's sources and the language reference in ``pydoc_data.topics``. One document in
twenty, chosen by a hash of its name, is held out, so training and evaluation agree without a list of files.
Test suites, bundled third-party code and generated tables (charmaps) are left out: they are long and say little.
"""

from __future__ import annotations

import hashlib
import runpy
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held-out"]

EXCLUDED_PARTS = frozenset({"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"})
HELD_OUT_ONE_IN = 20
REFERENCE_REPEATS = 3
"""How often training sees the language reference: prose is 5 % of the text, and continuations should read well."""


def split_of(name: str) -> Split:
    """Say which split the document called ``name`` belongs to."""
    digest = hashlib.sha256(name.encode()).digest()
    return "held-out" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def documents(split: Split, library: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` of each document of a split, in an order that is the same on every machine.

    Args:
        split: which split.
        library: the standard library's folder; by default that of the running Python.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if EXCLUDED_PARTS.intersection(relative.parts) or split_of(relative.as_posix()) != split:
            continue
        yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")
    for topic, text in sorted(runpy.run_path(str(library / "pydoc_data/topics.py"))["topics"].items()):
        name = f"topics/{topic}"
        if split_of(name) == split:
            for _ in range(REFERENCE_REPEATS if split == "train" else 1):
                yield name, text.strip() + "\n"
