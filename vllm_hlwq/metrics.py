"""The expert cache's metrics: their names, and how they follow from the counters of the layers. Arithmetic only.

An engine can have several ranks, and what they report is added up. So a rank reports only what may be added: the ranks
of a tensor-parallel group hold parts of the same experts and decide alike, so one of them counts experts, and all count
the bytes that they copy. With expert or pipeline parallelism each rank has experts of its own, and counts them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .expert_cache import COUNTERS


@dataclass(frozen=True)
class Metric:
    """One metric, by the name that vLLM's naming gives it; a counter is exposed with ``_total`` appended."""

    name: str
    kind: str
    documentation: str

    @property
    def exposed_name(self) -> str:
        return f"{self.name}_total" if self.kind == "counter" else self.name


_PREFIX = "vllm:moe_expert_cache_"

QUERIES = Metric(f"{_PREFIX}queries", "counter", "Distinct experts that steps needed, summed over layers.")
HITS = Metric(f"{_PREFIX}hits", "counter", "Needed experts that were in a slot.")
EVICTIONS = Metric(f"{_PREFIX}evictions", "counter", "Experts that lost their slot to another.")
STAGED = Metric(f"{_PREFIX}staged", "counter", "Needed experts that were copied to a staging bank, not to a slot.")
H2D_BYTES = Metric(f"{_PREFIX}h2d_bytes", "counter", "Bytes of experts copied from host memory to devices, all ranks.")
WAVES = Metric(f"{_PREFIX}waves", "counter", "Sets of experts computed together, summed over layers.")
SLOTS = Metric(f"{_PREFIX}slots", "gauge", "Experts that the device can keep, summed over layers.")
USAGE = Metric(f"{_PREFIX}usage_perc", "gauge", "Share of the slots that hold an expert. 1 means 100 percent usage.")

METRICS = (QUERIES, HITS, EVICTIONS, STAGED, H2D_BYTES, WAVES, SLOTS, USAGE)

_COUNTED_EXPERTS = {QUERIES: "queries", HITS: "hits", EVICTIONS: "evictions", STAGED: "staged", WAVES: "waves"}


@dataclass(frozen=True)
class Layer:
    """What a rank knows of one of its layers.

    Attributes:
        name: vLLM's name of the layer.
        slots: experts that it keeps on the device.
        record_bytes: bytes of one expert on this rank.
        all_resident: whether the slots hold all experts, so that nothing is ever counted.
        seeded: slots that were filled before anything was counted.
    """

    name: str
    slots: int
    record_bytes: int
    all_resident: bool
    seeded: int = 0


@dataclass(frozen=True)
class Rank:
    """A rank's part in the sums of its engine.

    Attributes:
        counts_experts: whether it reports experts, or only the bytes that it copies.
        replicas: ranks that report a layer of the same name.
        engine_slots: slots of all ranks that count experts.
    """

    counts_experts: bool
    replicas: int
    engine_slots: int


def metric_values(
    layers: Sequence[Layer], counters: Sequence[Sequence[int]], rank: Rank, per_layer: bool
) -> dict[tuple[Metric, str], float]:
    """What a rank reports.

    Args:
        layers: the layers of the rank.
        counters: of each of them, in the order of ``COUNTERS``.
        rank: the rank.
        per_layer: whether layers are reported apart.

    Returns:
        Value by metric and layer; the layer is empty unless ``per_layer``.
    """
    found: dict[tuple[Metric, str], float] = defaultdict(int)
    for layer, row in zip(layers, counters, strict=True):
        label = layer.name if per_layer else ""
        usage_of = layer.slots * rank.replicas if per_layer else rank.engine_slots
        for metric, value in _layer_values(layer, dict(zip(COUNTERS, row, strict=True)), rank, usage_of):
            found[metric, label] += value
    return dict(found)


def _layer_values(layer: Layer, counts: dict[str, int], rank: Rank, usage_of: int) -> Iterator[tuple[Metric, float]]:
    yield H2D_BYTES, counts["copied"] * layer.record_bytes
    if not rank.counts_experts:
        return
    for metric, counter in _COUNTED_EXPERTS.items():
        yield metric, counts[counter]
    # An admitted expert fills a slot, and takes it from another only if that is evicted.
    used = layer.slots if layer.all_resident else layer.seeded + counts["admitted"] - counts["evictions"]
    yield SLOTS, layer.slots
    yield USAGE, used / usage_of
