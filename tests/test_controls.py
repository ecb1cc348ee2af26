"""Controls get the cache's memory: no more than a layer beside it, whatever the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_hlwq.bench.controls import (
    ExpertMemory,
    control_resident_bytes,
    offloaded_layers,
    prefetch_arguments,
    uva_arguments,
)

GEMMA = ExpertMemory(layers=30, total=30 * 128 * 3_159_552, slots=30 * 32 * 3_159_552, staging=96 * 3_159_552)


@st.composite
def memories(draw: st.DrawFn) -> ExpertMemory:
    layers, experts, record = draw(st.integers(1, 60)), draw(st.integers(2, 256)), draw(st.integers(1, 10**7))
    slots = draw(st.integers(1, experts - 1))
    return ExpertMemory(layers, layers * experts * record, layers * slots * record, (experts - slots) * record)


@given(memories())
def test_uva_leaves_exactly_the_caches_bytes(memory: ExpertMemory) -> None:
    arguments = uva_arguments(memory)
    if memory.layers == 1:  # one layer's slots and staging hold all its experts
        assert arguments is None
    else:
        assert arguments is not None
        assert control_resident_bytes(memory, arguments) == memory.resident
        assert arguments["cpu_offload_params"] == ["experts"]


@given(memories())
def test_prefetch_leaves_the_caches_bytes_to_within_a_layer(memory: ExpertMemory) -> None:
    arguments = prefetch_arguments(memory)
    if arguments is None:
        assert memory.total <= memory.resident
        return
    layer = memory.total // memory.layers
    assert abs(control_resident_bytes(memory, arguments) - memory.resident) <= layer
    smaller = [(size, taken) for size in range(1, arguments["offload_group_size"]) for taken in range(1, size + 1)]
    for size, taken in smaller:
        other = {**arguments, "offload_group_size": size, "offload_num_in_group": taken}
        assert abs(control_resident_bytes(memory, other) - memory.resident) > layer


def test_gemma_with_a_quarter_resident() -> None:
    # 32 of 128 experts of 30 layers and 96 of staging are 8.25 layers: of 30 and a buffer, 22.75 are to offload.
    assert prefetch_arguments(GEMMA) == {
        "offload_backend": "prefetch", "offload_group_size": 4, "offload_num_in_group": 3, "offload_prefetch_step": 1,
        "offload_params": ["experts"],
    }  # fmt: skip
    assert uva_arguments(GEMMA)["cpu_offload_gb"] == pytest.approx((128 * 30 - 32 * 30 - 96) * 3_159_552 / 2**30)


@pytest.mark.parametrize(("layers", "size", "taken", "expected"), [(30, 8, 2, 6), (30, 1, 1, 30), (5, 4, 3, 3)])
def test_which_layers_vllm_offloads(layers: int, size: int, taken: int, expected: int) -> None:
    assert offloaded_layers(layers, size, taken) == expected
