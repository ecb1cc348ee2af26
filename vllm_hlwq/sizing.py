"""Device memory of an expert cache by its size, as whole-number arithmetic: no device, no torch, no vLLM.

The loader asks it how large the staging banks are, the check before loading and the refusal for want of memory what
would fit. All sizes are bytes of one rank. What cannot be known is left out, so that a sum is never more than is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STAGING_SHARE = 16
"""The device's memory over this is for staging by default: 1.5 GiB on a 24 GiB card, where a layer has 0.4 GB."""
STAGING_BANKS = 2
MARLIN_TILE = 64
"""Expert width that vLLM pads to a multiple of, in whole groups."""
CODES_PER_BYTE = 2
SCALE_BYTES = 2
"""Scales and activations are 16-bit."""


@dataclass(frozen=True)
class ExpertShape:
    """One INT4 expert on one rank.

    Args:
        hidden: input and output features of the layer.
        width: intermediate features.
        group_size: input features that share a scale; None for one scale per output channel.
        zero_points: whether the weights are asymmetric.
        gated: whether there are a gate and an up projection, else only the latter.
    """

    hidden: int
    width: int
    group_size: int | None
    zero_points: bool = False
    gated: bool = True

    @property
    def padded_width(self) -> int:
        """Width in Marlin's layout; source: ``marlin_moe_padded_intermediate`` of vLLM 0.32."""
        tile = math.lcm(MARLIN_TILE, self.group_size or 1)
        return -(-self.width // tile) * tile

    @property
    def record_bytes(self) -> int:
        """The expert in Marlin's layout: 4-bit codes, 16-bit scales, 4-bit zero points if asymmetric."""
        inner = self.padded_width
        matrices = ((self.hidden, inner), (self.hidden, inner), (inner, self.hidden))[0 if self.gated else 1 :]
        return sum(self._matrix_bytes(inputs, outputs) for inputs, outputs in matrices)

    def _matrix_bytes(self, inputs: int, outputs: int) -> int:
        scales = outputs * (inputs // self.group_size if self.group_size else 1)
        zeros = scales // CODES_PER_BYTE if self.zero_points else 0
        return inputs * outputs // CODES_PER_BYTE + scales * SCALE_BYTES + zeros

    def workspace_bytes(self, tokens: int, top_k: int) -> int:
        """Working memory of a step of ``tokens``, which vLLM's profiling run takes and keeps for all layers together.

        A row of (token, k) needs gate, up, their product and the output: ``DeviceBackend.workspace_shapes``.
        """
        columns = (3 if self.gated else 2) * self.padded_width + self.hidden
        return tokens * top_k * columns * SCALE_BYTES


@dataclass(frozen=True)
class BankSizes:
    """Slots of all layers and the staging banks that they share.

    Args:
        records: bytes of an expert, of each layer; layers with equal ones share staging banks.
        num_experts: experts of a layer on this rank.
        top_k: experts of a token.
        device_bytes: all memory of the device.
        staging_size: experts of a staging bank; None for the default.
    """

    records: tuple[int, ...]
    num_experts: int
    top_k: int
    device_bytes: int
    staging_size: int | None = None

    def slot_bytes(self, num_slots: int) -> int:
        return num_slots * sum(self.records)

    def staging_bytes(self, num_slots: int) -> int:
        return sum(STAGING_BANKS * record * self.staging_rows(num_slots, record) for record in set(self.records))

    def staging_rows(self, num_slots: int, record_bytes: int) -> int:
        """Experts that each staging bank of layers with ``record_bytes`` an expert holds.

        By default all that can be without a slot, so that a step has at most one staged wave, as far as
        1/``STAGING_SHARE`` of the device's memory goes; but no fewer than a token may name, so that a small step needs
        few waves.
        """
        affordable = self.device_bytes // STAGING_SHARE // (STAGING_BANKS * record_bytes)
        return min(self.num_experts - num_slots, self.staging_size or max(affordable, self.top_k))

    def bytes(self, num_slots: int) -> int:
        return self.slot_bytes(num_slots) + self.staging_bytes(num_slots)

    def most_slots(self, available: int, but: int = 0) -> int:
        """The largest number of slots whose banks ``available`` bytes hold, other than ``but``; 0 if none.

        All are tried: with a single layer a slot more saves two places of staging.
        """
        counts = range(self.num_experts, 0, -1)
        return next((n for n in counts if n != but and self.bytes(n) <= available), 0)


@dataclass(frozen=True)
class KvLayer:
    """What an attention layer keeps of a token.

    elements: values of keys and values on this rank.
    window: tokens that it looks back on; None for all.
    """

    elements: int
    window: int | None

    def elements_of(self, length: int, step: int) -> int:
        """Of one sequence of ``length`` tokens: of a sliding layer the window and the ``step`` being computed.

        Source: ``SlidingWindowSpec.max_admission_blocks_per_request`` of vLLM 0.32, in tokens and for one batch at a
        time.
        """
        tokens = length if self.window is None else min(length, self.window - 1 + step)
        return self.elements * tokens


@dataclass(frozen=True)
class DeviceDemand:
    """What a server certainly takes of a device, by number of slots.

    dense: weights that are not of experts.
    workspace: of the largest step.
    kv_cache: of one sequence, or all that the user reserves.
    banks: the experts' part.
    """

    dense: int
    workspace: int
    kv_cache: int
    banks: BankSizes

    @property
    def _beside_banks(self) -> int:
        return self.dense + self.workspace + self.kv_cache

    def bytes(self, num_slots: int) -> int:
        return self._beside_banks + self.banks.bytes(num_slots)

    def most_slots(self, available: int) -> int:
        """The largest number of slots that ``available`` bytes may hold; 0 if none."""
        return self.banks.most_slots(available - self._beside_banks)
