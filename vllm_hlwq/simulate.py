"""What a cache of another size would have done with the routing of a trace: ``hlwq simulate``.

Every layer's steps go through ``SlotTable.plan_step``, the planner's own mirror, from empty slots as after start-up; so
hits are those of a server with that cache, not those of a model of it. What a server prefetches is not simulated: it
changes no hit, but may move experts that nobody needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from .belady import optimal_hits
from .errors import TraceError
from .expert_cache import SlotTable, is_prompt
from .trace import Trace, TraceLayer

COMPARED = ("steps", "queries", "hits", "admitted", "evictions", "staged")
"""Counters that a trace determines. ``waves`` and ``copied`` also depend on staging and prefetching."""


@dataclass
class Tally:
    """Experts needed, by fate, over some steps: hits of the planner, and of the optimum; and bytes over the link."""

    queries: int = 0
    hits: int = 0
    optimal_hits: int = 0
    bytes: int = 0
    optimal_bytes: int = 0

    def add(self, other: Tally) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def hit_rate(self) -> float:
        return self.hits / self.queries if self.queries else 0.0

    @property
    def optimal_hit_rate(self) -> float:
        return self.optimal_hits / self.queries if self.queries else 0.0

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"hit_rate": self.hit_rate, "optimal_hit_rate": self.optimal_hit_rate}


@dataclass(frozen=True)
class LayerReplay:
    """A layer under one number of slots.

    Attributes:
        counters: the planner's own, of ``COMPARED``.
        all: over every step.
        decode: over the steps that the planner does not take for a prompt (``is_prompt``).
    """

    name: str
    counters: dict[str, int]
    all: Tally
    decode: Tally


@dataclass(frozen=True)
class Replay:
    """A trace under one number of slots.

    Attributes:
        differences: counters of the recording server that the replay does not reproduce, as sentences; None where it
            had another number of slots or its counters are not in the trace.
    """

    slots: int
    layers: list[LayerReplay]
    differences: list[str] | None

    @property
    def all(self) -> Tally:
        return _sum(layer.all for layer in self.layers)

    @property
    def decode(self) -> Tally:
        return _sum(layer.decode for layer in self.layers)


def _sum(tallies: Iterator[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def replay(trace: Trace, slots: Sequence[int]) -> list[Replay]:
    """Run a trace through the planner once for each number of slots.

    Raises:
        TraceError: a number of slots is not from 1 to one less than the experts of each layer; or there is no step.
    """
    fewest = min(trace.header.layers, key=lambda layer: layer.experts)
    for count in slots:
        if not 1 <= count < fewest.experts:
            raise TraceError(
                f"--slots {count}: {fewest.name} has {fewest.experts} experts; give 1 to {fewest.experts - 1}, as with "
                "all of them resident nothing is planned"
            )
    if trace.num_steps == 0:
        raise TraceError("the trace has no steps: no request came while it was recorded")
    steps = [list(trace.steps_of(layer)) for layer in range(len(trace.header.layers))]
    work = [(count, layer) for count in slots for layer in range(len(steps))]
    bar = tqdm(work, desc="replaying", unit="layer", disable=None, leave=False)
    layers = [_replay_layer(trace.header.layers[layer], steps[layer], count) for count, layer in bar]
    found = []
    for number, count in enumerate(slots):
        of_count = layers[number * len(steps) : (number + 1) * len(steps)]
        found.append(Replay(count, of_count, _differences(trace, count, of_count)))
    return found


def _replay_layer(layer: TraceLayer, steps: Sequence[torch.Tensor], slots: int) -> LayerReplay:
    table = SlotTable(layer.experts, slots, layer.experts - slots, global_experts=layer.everywhere)
    needed = [torch.unique(ids[ids >= 0]).tolist() for ids in steps]
    best = optimal_hits(needed, slots)
    every, decode = Tally(), Tally()
    for ids, experts, most in zip(steps, needed, best, strict=True):
        plan = table.plan_step(ids)
        misses = len(plan.load_experts) + len(plan.staged)
        step = Tally(
            len(experts), len(experts) - misses, most, misses * layer.record_bytes,
            (len(experts) - most) * layer.record_bytes,
        )  # fmt: skip
        every.add(step)
        if not is_prompt(ids.numel(), layer.everywhere):
            decode.add(step)
    counts = table.counts()
    return LayerReplay(layer.name, {name: counts[name] for name in COMPARED}, every, decode)


def _differences(trace: Trace, slots: int, layers: Sequence[LayerReplay]) -> list[str] | None:
    live = trace.header.counters
    if live is None or trace.header.cache_size != slots:
        return None
    return [
        f"{layer.name}: {name} {live.get(layer.name, {}).get(name)} live, {count} simulated"
        for layer in layers
        for name, count in layer.counters.items()
        if live.get(layer.name, {}).get(name) != count
    ]


def tokens_of(trace: Trace) -> tuple[int, int]:
    """Tokens of a trace, and those of them in decode steps: rows of its first layer that name an expert."""
    first = trace.header.layers[0]
    every = decode = 0
    for ids in trace.steps_of(0):
        tokens = int((ids >= 0).any(1).sum())
        every += tokens
        decode += tokens * (not is_prompt(ids.numel(), first.everywhere))
    return every, decode


def parse_slots(text: str) -> list[int]:
    """Numbers of ``2,4,8``, ascending, each once.

    Raises:
        TraceError: the text is no list of whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= 40 for word in words):  # int() refuses thousands of digits
        raise TraceError(f"--slots {text}: not a list of whole numbers; give one like 2,4,8")
    return sorted({int(word) for word in words})


def report(trace: Trace, replays: Sequence[Replay], link: float | None, step_seconds: float = 0.0) -> dict[str, Any]:
    """All that is known of a replay, as JSON values.

    Args:
        trace: what was replayed.
        replays: of it.
        link: bytes per second from host to device; None leaves tokens per second out.
        step_seconds: of a decode step with every expert resident.
    """
    tokens, decode_tokens = tokens_of(trace)
    decode_steps = sum(not is_prompt(ids.numel(), trace.header.layers[0].everywhere) for ids in trace.steps_of(0))

    def per_second(transferred: int) -> float | None:
        if link is None or not decode_tokens:
            return None
        seconds = transferred / link + decode_steps * step_seconds
        return decode_tokens / seconds if seconds else None

    header = trace.header
    return {
        "model": header.model,
        "state": header.state,
        "recorded_slots": header.cache_size,
        "layers": [layer.model_dump() for layer in header.layers],
        "steps": trace.num_steps,
        "tokens": tokens,
        "decode_tokens": decode_tokens,
        "link_bytes_per_second": link,
        "resident_step_seconds": step_seconds,
        "slots": [
            {
                "slots": one.slots,
                "all": one.all.json() | {"bytes_per_token": one.all.bytes / max(tokens, 1)},
                "decode": one.decode.json()
                | {
                    "bytes_per_token": one.decode.bytes / max(decode_tokens, 1),
                    "tokens_per_second": per_second(one.decode.bytes),
                    "optimal_tokens_per_second": per_second(one.decode.optimal_bytes),
                },
                "agrees_with_the_server": None if one.differences is None else not one.differences,
                "layers": [
                    {"name": layer.name, "counters": layer.counters, "all": layer.all.json(),
                     "decode": layer.decode.json()}
                    for layer in one.layers
                ],
            }
            for one in replays
        ],
    }  # fmt: skip
