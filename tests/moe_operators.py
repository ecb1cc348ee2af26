"""vLLM's CUDA operators that sort a step's rows into blocks of one expert and sum over top-k, in plain torch."""

from __future__ import annotations

import torch


def align(ids: torch.Tensor, size: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places, the expert of each block, and how many places are in use; past those are values that nothing may use."""
    flat = ids.reshape(-1)
    places, blocks = [], []
    for expert in range(num_experts):
        rows = torch.nonzero(flat == expert).flatten().tolist()
        rows += [len(flat)] * (-len(rows) % size)
        places += rows
        blocks += [expert] * (len(rows) // size)
    used = len(places)
    longest = len(flat) + num_experts * (size - 1)
    places += [10**6] * (longest - used)
    blocks += [-7] * (-(-longest // size) - len(blocks))
    return int32(places), int32(blocks), int32([used])


def moe_sum(rows: torch.Tensor, output: torch.Tensor, ids: torch.Tensor | None, _: None) -> None:
    kept = rows.float() if ids is None else torch.where((ids >= 0).unsqueeze(-1), rows.float(), 0.0)
    output.copy_(kept.sum(1))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
