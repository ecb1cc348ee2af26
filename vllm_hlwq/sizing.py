"""Device memory of an expert cache by its size, as whole-number arithmetic: no device, no torch, no vLLM.

The loader asks it how large the staging banks are, the check before loading and the refusal for want of memory what
would fit, ``auto`` and ``hlwq plan`` what to take. All sizes are bytes of one rank. ``DeviceDemand`` leaves out what
cannot be known, so that it is never more than is taken; ``DeviceEstimate`` is meant never to be less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

STAGING_SHARE = 16
"""The device's memory over this is for staging by default: 1.5 GiB on a 24 GiB card, where a layer has 0.4 GB."""
STAGING_BANKS = 2
MARLIN_TILE = 64
"""Expert width that vLLM pads to a multiple of, in whole groups."""
CODES_PER_BYTE = 2
SCALE_BYTES = 2
"""Scales, activations and weights that are not INT4 are 16-bit."""
KV_BLOCK_TOKENS = 128
"""By which blocks may exceed a sequence: two of 64 tokens, as vLLM forms them on CUDA of layers that differ."""
DENSE_SHARE = 50
"""One part in this of the dense weights over their headers: copies that models make, what ranks do not share out."""
ROW_COPIES = 2
"""An output of a dense matrix is alive with a copy of it: rotated, normalised, multiplied by its gate."""
HIDDEN_ROWS = 8
"""Residual, norms and inputs of a layer that are alive at once."""
LOGIT_BYTES = {True: 12, False: 32}
"""Of a logit while it is sampled from: 16-bit with its soft cap, float32, top-k and top-p; sorted in the V1 runner."""
COUNT_BYTES = {True: 5, False: 0}
"""Of a token of the vocabulary and a sequence, in the V2 runner's table for penalties, which it keeps."""
GRAPH_LAYER_BYTES = 384 * 2**10
GRAPHS_BYTES = 64 * 2**20
"""Of a layer in a captured graph, and once: on an H100 six graphs of 30 layers with the expert cache took 0.09 GiB."""
BANK_FIELDS, ALLOCATION_BYTES = 4, 2 * 2**20
"""A bank has this many fields, and each is rounded up by torch's allocator."""
MARGIN_BYTES, MARGIN_SHARE = 512 * 2**20, 64
"""Left free for kernels that CUDA loads, cuBLAS and attention workspaces: so much, and one part in 64 of the device."""
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


