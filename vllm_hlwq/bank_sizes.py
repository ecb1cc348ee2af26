"""Bytes of an INT4 or 16-bit expert, of slots and of staging banks, as whole-number arithmetic: no torch, no vLLM."""

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
"""Scales, activations and weights that are not INT4 are 16-bit."""
FIELD_ALIGNMENT = 16
"""Of each field of a record, as in ``host_store``."""
REFERENCE_STAGING_BANKS = 1
REFERENCE_STAGING_TOKENS = 2
"""The reference backend computes expert by expert, so that larger waves than two tokens' would only cost memory."""


@dataclass(frozen=True)
class ExpertShape:
    """One INT4 or 16-bit expert on one rank.

    Args:
        hidden: input and output features of the layer.
        width: intermediate features.
        group_size: input features that share a scale; None for one scale per output channel.
        zero_points: whether the weights are asymmetric.
        gated: whether there are a gate and an up projection, else only the latter.
        packed: whether the weights are INT4; else there are no scales.
    """

    hidden: int
    width: int
    group_size: int | None
    zero_points: bool = False
    gated: bool = True
    packed: bool = True

    @property
    def padded_width(self) -> int:
        """Width in the kernels' layout; source: ``marlin_moe_padded_intermediate`` of vLLM 0.32 for INT4."""
        if not self.packed:
            return self.width
        tile = math.lcm(MARLIN_TILE, self.group_size or 1)
        return -(-self.width // tile) * tile

    @property
    def record_bytes(self) -> int:
        """The expert on CUDA: in Marlin's layout (4-bit codes, 16-bit scales, 4-bit zero points), or as stored."""
        if not self.packed:
            return self.stored_bytes
        inner = self.padded_width
        matrices = ((self.hidden, inner), (self.hidden, inner), (inner, self.hidden))[0 if self.gated else 1 :]
        return sum(self._matrix_bytes(inputs, outputs) for inputs, outputs in matrices)

    def _matrix_bytes(self, inputs: int, outputs: int) -> int:
        scales = outputs * (inputs // self.group_size if self.group_size else 1)
        zeros = scales // CODES_PER_BYTE if self.zero_points else 0
        return inputs * outputs // CODES_PER_BYTE + scales * SCALE_BYTES + zeros

    @property
    def stored_bytes(self) -> int:
        """The expert as the checkpoint has it, which is what the reference backend keeps; each field is aligned."""
        sides = (((2 if self.gated else 1) * self.width, self.hidden), (self.hidden, self.width))
        fields = [size for rows, columns in sides for size in self._stored_fields(rows, columns)]
        return sum(-(-size // FIELD_ALIGNMENT) * FIELD_ALIGNMENT for size in fields)

    def _stored_fields(self, rows: int, columns: int) -> tuple[int, ...]:
        if not self.packed:
            return (rows * columns * SCALE_BYTES,)
        scales = rows * (columns // self.group_size if self.group_size else 1)
        zeros = scales // CODES_PER_BYTE if self.zero_points else 0
        return rows * columns // CODES_PER_BYTE, scales * SCALE_BYTES, zeros

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
        reference: whether the layers run on the reference backend.
    """

    records: tuple[int, ...]
    num_experts: int
    top_k: int
    device_bytes: int
    staging_size: int | None = None
    reference: bool = False

    def slot_bytes(self, num_slots: int) -> int:
        return num_slots * sum(self.records)

    def staging_bytes(self, num_slots: int) -> int:
        banks = REFERENCE_STAGING_BANKS if self.reference else STAGING_BANKS
        return sum(banks * record * self.staging_rows(num_slots, record) for record in set(self.records))

    def host_bytes(self, num_slots: int) -> int:
        """Page-locked memory of the host: every expert once, nothing if all are resident."""
        return 0 if num_slots == self.num_experts else self.num_experts * sum(self.records)

    def staging_rows(self, num_slots: int, record_bytes: int) -> int:
        """Experts that each staging bank of layers with ``record_bytes`` an expert holds.

        By default all that can be without a slot, so that a step has at most one staged wave, as far as
        1/``STAGING_SHARE`` of the device's memory goes; but no fewer than a token may name, so that a small step needs
        few waves.
        """
        if self.reference:
            default = REFERENCE_STAGING_TOKENS * self.top_k
            return min(self.num_experts - num_slots, self.staging_size or default)
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


def streamed_bytes(banks: BankSizes, hit_permille: int) -> int:
    """Bytes over the link for a token, with so many of 1000 of its experts in a slot; rounded up."""
    return -(-sum(banks.records) * banks.top_k * (1000 - hit_permille) // 1000)
