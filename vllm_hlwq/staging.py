"""The banks for experts without a slot, which layers share, and what a layer copies there for its successor.

While a layer of a long prompt is computed, the experts of the layer after it are already on their way, so that the link
never waits for a router. Which layer that is, is seen once: layers run in the same order in every forward pass.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .gather_kernel import Gather
from .host_store import RecordLayout
from .weight_bank import WeightBank

if TYPE_CHECKING:
    from .device_expert_cache import DeviceExpertCache


@dataclass(frozen=True)
class Arrival:
    """Experts on their way into a bank for a layer that is next in a forward pass."""

    layer: DeviceExpertCache
    forward: weakref.ref[Any]
    bank: int


@dataclass
class Staging:
    """Where experts without a slot are computed, shared by all layers of the same shape.

    Several banks, so that one is filled on ``stream`` while another is computed.
    """

    banks: tuple[WeightBank, ...]
    gathers: tuple[Gather, ...]
    stream: torch.cuda.Stream | torch.cpu.Stream
    _arrival: Arrival | None = None
    _latest: tuple[weakref.ref[Any], DeviceExpertCache] | None = None
    _layers: list[DeviceExpertCache] = field(default_factory=list)
    _successors: dict[int, DeviceExpertCache] = field(default_factory=dict)

    @classmethod
    def allocate(cls, rows: int, banks: int, layout: RecordLayout, device: torch.device) -> Staging:
        """Make ``banks`` banks of ``rows`` experts each."""
        made = tuple(WeightBank.allocate(rows, layout, device) for _ in range(banks))
        cuda = device.type == "cuda"  # else torch's stand-in for a stream, which does everything at once
        stream = torch.cuda.Stream(device) if cuda else torch.cpu.Stream()  # type: ignore[no-untyped-call]
        return cls(made, tuple(Gather(layout, bank) for bank in made), stream)

    @property
    def rows(self) -> int:
        return self.banks[0].rows

    @property
    def nbytes(self) -> int:
        return sum(bank.nbytes for bank in self.banks)

    def add(self, layer: DeviceExpertCache) -> None:
        """Let a layer use these banks; layers come in the order of the model."""
        self._layers.append(layer)

    def enter(self, layer: DeviceExpertCache, forward: object) -> None:
        """Note that ``layer`` runs in a forward pass; by this each layer's successor is learned.

        A layer has none that comes before it in the model, as when several passes share an object: what is prefetched
        must be used before the pass ends, since a captured graph after it knows nothing of copies under way.
        """
        if self._latest is not None and self._latest[0]() is forward:
            previous = self._latest[1]
            if self._layers.index(previous) < self._layers.index(layer):
                self._successors[id(previous)] = layer
        self._latest = weakref.ref(forward), layer

    def successor(self, layer: DeviceExpertCache) -> DeviceExpertCache | None:
        """The layer that followed ``layer`` when both last ran in one forward pass; None for the last one."""
        return self._successors.get(id(layer))

    def announce(self, layer: DeviceExpertCache, forward: object, bank: int) -> None:
        """Say that ``stream`` copies what was prefetched for ``layer`` into a bank."""
        self._arrival = Arrival(layer, weakref.ref(forward), bank)

    def take(self, layer: DeviceExpertCache, forward: object) -> Arrival | None:
        """What was announced, if it is for this layer in this forward pass; else it is void."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None and arrival.layer is layer and arrival.forward() is forward:
            return arrival
        return None
