"""Settings of vLLM's own offloading that leave as many bytes of experts on the GPU as an expert cache takes there.

Planning only. What the cache takes is its slots and its staging bank; the KV cache is given the same size in every
configuration, and everything else on the GPU is the same model, so equal expert bytes are equal GPU memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREFETCH_BUFFERS = 1
"""Layers that vLLM's prefetch offloader buffers on the GPU with ``offload_prefetch_step`` 1."""


@dataclass(frozen=True)
class ExpertMemory:
    """Experts of a model and what a cache of them holds on the GPU, in bytes.

    layers: mixture-of-experts layers.
    total: all experts of all layers, in the layout that the cache stores.
    slots, staging: the cache's banks.
    """

    layers: int
    total: int
    slots: int
    staging: int

    @property
    def resident(self) -> int:
        return self.slots + self.staging


def uva_arguments(memory: ExpertMemory) -> dict[str, Any] | None:
    """Engine arguments of ``--cpu-offload-gb``; None if all experts fit in the cache's memory.

    vLLM offloads whole parameters, one layer after the other, until the limit is reached: at most one parameter, a
    layer's packed weights of one projection, more than asked for.
    """
    offloaded = memory.total - memory.resident
    if offloaded <= 0:
        return None
    return {"offload_backend": "uva", "cpu_offload_gb": offloaded / 2**30, "cpu_offload_params": ["experts"]}


def prefetch_arguments(memory: ExpertMemory) -> dict[str, Any] | None:
    """Engine arguments of ``--offload-backend prefetch``; None if all experts fit in the cache's memory.

    vLLM offloads the last m layers of each group of n and buffers ``PREFETCH_BUFFERS`` layers. Of all n and m that
    leave the cache's bytes on the GPU to within one layer, those with the smallest groups are taken, whose offloaded
    layers lie most evenly and so overlap best, and of those the nearest.
    """
    if memory.total <= memory.resident:
        return None
    layer = memory.total // memory.layers
    wanted = memory.total + PREFETCH_BUFFERS * layer - memory.resident
    choices = [(size, offloaded) for size in range(1, memory.layers + 1) for offloaded in range(1, size + 1)]
    distance = {choice: abs(offloaded_layers(memory.layers, *choice) * layer - wanted) for choice in choices}
    size, offloaded = min((c for c in choices if distance[c] <= layer), key=lambda c: (c[0], distance[c]))
    return {
        "offload_backend": "prefetch",
        "offload_group_size": size,
        "offload_num_in_group": offloaded,
        "offload_prefetch_step": PREFETCH_BUFFERS,
        "offload_params": ["experts"],
    }


def offloaded_layers(layers: int, group_size: int, num_in_group: int) -> int:
    """Layers that vLLM's prefetch offloader takes: those at or past ``group_size - num_in_group`` in their group."""
    return sum(layer % group_size >= group_size - num_in_group for layer in range(layers))


def control_resident_bytes(memory: ExpertMemory, arguments: dict[str, Any]) -> int:
    """Expert bytes that a control's arguments leave on the GPU, its buffers included, to compare with the cache's."""
    if arguments["offload_backend"] == "uva":
        gib: float = arguments["cpu_offload_gb"]
        return memory.total - round(gib * 2**30)
    layer = memory.total // memory.layers
    taken = offloaded_layers(memory.layers, arguments["offload_group_size"], arguments["offload_num_in_group"])
    return memory.total - taken * layer + min(taken, PREFETCH_BUFFERS) * layer
