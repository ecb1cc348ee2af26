"""Which tensors of a layer's experts have come from the checkpoint, and whether each fills its place.

vLLM's loader narrows a place to a smaller tensor, for the sake of padded kernels, and says nothing of tensors that
never come: experts would be computed with parts of zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import ExpertCacheError
from .expert_formats import ExpertFormat

Shapes = dict[str, tuple[int, ...]]

WHOLE = "whole"
"""The part of an expert that a tensor is where gate and up come together."""


class LoadedExperts:
    """The account of one layer while its checkpoint is read.

    Args:
        layer_name: for messages.
        expert_format: of the layer's experts.
        moe_config: vLLM's configuration of the layer.
        num_experts: experts on this rank.
        shapes: of each carried tensor on this rank, without the expert dimension, as the checkpoint has it, before any
            padding for kernels.
        stacked: whether gate and up come together, cut for this rank by the model already.
    """

    def __init__(
        self,
        layer_name: str,
        expert_format: ExpertFormat,
        moe_config: Any,
        num_experts: int,
        shapes: Shapes,
        stacked: bool = False,
    ) -> None:
        self.layer_name = layer_name
        self.expert_format = expert_format
        self.gated = moe_config.is_act_and_mul
        self.ranks = moe_config.moe_parallel_config.tp_size
        self.num_experts = num_experts
        self.shapes = shapes
        self.stacked = stacked
        self._loaded: set[tuple[str, str, int]] = set()

    def check_fits(
        self, parameter: torch.nn.Parameter, field: str, shard_id: str, expert_id: int | None, shape: tuple[int, ...]
    ) -> None:
        """Check an expert's part against its place.

        Args:
            parameter: the place, with the attributes by which vLLM's loader finds its way.
            field: its name.
            shard_id: vLLM's name of the part: ``w1`` (gate), ``w3`` (up) or ``w2`` (down); or ``WHOLE``.
            expert_id: the expert's id in the checkpoint, None for all.
            shape: of one expert's part.

        Raises:
            ExpertCacheError: the part does not fill its place.
        """
        needed = self.shapes[field]
        if getattr(parameter, "quant_method", None) == "tensor":
            shape, needed = tuple(size for size in shape if size != 1), ()
        elif self.gated and shard_id in ("w1", "w3"):
            rows = 1 if getattr(parameter, "is_transposed", False) and len(needed) > 1 else 0
            needed = (*needed[:rows], needed[rows] // 2, *needed[rows + 1 :])
        if len(shape) != len(needed) or not all(map(self._fits, shape, needed, parameter.shape[1:])):
            ranks = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
            whose = "all experts" if expert_id is None else f"expert {expert_id}"
            raise ExpertCacheError(
                f"{self.layer_name}: checkpoint tensor {shard_id} for {field} of {whose} has shape {shape}, "
                f"the model needs {needed}{ranks}; export it again"
            )

    def _fits(self, have: int, needed: int, place: int) -> bool:
        """Whether a dimension fills its place of ``place``, padding included."""
        if self.stacked and self.ranks > 1:
            # The model cuts by whole groups of scales, which need not divide evenly among the ranks.
            return have <= place
        # Checkpoints hold whole matrices: a dimension that tensor parallelism cuts is as many times larger there.
        return have in (needed, needed * self.ranks)

    def note(self, field: str, shard_id: str, expert: int | None) -> None:
        """Take down that a part of an expert on this rank, None for all of them, is in its place."""
        experts = range(self.num_experts) if expert is None else (expert,)
        self._loaded.update((field, shard_id, number) for number in experts)

    def absent(self) -> frozenset[str]:
        """Tensors of which the checkpoint has none, and need not have any."""
        return self.expert_format.optional & self.shapes.keys() - {field for field, *_ in self._loaded}

    def check_complete(self) -> None:
        """Check that every part of every expert came.

        Raises:
            ExpertCacheError: some did not.
        """
        expected = {
            (field, shard, expert)
            for field in self.shapes.keys() - self.absent()
            for shard in self._shards(field)
            for expert in range(self.num_experts)
        }
        missing = sorted(expected - self._loaded)
        if missing:
            field, shard, expert = missing[0]
            raise ExpertCacheError(
                f"{self.layer_name}: the checkpoint lacks {len(missing)} expert tensors, first {field} ({shard}) "
                f"of expert {expert}; download or export it again"
            )

    def _shards(self, field: str) -> tuple[str, ...]:
        if self.stacked:
            return (WHOLE,)
        if field.startswith("w13_"):
            return ("w1", "w3") if self.gated else ("w1",)
        return ("w2",)
