"""What a checkpoint's tensors take on a GPU, from their names, dtypes and shapes alone: no weight is read.

INT4 and 16-bit experts with one matrix each are understood (``served_checkpoint`` takes stacks apart). Of the rest of
the model only what is surely loaded counts, so that the sum is never more than vLLM takes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .bank_sizes import ExpertShape
from .marlin_shapes import CODES_PER_WORD
from .sizing import KvLayer

Part = tuple[str, str]
"""Projection and kind of one of an expert's tensors."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OF_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")
_EXPERT = re.compile(
    r"^(?P<layer>(?:.*\.)?experts)\.\d+\.(?P<projection>gate_proj|up_proj|down_proj|w[123])\."
    r"(?P<part>weight|weight_packed|weight_scale|weight_zero_point)$"
)
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_KEYS_OR_VALUES = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.self_attn\.(?P<part>[kv])_proj\.weight(?:_packed)?$")
_TOWER = re.compile(
    r"(?:^|\.)(?:vision|visual|audio|speech|image|embed_vision|embed_audio|multi_modal_projector|mm_projector)"
    r"(?:_\w+)?(?:\.|$)"
)
_NEVER_LOADED = re.compile(
    r"(?:^|\.)(?:mtp(?:_\w+)?|talker|code2wav)\.|\.inv_freq$|weight_shape$|weight_g_idx$|"
    r"(?:^|\.)embed_(?:vision|audio)\.embedding\."
)
_SIDE_TENSOR = re.compile(r"weight_(?:scale|zero_point)$")
_HEAD = re.compile(r"(?:^|\.)lm_head\.")
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FULL, SLIDING = "full_attention", "sliding_attention"


class UnknownSizes(ValueError):
    """The tensors do not tell what the model takes; the message says why."""


class Tensor(Protocol):
    """What the header of a safetensors file says of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class ModelFacts:
    """What the configuration says and the tensors do not.

    Args:
        num_layers: decoder layers; the checkpoint may hold more, for drafting.
        num_experts: experts of a layer.
        float_bytes: bytes of a value in the dtype that the model is loaded in.
        tied_head: whether embedding and head may be one.
        towers: whether encoders of images and sound are loaded.
        layer_types: kind of attention by layer; empty if all are alike.
        sliding_window: tokens of it, None if there is none.
        kv_shared_layers: last layers, which keep no keys and values of their own.
        hidden: features between layers.
        vocabulary: tokens.
        rotary_elements: values of the tables of rotary positions, one for each kind of attention.
        kv_heads: the least number of heads of keys and values that a layer has.
    """

    num_layers: int
    num_experts: int
    float_bytes: int
    tied_head: bool = False
    towers: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    kv_shared_layers: int = 0
    hidden: int = 0
    vocabulary: int = 0
    rotary_elements: int = 0
    kv_heads: int = 1

    @property
    def kv_layers(self) -> int:
        """Layers that keep keys and values, if all attend."""
        return self.num_layers - self.kv_shared_layers


@dataclass(frozen=True)
class ModelSizes:
    """What a whole model takes, before it is dealt to ranks.

    experts: shape of an expert, of each mixture-of-experts layer.
    dense_bytes: of all other weights.
    kv_layers: layers whose share of the KV cache is known.
    row_elements: outputs of all dense matrices of a layer, of the decoder layer that has most.
    """

    experts: tuple[ExpertShape, ...]
    dense_bytes: int
    kv_layers: tuple[KvLayer, ...]
    row_elements: int = 0


def model_sizes(tensors: Mapping[str, Tensor], facts: ModelFacts) -> ModelSizes:
    """Sort a checkpoint's tensors into experts and the rest, and sum them up.

    Raises:
        UnknownSizes: there are no experts, or not in a format whose size on the GPU is known.
    """
    loaded = {name: tensor for name, tensor in tensors.items() if _is_loaded(name, facts)}
    experts = {name: tensor for name, tensor in loaded.items() if is_of_experts(name)}
    dense = {name: tensor for name, tensor in loaded.items() if name not in experts}
    return ModelSizes(
        tuple(_expert_shapes(experts, facts.num_experts)),
        sum(_loaded_bytes(tensor, facts.float_bytes) for tensor in dense.values()),
        tuple(_kv_layers(dense, facts)),
        _row_elements(dense),
    )


def is_of_experts(name: str) -> bool:
    """Whether a tensor is part of a layer's experts, the routed ones."""
    return _OF_EXPERTS.search(name) is not None


def _row_elements(dense: Mapping[str, Tensor]) -> int:
    rows: dict[str, int] = defaultdict(int)
    for name, tensor in dense.items():
        layer = _LAYER.search(name)
        if layer and len(tensor.shape) == 2 and not _SIDE_TENSOR.search(name) and not _TOWER.search(name):
            rows[layer[1]] += tensor.shape[0]
    return max(rows.values(), default=0)


