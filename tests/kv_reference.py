"""HLWQ's KV format decoded from its definition in float64, and dense attention over it."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from hlwq_vectors import HALVES

from vllm_hlwq.kv_cache.layer import CodedLayer

TABLES = {2: "A2", 3: "C3", 4: "C4"}
"""At 2 bits table A has converged to table C's digits."""


def levels(bits: int) -> np.ndarray:
    half = np.array([float(level) for level in HALVES[TABLES[bits]].split()])
    return np.concatenate([-half[::-1], half])


@cache
def rotation(width: int) -> np.ndarray:
    """H[i, j] = (-1) ** popcount(i & j) / sqrt(width)."""
    i = np.arange(width)
    odd = np.array([[int(a & b).bit_count() & 1 for b in i] for a in i])
    return (1 - 2.0 * odd) / math.sqrt(width)


def decoded(codes: torch.Tensor, norms: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """Vectors float64 ``[..., head_dim]`` of packed codes ``[..., bytes]`` and norms ``[...]``."""
    stream = np.unpackbits(codes.numpy(), axis=-1)
    index = stream.reshape(*codes.shape[:-1], -1, bits) @ (1 << np.arange(bits)[::-1])
    width = index.shape[-1]
    vectors = levels(bits)[index] / math.sqrt(width) @ rotation(width) * norms.double().numpy()[..., None]
    return torch.from_numpy(vectors[..., :head_dim])


def dense(layer: CodedLayer, side: int, recent: torch.Tensor) -> torch.Tensor:
    """Keys (0) or values (1) float64 that a layer stands for, its uncoded tokens taken from ``recent``."""
    if layer.get_seq_length() == 0 or layer._coded[side].length == 0:
        return recent.double()
    store = layer._coded[side]
    count = store.length
    vectors = decoded(store.codes[:count], store.norms[:count], store.coder.bits, store.coder.head_dim)
    return torch.cat([vectors.permute(1, 2, 0, 3), recent[:, :, count:].double()], dim=2)


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense attention in float64; additive mask."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group, dim=1) for states in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) / math.sqrt(query.shape[3])
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ values
