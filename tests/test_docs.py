"""Documents say what is true: figures come from result files, every file is on the map, nothing local leaked in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def test_the_readme_and_the_page_of_flags_name_every_flag() -> None:
    readme, page = ((PROJECT / name).read_text() for name in ("README.md", "docs/flags.md"))
    assert all(flag(name) in readme for name in ExpertCacheOptions.model_fields)
    rows = re.findall(r"^\| `(--moe-expert-[a-z-]+)[ `].*\|.*\|.*\|$", page, re.MULTILINE)
    assert sorted(rows) == sorted(flag(name) for name in ExpertCacheOptions.model_fields)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    pages = {path.stem for path in (PROJECT / "docs").glob("*.md")}
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} == pages - {"index"}
    # Nothing is loaded from another host.
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?://", page.read_text()), page.name


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
