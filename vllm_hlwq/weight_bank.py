"""Rows of expert weights on the compute device: the slot bank of a layer, or a staging bank that layers share.

A bank is weights and nothing else. Which expert a row holds is said by the map that comes with each computation, so
hits, fresh loads and staged experts all run through the same call.
"""

from __future__ import annotations

import torch

from .host_store import HostStore, RecordLayout


class WeightBank:
    """``rows`` experts, one tensor ``[rows, *shape]`` per weight field, with addresses fixed for life."""

    def __init__(self, fields: dict[str, torch.Tensor]) -> None:
        self.fields = fields
        self.rows = next(iter(fields.values())).shape[0]

    @classmethod
    def allocate(cls, rows: int, layout: RecordLayout, device: torch.device) -> WeightBank:
        """Make a bank of uninitialised rows on ``device``."""
        return cls(
            {
                name: torch.empty((rows, *field.shape), dtype=field.dtype, device=device)
                for name, field in layout.items()
            }
        )

    @classmethod
    def resident(cls, store: HostStore, device: torch.device) -> WeightBank:
        """Make a bank that holds every expert, row = expert: the store itself where host and device are one."""
        return cls({name: store.field(name).to(device) for name in store.layout})

    @property
    def nbytes(self) -> int:
        """Bytes of all fields of all rows."""
        return sum(tensor.nbytes for tensor in self.fields.values())

    def load(self, store: HostStore, experts: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy experts out of the store.

        Args:
            store: where the records are.
            experts: int64 [L], experts to copy.
            rows: int64 [L], row of each.
        """
        pairs = list(zip(experts.tolist(), rows.tolist(), strict=True))
        for name, tensor in self.fields.items():
            records = store.field(name)
            for expert, row in pairs:
                tensor[row].copy_(records[expert])
