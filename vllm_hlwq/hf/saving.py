"""A coded model's tensors as an HLWQ checkpoint has them: the very codes it was loaded with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..checkpoint.names import CODEBOOK_KEY
from ..errors import CheckpointError
from .coded_weight import norm_values
from .modules import NORMS, PACKED, CodedModule

_ROWS = "__rows"


def checkpoint_tensors(model: Any, conversions: Any) -> dict[str, torch.Tensor]:
    """All tensors to save, by their names in a checkpoint.

    Args:
        model: of which weights are coded.
        conversions: of transformers, that its checkpoint's tensors went through; undone here, as for any model.

    Raises:
        CheckpointError: two weights have different tables, or some are not in memory.
    """
    from transformers.core_model_loading import revert_weight_conversion

    ties = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ties}
    absent = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if absent is not None:
        raise CheckpointError(f"{absent} is offloaded and cannot be saved coded; load the model without offloading")
    table = _describe_rows(model, state)
    model._weight_conversions = conversions
    try:
        state = revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = []
    found = {CODEBOOK_KEY: table}
    for name, tensor in state.items():
        if name.endswith(PACKED):
            base = name.removesuffix(PACKED)
            found.update(_matrices(base, tensor, state[base + NORMS], state[base + _ROWS]))
        elif not name.endswith((NORMS, _ROWS)):
            found[name] = tensor
    return found


def _describe_rows(model: Any, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Put what a row of codes stands for beside it, so that it is split as the codes are; returns the table."""
    table: torch.Tensor | None = None
    for owner, module in model.named_modules():
        if not isinstance(module, CodedModule):
            continue
        for name, layout in module.layouts.items():
            if table is not None and not torch.equal(table, layout.table):
                raise CheckpointError(
                    f"{owner}.{name} has another codebook than the weights before it, and a checkpoint stores one; "
                    "load it with HLWQConfig(mode='decode') and save that"
                )
            table = layout.table
            full = f"{owner}.{name}" if owner else name
            if full + PACKED in state:
                rows = torch.tensor([layout.block_size, layout.in_features])
                state[full + _ROWS] = rows.expand(*state[full + PACKED].shape[:-1], 2)
    assert table is not None
    return table


def _matrices(
    base: str, packed: torch.Tensor, norms: torch.Tensor, rows: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    if packed.ndim == 3:
        for expert, parts in enumerate(zip(packed, norms, rows, strict=True)):
            yield from _matrices(f"{base}_e{expert}", *parts)
        return
    rows = rows.reshape(-1, 2)
    block_size, in_features = rows[0].tolist()
    values = norm_values(norms.contiguous()).reshape(len(rows), -1)
    blocks = values.shape[1]
    yield f"{base}{PACKED}", packed.reshape(-1)
    yield f"{base}{NORMS}", values
    yield f"{base}__meta", torch.tensor([len(rows), blocks, block_size, len(rows) * blocks * block_size, in_features])
