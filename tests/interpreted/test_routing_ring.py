"""The ring that steps fill on the device, in Triton's interpreter: every id arrives once, or the loss is told.

torch's stand-ins for streams do everything in the order of the calls; tests/test_trace_gpu.py has what only a real
stream can show.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_expert_cache import EXPERTS, TOP_K, distinct_ids, make_cache, run_and_check
from traces import header

from vllm_hlwq.routing_log import RoutingLog
from vllm_hlwq.routing_ring import MIN_ENTRIES, MIN_IDS, RingOverrunError, RoutingRing
from vllm_hlwq.simulate import COMPARED, replay
from vllm_hlwq.trace import Header, Trace

HEADER = header([(300, 2), (16, 3)])


class Recording:
    """A ring, the log that it is emptied into, and what was appended."""

    def __init__(self, head: Header = HEADER, capacity: tuple[int, int] | None = None) -> None:
        self.head, self.log = head, RoutingLog(head.layers)
        self.ring = RoutingRing(head.layers, 64, "cpu", capacity)
        self.wanted: list[list[torch.Tensor]] = [[] for _ in head.layers]

    def append(self, layer: int, tokens: int) -> None:
        shape = self.head.layers[layer]
        ids = torch.randint(-1, shape.experts, (tokens, shape.top_k), dtype=torch.int32)
        self.ring.append(layer, ids)
        self.wanted[layer].append(ids.long())

    def poll(self) -> None:
        chunk = self.ring.poll()
        assert chunk is not None
        assert self.log.add(chunk)

    def trace(self) -> Trace:
        for chunk in self.ring.drain():
            assert self.log.add(chunk)
        return self.log.trace(self.head)

    def check(self) -> None:
        trace = self.trace()
        for layer, wanted in enumerate(self.wanted):
            steps = list(trace.steps_of(layer))
            assert len(steps) == len(wanted)
            assert all(torch.equal(a, b) for a, b in zip(steps, wanted, strict=True))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_id_arrives_in_order(data: st.DataObject) -> None:
    """The ring wraps many times, entries and ids at different places."""
    recording = Recording(capacity=(5, 101))
    assert recording.log.trace(HEADER).num_steps == 0, "compiling the kernel left a trace"
    for _ in range(data.draw(st.integers(0, 12))):
        recording.append(data.draw(st.integers(0, 1)), data.draw(st.integers(0, 12)))
        recording.poll()
    recording.check()


def test_what_comes_before_a_reset_is_forgotten() -> None:
    recording = Recording()
    recording.append(0, 5)
    recording.poll()
    recording.append(1, 5)
    recording.ring.reset()
    recording.wanted = [[], []]
    recording.append(1, 2)
    recording.check()


@pytest.mark.parametrize("capacity", [(3, 1000), (1000, 30)])
def test_what_is_overwritten_before_it_is_read_is_told(capacity: tuple[int, int]) -> None:
    recording = Recording(capacity=capacity)
    for _ in range(3):
        recording.append(1, 3)  # nine ids each
        recording.poll()
    for _ in range(4):
        recording.append(1, 3)
    with pytest.raises(RingOverrunError, match=r"steps of layers came before"):
        recording.trace()


def test_a_step_longer_than_a_block_of_the_kernel_arrives() -> None:
    recording = Recording(capacity=(4, 5000))
    for tokens in (700, 1, 600, 683):
        recording.append(1, tokens)
        recording.poll()
        recording.poll()
    recording.check()


def test_the_ring_holds_several_of_the_largest_passes() -> None:
    few = RoutingRing(HEADER.layers, 64, "cpu")
    assert few.nbytes == MIN_ENTRIES * 8 + MIN_IDS * 2 + 16
    tokens = 2**20
    assert RoutingRing(HEADER.layers, tokens, "cpu").nbytes == MIN_ENTRIES * 8 + 8 * 5 * tokens * 2 + 16
    bytes_an_id = RoutingRing(header([(255, 2)]).layers, 64, "cpu")
    assert bytes_an_id.nbytes == MIN_ENTRIES * 8 + MIN_IDS + 16


@pytest.mark.parametrize("num_slots", [2, 5, 11])
def test_a_replay_counts_what_the_device_counted(num_slots: int) -> None:
    """Prompts that stream, decoding, and padding rows that are masked."""
    torch.manual_seed(num_slots)
    cache = make_cache(num_slots)
    head = header([(EXPERTS, TOP_K)], cache_size=num_slots)
    recording = Recording(head)
    cache.record = lambda ids: recording.ring.append(0, ids)
    for tokens in (30, 1, 2, 1, 20, 5, 1, 1, 40, 3, 1):
        padding = torch.arange(tokens) >= max(1, tokens - 3) if tokens % 5 == 0 else None
        run_and_check(cache, distinct_ids(tokens), padding)
        recording.poll()
    live = cache.counts()
    trace = recording.trace()
    assert np.count_nonzero(trace.expert_ids == 255) > 0
    (replayed,) = replay(trace, [num_slots])
    assert replayed.layers[0].counters == {name: live[name] for name in COMPARED}
    assert replayed.layers[0].all.bytes // 1000 == live["copied"]