def _is_loaded(name: str, facts: ModelFacts) -> bool:
    if _NEVER_LOADED.search(name) or (facts.tied_head and _HEAD.search(name)):
        return False
    if _TOWER.search(name):
        return facts.towers
    layer = _LAYER.search(name)
    return layer is None or int(layer[1]) < facts.num_layers


def _loaded_bytes(tensor: Tensor, float_bytes: int) -> int:
    """Values of 16 bit and more become the model's dtype, anything else stays as it is."""
    wide = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return math.prod(tensor.shape) * (float_bytes if wide else tensor.dtype.itemsize)


def _expert_shapes(experts: Mapping[str, Tensor], num_experts: int) -> Iterator[ExpertShape]:
    """The shape that all experts of a layer have, layer by layer."""
    if not experts:
        raise UnknownSizes("the checkpoint holds no experts")
    layers: dict[str, dict[Part, list[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in experts.items():
        match = _EXPERT.match(name)
        if match is None or (match["part"] == "weight" and tensor.dtype not in PLAIN_DTYPES):
            raise UnknownSizes(f"{name} is of experts in another format than INT4 or 16 bit with one matrix each")
        projection = _ROLES.get(match["projection"], match["projection"])
        layers[match["layer"]][projection, match["part"]].append(tuple(tensor.shape))
    for layer, parts in layers.items():
        if any(len(shapes) != num_experts or len(set(shapes)) > 1 for shapes in parts.values()):
            raise UnknownSizes(f"{layer}: the checkpoint does not hold {num_experts} experts of one shape")
        yield _expert_shape(layer, {part: shapes[0] for part, shapes in parts.items()})


def _expert_shape(layer: str, parts: dict[Part, tuple[int, ...]]) -> ExpertShape:
    """An expert's shape, from those of its tensors, which must be what it would be stored as."""
    if ("up_proj", "weight") in parts:
        return _plain_shape(layer, parts)
    try:
        hidden, down_groups = parts["down_proj", "weight_scale"]
        width, up_groups = parts["up_proj", "weight_scale"]
    except (KeyError, ValueError):
        raise UnknownSizes(f"{layer}: an expert has no scales of an up and a down projection") from None
    per_channel = up_groups == down_groups == 1
    shape = ExpertShape(
        hidden,
        width,
        None if per_channel else hidden // up_groups,
        zero_points=("up_proj", "weight_zero_point") in parts,
        gated=("gate_proj", "weight_scale") in parts,
    )
    if parts != _stored_parts(shape):
        raise UnknownSizes(f"{layer}: an expert's tensors are not of the shapes of INT4 matrices")
    return shape


def _plain_shape(layer: str, parts: dict[Part, tuple[int, ...]]) -> ExpertShape:
    shape = parts["up_proj", "weight"]
    gated = ("gate_proj", "weight") in parts
    wanted = {("up_proj", "weight"): shape, ("down_proj", "weight"): shape[::-1]}
    if gated:
        wanted["gate_proj", "weight"] = shape
    if len(shape) != 2 or parts != wanted:
        raise UnknownSizes(f"{layer}: an expert's tensors are not of the shapes of 16-bit matrices")
    return ExpertShape(hidden=shape[1], width=shape[0], group_size=None, gated=gated, packed=False)


def _stored_parts(shape: ExpertShape) -> dict[Part, tuple[int, ...]]:
    """Shapes of an expert's tensors in a compressed-tensors checkpoint."""
    sides = {"down_proj": (shape.hidden, shape.width), "up_proj": (shape.width, shape.hidden)}
    if shape.gated:
        sides["gate_proj"] = sides["up_proj"]
    stored: dict[Part, tuple[int, ...]] = {}
    for projection, (rows, columns) in sides.items():
        groups = columns // shape.group_size if shape.group_size else 1
        stored[projection, "weight_packed"] = (rows, columns // CODES_PER_WORD)
        stored[projection, "weight_scale"] = (rows, groups)
        if shape.zero_points:
            stored[projection, "weight_zero_point"] = (rows // CODES_PER_WORD, groups)
    return stored


def _kv_layers(dense: Mapping[str, Tensor], facts: ModelFacts) -> Iterator[KvLayer]:
    """Layers with key and value projections of their own; keys that serve as values too are kept twice."""
    rows: dict[int, dict[str, int]] = defaultdict(dict)
    for name, tensor in dense.items():
        match = _KEYS_OR_VALUES.search(name)
        if match and not _TOWER.search(name):
            rows[int(match["layer"])][match["part"]] = tensor.shape[0]
    for layer, found in sorted(rows.items()):
        if layer >= facts.num_layers - facts.kv_shared_layers or "k" not in found:
            continue
        elements = found["k"] + found.get("v", found["k"])
        if not facts.layer_types:
            yield KvLayer(elements, facts.sliding_window)
        elif facts.layer_types[layer] == FULL:
            yield KvLayer(elements, None)
        elif facts.layer_types[layer] == SLIDING and facts.sliding_window:
            yield KvLayer(elements, facts.sliding_window)
