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


class LoadedExperts:
    """The account of one layer while its checkpoint is read.

    Args:
        layer_name: for messages.
        expert_format: of the layer's experts.
        moe_config: vLLM's configuration of the layer.
        num_experts: experts on this rank.
        shapes: of each carried tensor on this rank, without the expert dimension, as the checkpoint has it, before any
            padding for kernels.
    """

    def __init__(
        self, layer_name: str, expert_format: ExpertFormat, moe_config: Any, num_experts: int, shapes: Shapes
    ) -> None:
        self.layer_name = layer_name
        self.expert_format = expert_format
        self.gated = moe_config.is_act_and_mul
        self.ranks = moe_config.moe_parallel_config.tp_size
        self.num_experts = num_experts
        self.shapes = shapes
        self._loaded: set[tuple[str, str, int]] = set()

    def check_fits(
        self, parameter: torch.nn.Parameter, field: str, shard_id: str, expert_id: int, shape: tuple[int, ...]
    ) -> None:
        """Check one expert's part against its place.

        Args:
            parameter: the place, with the attributes by which vLLM's loader finds its way.
            field: its name.
            shard_id: vLLM's name of the part: ``w1`` (gate), ``w3`` (up) or ``w2`` (down).
            expert_id: the expert's id in the checkpoint.
            shape: of the part as it is in the checkpoint, all ranks' rows and columns.

        Raises:
            ExpertCacheError: the part does not fill its place.
        """
        needed = self.shapes[field]
        if getattr(parameter, "quant_method", None) == "tensor":
            shape, needed = tuple(size for size in shape if size != 1), ()
        elif self.gated and shard_id in ("w1", "w3"):
            rows = 1 if getattr(parameter, "is_transposed", False) and len(needed) > 1 else 0
            needed = (*needed[:rows], needed[rows] // 2, *needed[rows + 1 :])
        # Checkpoints hold whole matrices: a dimension that tensor parallelism cuts is as many times larger there.
        if len(shape) != len(needed) or any(
            have not in (size, size * self.ranks) for have, size in zip(shape, needed, strict=True)
        ):
            ranks = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
            raise ExpertCacheError(
                f"{self.layer_name}: checkpoint tensor {shard_id} for {field} of expert {expert_id} has shape {shape}, "
                f"the model needs {needed}{ranks}; export it again"
            )

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
        if field.startswith("w13_"):
            return ("w1", "w3") if self.gated else ("w1",)
        return ("w2",)
