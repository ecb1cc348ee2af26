"""HLWQ files written and decoded by the definition, in NumPy, apart from the package; and a small model to code.

What a reader returns is compared with ``decode``, which shares nothing with it but the published codebooks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hlwq_vectors import HALVES
from safetensors.torch import load_file, save_file

from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
STATE = "polar_state.safetensors"
INDEX = "model.safetensors.index.json"
REMEDIES = r"download|give |remove |copy |correct |save the model|keep the one"
EXPERTS = 3
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
SHAPES = {
    EMBEDDING: (20, 136), Q_PROJ: (6, 136), O_PROJ: (136, 128), GATE_UP: (EXPERTS, 8, 136), DOWN: (EXPERTS, 136, 100),
    "model.layers.0.input_layernorm.weight": (136,), "model.layers.0.mlp.gate.weight": (EXPERTS, 136),
    "model.norm.weight": (136,),
}  # fmt: skip
CODED = (EMBEDDING, Q_PROJ, O_PROJ, GATE_UP, DOWN)
CONFIG = {"hidden_size": 136, "num_experts": EXPERTS, "tie_word_embeddings": True}


def table(name: str, bits: int = 5) -> np.ndarray:
    """A published codebook, ascending, float64 [2 ** bits]."""
    half = np.array([float(level) for level in HALVES[f"{name}{bits}"].split()])
    return np.concatenate([-half[::-1], half])


def hadamard(size: int) -> np.ndarray:
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / np.sqrt(size)


def encode(weight: torch.Tensor, levels: np.ndarray, block_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [O, nb, BS] and norms float16 [O, nb] of a matrix [O, I]."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // block_size) * block_size))
    padded[:, :columns] = weight.double().numpy()
    blocks = padded.reshape(rows, -1, block_size)
    norms = np.maximum(np.linalg.norm(blocks, axis=-1), 1e-10)
    z = blocks / norms[..., None] @ hadamard(block_size) * np.sqrt(block_size)
    codes = np.abs(z[..., None] - levels).argmin(axis=-1)
    return codes.astype(np.uint8), norms.astype(np.float16)


def decode(codes: np.ndarray, norms: np.ndarray, levels: np.ndarray, columns: int) -> torch.Tensor:
    """The float64 matrix [O, columns] that codes and norms stand for."""
    rows, _, size = codes.shape
    weights = (levels[codes] / np.sqrt(size)) @ hadamard(size) * norms.astype(np.float64)[..., None]
    return torch.from_numpy(weights.reshape(rows, -1)[:, :columns])


def pack_msb(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes as one string of bits, the highest bit of each first."""
    digits = codes.reshape(-1, 1) >> np.arange(bits - 1, -1, -1) & 1
    return torch.from_numpy(np.packbits(digits.astype(np.uint8).reshape(-1)))


def pack_lsb(codes: np.ndarray, bits: int) -> torch.Tensor:
    digits = codes.reshape(-1, 1) >> np.arange(bits) & 1
    return torch.from_numpy(np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little"))


@dataclass
class Coded:
    """A matrix by the definition."""

    codes: np.ndarray
    norms: np.ndarray
    exact: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, levels: np.ndarray, block_size: int = 128) -> Coded:
        codes, norms = encode(weight, levels, block_size)
        return cls(codes, norms, decode(codes, norms, levels, weight.shape[1]))

    def packed(self, key: str, bits: int = 5, meta: int = 5) -> Tensors:
        """As ``__packed``, ``__norms`` and ``__meta`` of 4 or 5 elements."""
        rows, blocks, size = self.codes.shape
        return {
            f"{key}__packed": pack_msb(self.codes, bits),
            f"{key}__norms": torch.from_numpy(self.norms),
            f"{key}__meta": torch.tensor([rows, blocks, size, rows * blocks * size, self.exact.shape[1]][:meta]),
        }


def weights(seed: int = 0) -> Tensors:
    """The small model in BF16."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) / 8).bfloat16() for name, shape in SHAPES.items()}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_base(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG | config)
    return folder


def write_state(folder: Path, stored: Tensors) -> Path:
    save_file(stored, folder / STATE)
    return folder


def dotted(name: str) -> str:
    return name


def dotted_bare(name: str) -> str:
    return name.removesuffix(".weight")


def underscored(name: str) -> str:
    return name.replace(".", "__")


def underscored_bare(name: str) -> str:
    return dotted_bare(name).replace(".", "__")


SPELLINGS: list[Callable[[str], str]] = [dotted, dotted_bare, underscored, underscored_bare]


def slice_suffix(stack: str, expert: int) -> str:
    """``experts.gate_up_proj_e1``"""
    return f"{stack}_e{expert}"


def slice_inside(stack: str, expert: int) -> str:
    """``experts.1.gate_up_proj.weight``"""
    prefix, _, projection = stack.rpartition(".")
    return f"{prefix}.{expert}.{projection}.weight"


def polar_state(
    model: Tensors,
    spell: Callable[[str], str] = underscored,
    slices: Callable[[str, int], str] = slice_suffix,
    meta: int = 5,
    codebook: str = "A",
    names: tuple[str, ...] = CODED,
) -> tuple[Tensors, Tensors]:
    """The coded tensors of a model as the published files hold them, and what each parameter decodes to, in float64."""
    levels = table(codebook)
    stored: Tensors = {}
    exact: Tensors = {}
    for name in names:
        if model[name].ndim == 2:
            coded = Coded.of(model[name], levels)
            stored |= coded.packed(spell(name), meta=meta)
            exact[name] = coded.exact
            continue
        parts = [Coded.of(part, levels) for part in model[name]]
        for expert, part in enumerate(parts):
            stored |= part.packed(spell(slices(name, expert)), meta=meta)
        exact[name] = torch.stack([part.exact for part in parts])
    return stored, exact


def read_all(source: HlwqSource) -> Tensors:
    """Every parameter, in two ranges of rows, as one that is whole.

    Raises:
        CheckpointError: a weight is damaged, or one is missing.
    """
    missing = source.missing()
    if missing:
        raise CheckpointError(f"{source.path}: {missing[0]} is missing")
    tensors = {}
    for name, parameter in source.parameters.items():
        half = parameter.rows // 2
        ranges = [(0, half), (half, parameter.rows)] if half else [(0, parameter.rows)]
        rows = [source.rows(name, *span) for span in ranges]
        tensors[name] = torch.cat(rows).reshape(parameter.shape).clone()
    return tensors


def assert_decoded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """BF16 weights within half a unit of their last place of what they stand for, plus float32's share."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    allowed = exact.abs() * (2.0**-8 + 2.0**-20) + exact.abs().max() * 2.0**-18
    assert ((found.double() - exact).abs() <= allowed).all()


def refused(path: Path, *named: str, base: Path | None = None, codebook: str | None = None) -> None:
    """Reading everything fails in one line with each of ``named`` and a remedy."""
    with pytest.raises(CheckpointError) as caught:
        read_all(HlwqSource(path, base, codebook))
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message
    assert re.search(REMEDIES, message)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def edit_tensors(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
