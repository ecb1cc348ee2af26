"""The trace that ships: the documents' figures and chart are what it gives today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import routing_traces
from matplotlib.image import imread

from vllm_hlwq.trace import Trace

RESULT = json.loads(routing_traces.RESULT.read_text())


@pytest.fixture(scope="module")
def shipped() -> Trace:
    return Trace.load(routing_traces.SHIPPED)


def test_it_replays_to_the_counters_of_the_server_that_recorded_it(shipped: Trace) -> None:
    assert shipped.header.state == "ended"
    found = routing_traces.against_the_server(shipped)
    assert found["differences"] == []
    assert found["live_hits"] == found["simulated_hits"] > 0
    assert found in RESULT["live"]


def test_the_results_are_what_a_replay_gives(shipped: Trace) -> None:
    found = routing_traces.curves(shipped)
    assert json.loads(json.dumps(routing_traces.summary(found))) == RESULT["slots"]
    assert (found["tokens"], found["decode_tokens"]) == (RESULT["tokens"], RESULT["decode_tokens"])
    assert Path(routing_traces.SHIPPED).stat().st_size == RESULT["file_bytes"] < 200_000


def test_it_has_prompts_that_stream_and_decoding(shipped: Trace) -> None:
    rows = shipped.tokens[shipped.layer == 0]
    assert rows.min() == 1
    assert rows.max() > 100


def test_the_chart_is_in_the_documents() -> None:
    assert f"({routing_traces.CHART.name})" in (routing_traces.PROJECT / "docs/traces.md").read_text()
    assert imread(routing_traces.CHART).std() > 0.05
