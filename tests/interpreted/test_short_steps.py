"""Blocks of short steps in Triton's interpreter, against vLLM's alignment followed by a look-up of bank rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_operators import align

from vllm_hlwq.short_steps import MOST_PAIRS, blocks_of_short_step


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids of a step, some of no expert here and some of one expert many times; bank rows; a block size."""
    top_k = draw(st.integers(1, 20))
    tokens = draw(st.integers(1, MOST_PAIRS // top_k))
    experts = draw(st.integers(1, 70))
    ids = draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    bank_rows = torch.randperm(experts, dtype=torch.int32) + draw(st.integers(0, 9))
    return torch.tensor(ids, dtype=torch.int32).view(tokens, top_k), bank_rows, draw(st.sampled_from([8, 16, 48, 64]))


@given(cases())
@settings(deadline=None, max_examples=150)
def test_blocks_are_those_of_the_alignment(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, bank_rows, size = case
    places, block_experts, padded = align(ids, size, len(bank_rows))
    used = int(padded)
    found = blocks_of_short_step(ids, bank_rows, size)
    assert found.block_size == size
    assert found.padded_rows.tolist() == [used]
    assert torch.equal(found.sorted_rows[:used], places[:used])
    assert torch.equal(found.block_rows[: used // size], bank_rows[block_experts[: used // size].long()])
    assert len(found.sorted_rows) >= used
    assert len(found.block_rows) >= used // size
