"""Device memory of an expert cache by its size, as whole-number arithmetic: no device, no torch, no vLLM.

The check before loading and the refusal for want of memory ask it what would fit, ``auto`` and ``hlwq plan`` what to
take. All sizes are bytes of one rank; those of experts are in ``bank_sizes``. ``DeviceDemand`` leaves out what cannot
be known, so that it is never more than is taken; ``DeviceEstimate`` is meant never to be less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .bank_sizes import SCALE_BYTES, BankSizes, ExpertShape

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


HIT_RATES = ((0, 0), (125, 450), (250, 670), (500, 890), (1000, 1000))
"""Of 1000 experts how many are resident, and of 1000 that tokens need how many are hits: Gemma-4-26B-A4B, chat."""


def expected_hits(num_slots: int, num_experts: int) -> int:
    """Hits of 1000 at a number of slots, between the points of ``HIT_RATES`` in straight lines, rounded down."""
    share = 1000 * num_slots // num_experts
    for (left, low), (right, high) in pairwise(HIT_RATES):
        if share <= right:
            return low + (high - low) * (share - left) // (right - left)
    raise ValueError(f"{num_slots} slots are more than {num_experts} experts")