def kv_floor_elements(layers: Sequence[KvLayer], length: int, in_flight: int) -> int:
    """Values of keys and values that one sequence of ``length`` tokens takes of vLLM's cache, at most.

    vLLM 0.32 keeps layers of different kinds in groups of one size and fills up the last group of each kind
    (``_get_kv_cache_groups_uniform_page_size``), and gives out whole blocks.

    Args:
        layers: of the model.
        length: tokens of the sequence.
        in_flight: tokens that may be under way, of all steps that overlap.
    """
    kinds = Counter(layers)
    least, most = min(kinds.values(), default=0), max(kinds.values(), default=0)
    group = most if 2 * most < 3 * least else least
    return sum(
        -(-count // group) * group * (kind.elements_of(length, in_flight) + kind.elements * KV_BLOCK_TOKENS)
        for kind, count in kinds.items()
    )


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


@dataclass(frozen=True)
class Step:
    """What bounds a step of the engine.

    tokens: ``max_num_batched_tokens``.
    sequences: ``max_num_seqs``.
    graphs: CUDA graphs that are captured, of all kinds.
    v2_runner: whether vLLM's V2 model runner runs it.
    """

    tokens: int
    sequences: int
    graphs: int
    v2_runner: bool = True


@dataclass(frozen=True)
class DenseModel:
    """What working memory outside the experts depends on.

    bytes: weights outside the experts, on one rank.
    whole_bytes: of all ranks.
    hidden: features between layers.
    row_elements: outputs of all dense matrices of a layer, of the layer that has most.
    vocabulary: tokens.
    rotary_elements: values of the tables of rotary positions.
    """

    bytes: int
    whole_bytes: int
    hidden: int
    row_elements: int
    vocabulary: int
    rotary_elements: int

    @property
    def bytes_at_most(self) -> int:
        return self.bytes + self.whole_bytes // DENSE_SHARE + self.rotary_elements * SCALE_BYTES

    def transient_bytes(self, step: Step) -> int:
        """The larger of the two peaks of a step: in its widest layer, or where it samples."""
        rows = step.tokens * ROW_COPIES * SCALE_BYTES * (self.row_elements + HIDDEN_ROWS * self.hidden)
        return max(rows, step.sequences * self.vocabulary * LOGIT_BYTES[step.v2_runner])

    def sampler_bytes(self, step: Step) -> int:
        return step.sequences * self.vocabulary * COUNT_BYTES[step.v2_runner]


@dataclass(frozen=True)
class DeviceEstimate:
    """What a server takes of a device at most, so far as can be foreseen, by number of slots.

    dense: weights outside the experts, and tables of rotary positions.
    workspace: the experts', of the largest step.
    activations: the peak of a step outside the experts.
    sampler: tables that the sampler keeps.
    graphs: captured CUDA graphs.
    kv_cache: the floor, or all that the user reserves.
    margin: what is left free.
    banks: slots and staging.
    """

    dense: int
    workspace: int
    activations: int
    sampler: int
    graphs: int
    kv_cache: int
    margin: int
    banks: BankSizes

    @classmethod
    def of(
        cls, dense: DenseModel, experts: Sequence[ExpertShape], step: Step, kv_cache: int, banks: BankSizes
    ) -> DeviceEstimate:
        """Add up what a model needs in an engine.

        Args:
            dense: the model outside its experts.
            experts: shape of an expert, of each layer.
            step: bounds of a step.
            kv_cache: bytes.
            banks: of the experts.
        """
        layers = len(experts)
        return cls(
            dense=dense.bytes_at_most,
            workspace=max(shape.workspace_bytes(step.tokens, banks.top_k) for shape in experts),
            activations=dense.transient_bytes(step),
            sampler=dense.sampler_bytes(step),
            graphs=GRAPHS_BYTES + step.graphs * layers * GRAPH_LAYER_BYTES if step.graphs else 0,
            kv_cache=kv_cache,
            margin=MARGIN_BYTES + banks.device_bytes // MARGIN_SHARE + layers * BANK_FIELDS * ALLOCATION_BYTES,
            banks=banks,
        )

    @property
    def beside_banks(self) -> int:
        return self.dense + self.workspace + self.activations + self.sampler + self.graphs + self.kv_cache + self.margin

    def bytes(self, num_slots: int) -> int:
        return self.beside_banks + self.banks.bytes(num_slots)

    def most_slots(self, available: int) -> int:
        """The largest number of slots that ``available`` bytes hold; 0 if none."""
        return self.banks.most_slots(available - self.beside_banks)


def graphs_captured(sequences: int, tokens: int, kinds: int = 2) -> int:
    """CUDA graphs that vLLM 0.32 captures by default: ``VllmConfig._set_cudagraph_sizes``, of each of ``kinds``."""
    most = min(2 * sequences, 512, tokens)
    sizes = {n for n in (1, 2, 4, sequences, *range(8, 256, 8), *range(256, 513, 16)) if n <= most}
    return kinds * len(sizes)


def streamed_bytes(banks: BankSizes, hit_permille: int) -> int:
    """Bytes over the link for a token, with so many of 1000 of its experts in a slot; rounded up."""
    return -(-sum(banks.records) * banks.top_k * (1000 - hit_permille) // 1000)


HIT_RATES = ((0, 0), (125, 450), (250, 670), (500, 890), (1000, 1000))
"""Of 1000 experts how many are resident, and of 1000 that tokens need how many are hits: Gemma-4-26B-A4B, chat."""


def expected_hits(num_slots: int, num_experts: int) -> int:
    """Hits of 1000 at a number of slots, between the points of ``HIT_RATES`` in straight lines, rounded down."""
    share = 1000 * num_slots // num_experts
    for (left, low), (right, high) in pairwise(HIT_RATES):
        if share <= right:
            return low + (high - low) * (share - left) // (right - left)
    raise ValueError(f"{num_slots} slots are more than {num_experts} experts")
