"""Attention over a coded history and the exact tokens behind it, in the coordinates that the codes are in.

The rotation H is orthogonal, so ``q . k = (q H) . (k H)``: one query is rotated in place of every key, and one weighted
sum in place of every value. The history is read as codes, 2 to 4 bits a coordinate, and never written out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .coded_vectors import CodedVectors
from .kernels import GROUP, kernels, run_shares

MOST_ROWS = 32
"""Query vectors of one key-value head up to which codes are attended to; with more, decoding them once is faster."""


class Side(NamedTuple):
    """Keys, or values: the first ``coded`` tokens of the store, then ``exact`` ``[batch, heads, tokens, head_dim]``."""

    store: CodedVectors
    coded: int
    exact: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, tokens, head_dim = self.exact.shape
        return batch, heads, self.coded + tokens, head_dim

    def decode(self) -> torch.Tensor:
        """All tokens as one new tensor ``[batch, heads, tokens, head_dim]``."""
        out = self.exact.new_empty(self.shape)
        self.store.decode(self.coded, out[:, :, : self.coded])
        out[:, :, self.coded :] = self.exact
        return out

    def arrays(self) -> tuple[object, object]:
        """Codes ``[tokens, heads * bytes]`` and float32 norms ``[tokens, heads]`` as numpy arrays, batch in heads."""
        codes, norms = self.store.codes[: self.coded], self.store.norms[: self.coded]
        return codes.view(self.coded, -1).numpy(), norms.view(self.coded, -1).float().numpy()


def attend(
    query: torch.Tensor, keys: Side, values: Side, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Scaled dot-product attention on a CPU, summed in float32.

    Args:
        query: ``[batch, query heads, rows, head_dim]``; query heads are a multiple of the key-value heads.
        keys: what the rows are compared with.
        values: what is summed, of the same tokens.
        mask: as torch's: true where a row may look, or what to add to the scores; broadcasts to
            ``[batch, query heads, rows, tokens]``.
        scale: of the scores; by default the inverse root of ``head_dim``.

    Returns:
        ``[batch, query heads, rows, the values' head_dim]`` of the query's dtype, or autocast's as torch's own. A row
        that may look nowhere is zero.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        return _attend(query, keys, values, mask, scale).to(dtype)


def _attend(
    query: torch.Tensor, keys: Side, values: Side, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """``attend`` in float32."""
    batch, heads, tokens, _ = keys.shape
    queries = query.float() * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    shape = (batch, heads, query.shape[1] // heads, query.shape[2], tokens)
    grouped = queries.reshape(batch, heads, -1, query.shape[-1])
    scores = torch.empty(*grouped.shape[:3], tokens)
    _history_scores(grouped, keys, scores)
    torch.matmul(grouped, keys.exact.float().transpose(2, 3), out=scores[..., keys.coded :])
    _apply_mask(scores.view(shape), mask, shape)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    result = _history_mix(weights, values)
    result += torch.matmul(weights[..., values.coded :], values.exact.float())
    return (result / total).view(*query.shape[:3], -1)


def _apply_mask(scores: torch.Tensor, mask: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    batch, heads, group, rows, tokens = shape
    mask = mask.broadcast_to(batch, heads * group, rows, tokens).view(shape)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    else:
        scores += mask


def _history_scores(queries: torch.Tensor, keys: Side, out: torch.Tensor) -> None:
    """Scores of ``[batch, heads, rows, head_dim]`` with the coded keys, to the front of ``out``."""
    coder = keys.store.coder
    batch, heads, rows, head_dim = queries.shape
    # Dividing by the width makes two unnormalised products with H one orthogonal one.
    rotated = (queries.reshape(-1, head_dim) / coder.width) @ coder.blocks.hadamard[:head_dim]
    places = rotated.view(batch * heads, rows, -1, GROUP).transpose(2, 3).contiguous().numpy()
    codes, norms = keys.arrays()
    result = out.view(batch * heads, rows, -1).numpy()
    product = kernels(coder.bits).scores
    run_shares(lambda _, start, stop: product(codes, norms, places, result, start, stop), keys.coded)


def _history_mix(weights: torch.Tensor, values: Side) -> torch.Tensor:
    """Coded values summed by the front of ``weights`` ``[batch, heads, rows, tokens]``."""
    coder = values.store.coder
    batch, heads, rows, _ = weights.shape
    codes, norms = values.arrays()
    by_head = weights.view(batch * heads, rows, -1).numpy()
    sums = torch.zeros(torch.get_num_threads(), batch * heads, rows, GROUP, coder.width // GROUP)
    parts = sums.numpy()
    product = kernels(coder.bits).mix
    run_shares(lambda share, start, stop: product(codes, norms, by_head, parts[share], start, stop), values.coded)
    rotated = sums.sum(0).transpose(2, 3).reshape(-1, coder.width)
    mixed = (rotated / coder.width) @ coder.blocks.hadamard[:, : coder.head_dim]
    return mixed.view(batch, heads, rows, coder.head_dim)
