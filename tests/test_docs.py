"""Documents say what is true: figures come from result files, every file is on the map, nothing local leaked in."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import render

from vllm_hlwq.metrics import METRICS
from vllm_hlwq.options import ExpertCacheOptions, flag

PROJECT = Path(__file__).parent.parent


def test_the_documents_are_fresh_renderings_of_the_results() -> None:
    texts = [path.read_text() for path in render.DOCUMENTS]
    assert {match["name"] for text in texts for match in render.BLOCK.finditer(text)} == set(render.RENDERERS)
    assert [render.render(text) for text in texts] == texts


def test_the_architecture_names_every_module() -> None:
    text = (PROJECT / "docs/architecture.md").read_text()
    modules = {path.name for path in (PROJECT / "vllm_hlwq").glob("*.py")} - {"__init__.py"}
    assert modules == set(re.findall(r"`(\w+\.py)`", text[text.index("## Which file") : text.index("## Fitting")]))


def test_the_readme_names_every_flag() -> None:
    text = (PROJECT / "README.md").read_text()
    assert all(flag(name) in text for name in ExpertCacheOptions.model_fields)


def test_the_metrics_page_lists_the_metrics() -> None:
    rows = re.findall(r"^\| `(vllm:\w+)` \| (\w+) \| (.*) \|$", (PROJECT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert rows == [(metric.exposed_name, metric.kind, metric.documentation) for metric in METRICS]


def test_no_path_of_a_build_machine_is_in_the_tree() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(work|root|home/\w+)/")
    found = [
        name
        for name in files
        if not name.endswith((".safetensors", ".png")) and pattern.search((PROJECT / name).read_text())
    ]
    assert found == ["tests/test_docs.py"] or found == []
