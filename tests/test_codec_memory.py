"""Working memory of the codec, and the threads that share out a matrix: four times a chunk for each, and no more."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_hlwq.codec import (
    GAIN,
    NORM,
    SEARCH,
    BlockCoder,
    Refinement,
    chunks,
    codebook,
    dequantize_matrix,
    quantize_matrix,
)
from vllm_hlwq.codec.blocks import CHUNK_BLOCKS
from vllm_hlwq.codec.chunks import coding_threads, for_each_chunk, for_ranges, on_cpus

CPU = torch.device("cpu")
CHUNK_BYTES = CHUNK_BLOCKS * 128 * 4


class NewMemory(TorchDispatchMode):
    """Adds up what operations allocate, but for the tensors listed as known; freeing gives nothing back."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                self.seen.add(tensor.untyped_storage().data_ptr())
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("refinement", [NORM, GAIN, SEARCH], ids=["norm", "gain", "search"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("columns", "bits"), [(128, 5), (200, 3), (512, 8)])
def test_a_coder_keeps_four_times_a_chunk(refinement: Refinement, dtype: torch.dtype, columns: int, bits: int) -> None:
    coder = BlockCoder(codebook("C", bits), 128, CPU)
    blocks = -(-columns // 128)
    weight = torch.randn(2 * CHUNK_BLOCKS // blocks, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    coded = quantize_matrix(weight, coder, refinement, measure=True)
    dequantize_matrix(coded, coder)
    for twin in coder.twins(2):
        assert twin.scratch.nbytes <= 4 * CHUNK_BYTES
    assert coder.scratch.nbytes >= 3 * CHUNK_BYTES  # it is there that the work is done


@pytest.mark.parametrize("refinement", [NORM, GAIN], ids=["norm", "gain"])
def test_nothing_of_a_chunk_s_size_is_allocated_beside_it(refinement: Refinement) -> None:
    """One chunk, and so in this thread: operations' outputs outside the coder's buffers are a few numbers a block."""
    coder = BlockCoder(codebook("C", 5), 128, CPU)
    weight = torch.randn(CHUNK_BLOCKS, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    coded = quantize_matrix(weight, coder, refinement, measure=True)
    restored = dequantize_matrix(coded, coder)
    known = [*coder.scratch._buffers.values(), coder.hadamard, coder.table, weight]
    with NewMemory(*known) as encoding:
        coded = quantize_matrix(weight, coder, refinement, measure=True)
    with NewMemory(*known, coded.packed, coded.norms, restored) as decoding:
        dequantize_matrix(coded, coder, out=restored)
    assert sum(encoding.sizes) - coded.packed.nbytes - coded.norms.nbytes < CHUNK_BYTES / 4
    assert sum(decoding.sizes) < CHUNK_BYTES / 4


def test_threads_change_nothing() -> None:
    """As many threads as cores, or one: the same codes, norms and weights to the last bit."""
    weight = torch.randn(700, 2000, generator=torch.Generator().manual_seed(5))
    coder = BlockCoder(codebook("C", 5), 128, CPU)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            coded = quantize_matrix(weight, coder, GAIN, measure=True)
            results.append((coded.packed, coded.norms, dequantize_matrix(coded, coder), coded.squared_error))
    finally:
        torch.set_num_threads(threads)
    for packed, norms, restored, error in results[1:]:
        assert torch.equal(packed, results[0][0])
        assert torch.equal(norms, results[0][1])
        assert torch.equal(restored, results[0][2])
        assert error == results[0][3]


MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_coder_serves_every_mode_of_torch(first: Any, dtype: torch.dtype, threads: int) -> None:
    """Parameters too, and after a call in any other mode."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = quantize_matrix(weight, BlockCoder(codebook("C", 5), 128, CPU), GAIN)
    before, coder = torch.get_num_threads(), BlockCoder(codebook("C", 5), 128, CPU)
    torch.set_num_threads(threads)
    try:
        for mode in (first, *MODES):
            with mode():
                found = quantize_matrix(torch.nn.Parameter(weight), coder, GAIN)
                restored = dequantize_matrix(found, coder)
            assert torch.equal(found.packed, wanted.packed)
            assert torch.equal(found.norms, wanted.norms)
            assert not restored.requires_grad
    finally:
        torch.set_num_threads(before)


def test_chunks_cover_the_rows_in_order_and_the_first_failure_is_told() -> None:
    coder = BlockCoder(codebook("C", 5), 128, CPU)
    at_once: set[int] = set()

    def work(twin: BlockCoder, start: int, stop: int) -> tuple[int, int]:
        assert id(twin) not in at_once, "two threads share a coder's memory"
        at_once.add(id(twin))
        assert start < 40 or failing == 0, f"rows {start} to {stop}"
        at_once.remove(id(twin))
        return start, stop

    failing = 0
    assert for_each_chunk(work, coder, 103, 10) == [(start, min(start + 10, 103)) for start in range(0, 103, 10)]
    assert for_each_chunk(work, coder, 0, 10) == []
    failing = 1
    with pytest.raises(AssertionError, match="rows 40 to 50"):
        for_each_chunk(work, coder, 103, 10)


def test_torch_keeps_its_threads() -> None:
    """Workers hold torch to one thread each; threads made afterwards must not inherit that."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quantize_matrix(torch.randn(4096, 256), BlockCoder(codebook("C", 5), 128, CPU), NORM)
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), seen) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_an_interrupt_between_two_threads_starts_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waited for the others for good would be waited for in its turn when the process ends."""
    start, started, before = threading.Thread.start, [], torch.get_num_threads()

    def interrupted(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(thread)
        start(thread)

    threads = 7  # a number that no other test has made
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for_ranges(lambda first, last: last - first, threads, 1, threads)
    assert len(started) == 2
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()
    assert torch.get_num_threads() == before
    assert for_ranges(lambda first, last: last - first, threads, 1, threads) == [1] * threads


def test_an_interrupt_while_threads_work_ends_when_none_works_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call works in the same memory."""
    started, ended = [], []
    present, interrupted = threading.Event(), threading.Event()
    wait = chunks.wait

    def work(start: int, stop: int) -> None:
        started.append(start)
        present.set()
        assert interrupted.wait(60)
        time.sleep(0.02)
        ended.append(start)

    def interrupt_once(futures: Any) -> Any:
        if interrupted.is_set():
            return wait(futures)
        assert present.wait(60)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(chunks, "wait", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        for_ranges(work, 500, 1, 2)
    left, running = len(started), set(started) - set(ended)
    time.sleep(0.1)
    assert not running
    assert len(started) == left < 500


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_caller_bound_to_one_cpu_codes_on_those_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM's CPU worker: bound, told to use one thread, and without ``torch.set_num_threads``."""
    cpus = set(sorted(os.sched_getaffinity(0))[:2])
    bound = {min(cpus)}
    together = threading.Barrier(2)

    def work(start: int, stop: int) -> tuple[int, set[int], int]:
        together.wait(timeout=60)
        return start, os.sched_getaffinity(0), torch.get_num_threads()

    def call() -> Any:
        os.sched_setaffinity(0, bound)
        with on_cpus(cpus):
            assert coding_threads() == 2
            found = for_ranges(work, 20, 10, coding_threads())
        return found, os.sched_getaffinity(0), torch.get_num_threads(), coding_threads()

    before = torch.get_num_threads()
    try:
        torch._C.set_num_threads(1)
        monkeypatch.setattr(torch, "set_num_threads", None)
        with ThreadPoolExecutor(1) as caller:
            found = caller.submit(call).result()
    finally:
        monkeypatch.undo()
        torch._C.set_num_threads(before)
    assert found == ([(0, cpus, 1), (10, cpus, 1)], bound, 1, 1)
