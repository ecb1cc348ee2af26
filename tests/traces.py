"""Traces made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_hlwq.routing_log import RoutingLog
from vllm_hlwq.trace import Header, Trace, TraceLayer

RECORD_BYTES = 1000


def header(layers: Sequence[tuple[int, int]], **fields: Any) -> Header:
    """Of layers of (experts, top-k)."""
    made = tuple(
        TraceLayer(name=f"layer.{number}", experts=experts, top_k=top_k, record_bytes=RECORD_BYTES)
        for number, (experts, top_k) in enumerate(layers)
    )
    known = {"state": "ended", "model": "made-up", "vllm": "0", "rank": 0, "backend": "none", "cache_size": 1}
    return Header(layers=made, **(known | fields))


def trace(head: Header, steps: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> Trace:
    """Of steps (layer, rows of expert ids), in the order of time."""
    log = RoutingLog(head.layers)
    for layer, rows in steps:
        assert log.add_step(layer, torch.tensor(rows, dtype=torch.int32).view(len(rows), head.layers[layer].top_k))
    return log.trace(head)


def equal(a: Trace, b: Trace) -> bool:
    columns = ("step", "layer", "tokens", "expert_ids")
    return a.header == b.header and all(
        getattr(a, name).dtype == getattr(b, name).dtype and np.array_equal(getattr(a, name), getattr(b, name))
        for name in columns
    )
