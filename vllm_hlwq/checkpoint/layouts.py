"""How models lay out their linear weights, by rules on names and shapes: what becomes which INT4 matrix.

Covers fused 3-D expert stacks (Gemma-4, and every model as transformers holds it in memory), the same with the input
dimension first (gpt-oss, Llama 4), and one matrix an expert (Qwen3-MoE, OLMoE, GLM-4.5, Mixtral's w1, w2, w3).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import CheckpointError
from .names import NEVER_CODED
from .sources import Parameter, WeightSource

Role = Literal["gate", "up", "gate_up", "down", "linear"]

_STACK = re.compile(r"^(?P<prefix>(?:.*\.)?experts)\.(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?$")
_STACK_BIAS = re.compile(r"^(?P<prefix>(?:.*\.)?experts)\.(?P<proj>gate_up_proj|down_proj)(_bias|\.bias)$")
_EXPERT = re.compile(
    r"^(?P<prefix>(?:.*\.)?experts)\.(?P<expert>\d+)\."
    r"(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_OF_EXPERTS = re.compile(r"(^|\.)experts\.")
EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|output_embedding)(\.|$)")
_ROLES: dict[str, Role] = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """An expert's or linear layer's weight ``[out, in]`` inside a source parameter.

    stem: what its tensors' names in the exported checkpoint begin with, as in ``<stem>weight_packed``.
    read: gives the matrix, in the source's dtype.
    """

    stem: str
    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]
    role: Role

    @property
    def module(self) -> str:
        return self.stem[:-1]

    @property
    def has_shape(self) -> bool:
        """Is its shape stored? vLLM's loader of gpt-oss takes every tensor of such a name for a weight."""
        return self.stem.endswith(".")


@dataclass(frozen=True)
class Vector:
    """An expert's bias inside a source parameter."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def never_int4(name: str) -> bool:
    """Is a parameter, by its name, of those that stay in 16 bit whatever their shape?"""
    return any(pattern.search(name) for pattern in NEVER_CODED.values())


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
        CheckpointError: weights of experts whose name or shape fits no known layout.
    """
    parameter = source.parameters[name]
    match = _EXPERT.match(name)
    if match and len(parameter.shape) == 2:
        return _one_expert(source, name, match, parameter)
    match = _STACK.match(name)
    if match and len(parameter.shape) == 3:
        return _stack(source, name, match["prefix"], match["proj"], parameter)
    if len(parameter.shape) >= 2 and _OF_EXPERTS.search(name) and not never_int4(name):
        raise CheckpointError(
            f"{source.path}: {name} {list(parameter.shape)} is of experts, but its layout is not known; "
            "known are 3-D gate_up_proj, gate_proj, up_proj and down_proj, and one matrix an expert, also w1, w2 and w3"
        )
    return None


def _one_expert(source: WeightSource, name: str, match: re.Match[str], parameter: Parameter) -> list[Matrix]:
    rows, columns = parameter.shape
    if match["proj"] != "gate_up_proj":
        stem = name.removesuffix("weight")
        return [Matrix(stem, (rows, columns), lambda: source.rows(name, 0, rows), _ROLES[match["proj"]])]
    half = _half(source, name, rows)
    stem = f"{match['prefix']}.{match['expert']}."
    return [
        Matrix(f"{stem}gate_proj.", (half, columns), lambda: source.rows(name, 0, half), "gate"),
        Matrix(f"{stem}up_proj.", (half, columns), lambda: source.rows(name, half, rows), "up"),
    ]


def _half(source: WeightSource, name: str, rows: int) -> int:
    if rows % 2:
        raise CheckpointError(f"{source.path}: {name} has {rows} output rows, which are no pair of gate and up")
    return rows // 2


