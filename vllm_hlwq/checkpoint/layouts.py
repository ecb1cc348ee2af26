"""How models lay out their linear weights, by rules on names and shapes: what becomes which INT4 matrix.

Covers fused 3-D expert stacks (Gemma-4, and every model as transformers holds it in memory), the same with the input
dimension first (gpt-oss, Llama 4), and one matrix an expert (Qwen3-MoE, OLMoE, GLM-4.5, Mixtral's w1, w2, w3).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .names import NEVER_CODED
from .sources import Parameter, WeightSource

_STACK = re.compile(r"^(?P<prefix>.*experts)\.(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?$")
_STACK_BIAS = re.compile(r"^(?P<prefix>.*experts)\.(?P<proj>gate_up_proj|down_proj)(_bias|\.bias)$")
_EXPERT = re.compile(
    r"^(?P<prefix>.*experts)\.(?P<expert>\d+)\.(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_DOWN = ("down_proj", "w2")


@dataclass(frozen=True)
class Matrix:
    """An expert's or linear layer's weight ``[out, in]`` inside a source parameter.

    module: its name in the exported checkpoint, without ``.weight``.
    read: gives the matrix, in the source's dtype.
    """

    module: str
    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]
    expert: bool


@dataclass(frozen=True)
class Vector:
    """An expert's bias inside a source parameter."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def hidden_size(source: WeightSource) -> int | None:
    """The model's hidden size, from its configuration."""
    config = source.config()
    for part in (config.get("text_config") or {}, config):
        if isinstance(part.get("hidden_size"), int):
            return int(part["hidden_size"])
    return None


def expert_matrices(source: WeightSource, name: str) -> list[Matrix] | None:
    """The experts' matrices that a parameter holds, un-fused; None if it holds none.

    Raises:
        CheckpointError: an expert stack whose shape fits no known layout.
    """
    parameter = source.parameters[name]
    match = _EXPERT.match(name)
    if match and len(parameter.shape) == 2:
        return _one_expert(source, name, match, parameter)
    match = _STACK.match(name)
    if match is None or len(parameter.shape) != 3:
        return None
    return _stack(source, name, match["prefix"], match["proj"], parameter)


def _one_expert(source: WeightSource, name: str, match: re.Match[str], parameter: Parameter) -> list[Matrix]:
    rows, columns = parameter.shape
    if match["proj"] != "gate_up_proj":
        module = name.removesuffix(".weight")
        return [Matrix(module, (rows, columns), lambda: source.rows(name, 0, rows), True)]
    half = rows // 2
    stem = f"{match['prefix']}.{match['expert']}"
    return [
        Matrix(f"{stem}.gate_proj", (half, columns), lambda: source.rows(name, 0, half), True),
        Matrix(f"{stem}.up_proj", (half, columns), lambda: source.rows(name, half, rows), True),
    ]


def _stack(source: WeightSource, name: str, prefix: str, projection: str, parameter: Parameter) -> list[Matrix]:
    experts, first, second = parameter.shape
    transposed, interleaved = _orientation(source, name, prefix, projection, parameter)
    out, columns = (second, first) if transposed else (first, second)
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    if out % len(parts):
        raise CheckpointError(f"{source.path}: {name} has {out} output rows, which are no pair of gate and up")
    matrices = []
    for expert in range(experts):
        for index, part in enumerate(parts):

            def read(expert: int = expert, index: int = index) -> torch.Tensor:
                if not transposed and not interleaved:
                    step = out // len(parts)
                    start = expert * first + index * step
                    return source.rows(name, start, start + step)
                weight = source.rows(name, expert * first, (expert + 1) * first)
                weight = weight.t() if transposed else weight
                chosen = weight[index :: len(parts)] if interleaved else weight.chunk(len(parts))[index]
                return chosen.contiguous()

            shape = (out // len(parts), columns)
            matrices.append(Matrix(f"{prefix}.{expert}.{part}", shape, read, True))
    return matrices


def _orientation(
    source: WeightSource, name: str, prefix: str, projection: str, parameter: Parameter
) -> tuple[bool, bool]:
    """Is the input dimension first, and do gate and up alternate?

    Told by which dimension is the hidden size. Where both are, a stack with biases has the input first, as in gpt-oss.
    Stacks of gate and up that come with a bias alternate row by row; those without lie one after the other.
    """
    hidden = hidden_size(source)
    biased = any(f"{prefix}.{projection}{suffix}" in source.parameters for suffix in ("_bias", ".bias"))
    _, first, second = parameter.shape
    straight, crosswise = (first == hidden, second == hidden) if projection == "down_proj" else (
        second == hidden, first == hidden,
    )  # fmt: skip
    if straight and crosswise:
        transposed = biased
    elif straight or crosswise:
        transposed = crosswise
    else:
        raise CheckpointError(
            f"{source.path}: {name} is {list(parameter.shape)}, neither dimension is the hidden size {hidden}; "
            "this layout of experts is not known"
        )
    return transposed, biased and projection == "gate_up_proj"


def expert_biases(source: WeightSource, name: str) -> list[Vector] | None:
    """The experts' biases that a stacked parameter ``[experts, out]`` holds, un-fused; None if it holds none."""
    match = _STACK_BIAS.match(name)
    parameter = source.parameters[name]
    if match is None or len(parameter.shape) != 2:
        return None
    experts, width = parameter.shape
    parts = ("gate_proj", "up_proj") if match["proj"] == "gate_up_proj" else (match["proj"],)
    return [
        Vector(
            f"{match['prefix']}.{expert}.{part}.bias",
            (width // len(parts),),
            lambda expert=expert, index=index: source.rows(name, expert, expert + 1)[0, index :: len(parts)],  # type: ignore[misc]
        )
        for expert in range(experts)
        for index, part in enumerate(parts)
    ]


def linear_matrix(source: WeightSource, name: str) -> Matrix | None:
    """A linear layer outside the experts that INT4 could hold; None for embeddings, heads, routers and towers."""
    parameter = source.parameters[name]
    never = any(pattern.search(name) for pattern in NEVER_CODED.values())
    embedding = re.search(r"(^|\.)(embed\w*|wte|wpe|lm_head|output_embedding)(\.|$)", name)
    if len(parameter.shape) != 2 or not name.endswith(".weight") or never or embedding:
        return None
    rows, columns = parameter.shape
    return Matrix(name.removesuffix(".weight"), (rows, columns), lambda: source.rows(name, 0, rows), False)
