"""The device planner on a CUDA device: the mirror's answers, one compilation, and one captured graph for any ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import LAYOUTS, Pair, Step, random_ids, runs

from vllm_hlwq.plan_kernel import plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

# Experts, slots, staging rows, top-k. A handful, because each is compiled.
LAYERS = [
    (128, 32, 96, 8),
    (128, 4, 62, 8),
    (16, 3, 4, 4),
    (2, 1, 1, 1),
    (384, 100, 284, 8),
    (1023, 1, 1022, 32),
    (1023, 1022, 1, 32),
]


@given(runs(st.sampled_from(LAYERS), long_steps=(32, 100, 4000), device="cuda"))
@settings(max_examples=300, deadline=None)
def test_every_step_equals_the_mirror(run: tuple[Pair, list[Step]]) -> None:
    pair, steps = run
    for step in steps:
        pair.step(step)


def test_the_largest_prefill() -> None:
    pair = Pair(1023, 100, 923, max_tokens=8192, top_k=32, device="cuda")
    for seed in range(3):
        pair.step(Step(random_ids(8192, 32, 0, 1022, seed)))
        pair.step(Step(random_ids(8192, 32, 0, 60 + seed, seed)))


def test_many_decode_steps_in_a_row() -> None:
    """Races between threads of the one program would show sooner or later."""
    pair = Pair(128, 16, 112, max_tokens=8, top_k=8, device="cuda")
    for seed in range(3000):
        tokens = 1 + seed % 8
        pair.step(Step(random_ids(tokens, 8, seed % 40, seed % 40 + 20 * tokens, seed)))


def test_one_graph_serves_any_ids() -> None:
    tokens, top_k = 16, 8
    pair = Pair(
        128, 32, 96, max_tokens=64, top_k=top_k, device="cuda", expert_map=torch.arange(255, -1, -1).int() - 128
    )
    ids = torch.zeros(tokens, top_k, dtype=torch.int32, device="cuda")
    is_padding = torch.zeros(tokens, dtype=torch.bool, device="cuda")
    expert_map = pair.expert_map.cuda()
    plan(pair.table, ids, is_padding, expert_map)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(pair.table, ids, is_padding, expert_map)
    pair.table.reset()
    for seed in range(200):
        step = Step(random_ids(tokens, top_k, -1, 3 + 5 * seed % 255, seed).int(), torch.arange(tokens) >= seed % 17)
        ids.copy_(step.ids)
        is_padding.copy_(step.is_padding)
        graph.replay()
        pair.check(step)
    assert min(pair.table.counts().values()) > 0


def test_a_layer_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever batch shape, alignment or optional argument comes first: a later one may come inside a capture."""
    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    # A shape that no other test has.
    pair = Pair(77, 13, 64, max_tokens=64, top_k=6, device="cuda")
    mapped = Pair(77, 13, 64, max_tokens=64, top_k=6, device="cuda", expert_map=torch.arange(154).int() - 77)
    for tokens in (64, 1, 0, 7, 16):
        ids = random_ids(tokens, 6, -1, 160, seed=tokens).int()
        for layout in LAYOUTS:
            for is_padding in (None, torch.zeros(tokens, dtype=torch.bool)):
                pair.step(Step(ids, is_padding, layout))
                mapped.step(Step(ids, is_padding, layout))
    assert len(compiled) == 1, compiled