def _stack(source: WeightSource, name: str, prefix: str, projection: str, parameter: Parameter) -> list[Matrix]:
    experts, first, second = parameter.shape
    transposed = _input_first(source, prefix)
    out, columns = (second, first) if transposed else (first, second)
    matrices = []
    for expert in range(experts):
        for stem, role, start, rows in _parts(source, name, prefix, projection, out):

            def read(expert: int = expert, start: int = start, rows: int = rows) -> torch.Tensor:
                if not transposed:
                    return source.rows(name, expert * first + start, expert * first + start + rows)
                weight = source.rows(name, expert * first, (expert + 1) * first)
                return weight[:, start : start + rows].t().contiguous()

            matrices.append(Matrix(f"{prefix}.{expert}.{stem}", (rows, columns), read, role))
    return matrices


def _parts(source: WeightSource, name: str, prefix: str, projection: str, out: int) -> list[tuple[str, Role, int, int]]:
    """Stem, role, first row and rows of each matrix that an expert has in a stack with ``out`` output rows.

    Experts with biases alternate gate and up row by row, as in gpt-oss. They stay one matrix, under the names that
    vLLM's loader of gpt-oss has for single experts: it passes over any other in silence.
    """
    if _biased(source, prefix, projection):
        return [("w13_", "gate_up", 0, out)] if projection == "gate_up_proj" else [("w2_", "down", 0, out)]
    if projection != "gate_up_proj":
        return [(f"{projection}.", _ROLES[projection], 0, out)]
    half = _half(source, name, out)
    return [("gate_proj.", "gate", 0, half), ("up_proj.", "up", half, half)]


def _biased(source: WeightSource, prefix: str, projection: str) -> bool:
    return any(f"{prefix}.{projection}{suffix}" in source.parameters for suffix in ("_bias", ".bias"))


def _input_first(source: WeightSource, prefix: str) -> bool:
    """Is the input dimension of an expert layer's stacks first?

    Told by which dimension is the hidden size, from all stacks of the layer: where both are in one, another tells.
    Where both are in all, stacks with biases have the input first, as in gpt-oss.

    Raises:
        CheckpointError: no dimension is the hidden size, or the stacks contradict one another.
    """
    hidden = hidden_size(source)
    told = {}
    for name, parameter in source.parameters.items():
        match = _STACK.match(name)
        if match is None or match["prefix"] != prefix or len(parameter.shape) != 3:
            continue
        straight, crosswise = parameter.shape[1:] if match["proj"] == "down_proj" else parameter.shape[:0:-1]
        if hidden not in (straight, crosswise):
            raise CheckpointError(
                f"{source.path}: {name} is {list(parameter.shape)}, neither dimension is the hidden size {hidden}; "
                "this layout of experts is not known"
            )
        if straight != crosswise:
            told[name] = crosswise == hidden
    if len(set(told.values())) > 1:
        raise CheckpointError(
            f"{source.path}: {' and '.join(told)} disagree on which dimension is the input; "
            "this layout of experts is not known"
        )
    return next(iter(told.values())) if told else _biased(source, prefix, "down_proj")


def expert_biases(source: WeightSource, name: str) -> list[Vector] | None:
    """The experts' biases that a stacked parameter ``[experts, out]`` holds, un-fused; None if it holds none."""
    match = _STACK_BIAS.match(name)
    parameter = source.parameters[name]
    if match is None or len(parameter.shape) != 2:
        return None
    experts, width = parameter.shape
    part = "w13" if match["proj"] == "gate_up_proj" else "w2"
    return [
        Vector(
            f"{match['prefix']}.{expert}.{part}_bias",
            (width,),
            lambda expert=expert: source.rows(name, expert, expert + 1)[0],  # type: ignore[misc]
        )
        for expert in range(experts)
    ]


def linear_matrix(source: WeightSource, name: str) -> Matrix | None:
    """A linear layer outside the experts that INT4 could hold; None for embeddings, heads, routers and towers."""
    parameter = source.parameters[name]
    if len(parameter.shape) != 2 or not name.endswith(".weight") or never_int4(name) or EMBEDDING.search(name):
        return None
    rows, columns = parameter.shape
    return Matrix(name.removesuffix("weight"), (rows, columns), lambda: source.rows(name, 0, rows), "linear")
