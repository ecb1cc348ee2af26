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
from .prefetching import SlotSnapshot, copy_records
from .weight_bank import WeightBank

if TYPE_CHECKING:
    from .device_expert_cache import DeviceExpertCache


@dataclass(frozen=True)
class Arrival:
    """Experts on their way into a bank for a layer that is next in a forward pass."""

    layer: DeviceExpertCache
    bank: int


@dataclass
class Staging:
    """Where experts without a slot are computed, shared by all layers of the same shape.

    Several banks, so that one is filled on ``stream`` while another is computed.
    """

    banks: tuple[WeightBank, ...]
    gathers: tuple[Gather, ...]
    stream: torch.cuda.Stream | torch.cpu.Stream
    _snapshot: SlotSnapshot | None = None
    _watched: bool = False
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
        """Let a layer use these banks; layers come in the order of the model, before any of them runs."""
        assert self._snapshot is None
        self._layers.append(layer)

    def enter(self, layer: DeviceExpertCache, forward: object) -> None:
        """Note that ``layer`` runs in a forward pass; by this each layer's successor is learned.

        A pass ends with its object, or where a layer follows one that does not come before it in the model: several
        passes may share an object. What was read of the tables or prefetched in a pass is void after it.
        """
        latest, self._latest = self._latest, (weakref.ref(forward), layer)
        if latest is not None and latest[0]() is forward:
            previous = latest[1]
            if self._layers.index(previous) < self._layers.index(layer):
                self._successors[id(previous)] = layer
                return
        self._watched, self._arrival = False, None

    def successor(self, layer: DeviceExpertCache) -> DeviceExpertCache | None:
        """The layer that followed ``layer`` when both last ran in one forward pass; None for the last one."""
        return self._successors.get(id(layer))

    def watch(self) -> None:
        """Read the slot tables of all layers, once in a pass."""
        if not self._watched:
            self._snapshot = self._snapshot or SlotSnapshot(self._layers)
            self._snapshot.read()
            self._watched = True

    def prefetch(self, layer: DeviceExpertCache, bank: int) -> None:
        """Let ``stream`` copy into a bank what ``layer`` is going to need; it must be planned next in this pass.

        Waits on the host until the snapshot of this pass is there, which is at most once.
        """
        assert self._snapshot is not None
        assert self._watched
        assert layer.store is not None
        experts = self._snapshot.experts_to_prefetch(layer, self.rows)
        copy_records(layer.store, experts, self.banks[bank], self.stream)
        self._arrival = Arrival(layer, bank)

    def take(self, layer: DeviceExpertCache) -> Arrival | None:
        """What was prefetched in this pass, if it is for this layer."""
        arrival, self._arrival = self._arrival, None
        return arrival if arrival is not None and arrival.layer is layer else None
