"""One layer's whole step: with every expert resident, and with a cache whose misses are known, taken apart.

The layer is random INT4 experts of a real model's shape, put into ``DeviceExpertCache`` by the loader's own code. What
a step takes longer than the resident layer on the same ids is held against its bytes at the copy engine's rate; the
rest is overhead. Each part of a step is timed alone, over the same ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from known_misses import KnownSteps, check_outcome, first_ids, ids_of, known_steps, miss_counts
from step_report import judged

from vllm_hlwq.bench.cuda_timing import seconds_per_call
from vllm_hlwq.bench.link import host_to_device_bandwidth
from vllm_hlwq.bench.moe_shapes import MoeShape
from vllm_hlwq.bench.random_layer import marlin_backend, random_experts, use_engine_workspace
from vllm_hlwq.device_expert_cache import DeviceExpertCache
from vllm_hlwq.device_loading import load_cache
from vllm_hlwq.expert_cache import is_prompt
from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.plan_kernel import plan

DECODE_EXPERTS = {1: 8, 8: 41, 32: 80}
"""Experts that a batch names, by its tokens: of 128 at 8 a token, with the locality of ``bench/routing.py``."""
PREFILL_TOKENS = (2048, 8192)
QUICK_TOKENS = (1, 8, 2048)
CALLS = {1: 32, 8: 16, 32: 8}
"""Steps of a graph, by tokens; two of a prefill. Each call's experts are others, so caches of the GPU help little."""
PREFILL_CALLS = 2
PART_CALLS = 64
REPEATS = 10
TOLERANCE = 2**-5
"""Of the largest output: rounding differs by a few units of BF16; a wrong expert would differ by much more."""

Part = Callable[[int], Any]
"""Enqueues a part of step number i."""
Seconds = Callable[[Callable[[int], Any], int, int], float]
"""Median seconds of a call of many: the call, how many follow each other, repetitions."""


class Layer:
    """Inputs and buffers of one layer's steps.

    Args:
        shape: of the layer.
        max_tokens: rows of the largest step.
        make_cache: makes a cache of a number of slots; with a slot for each expert it plans and loads nothing.
        device: where all is.
        seconds: times calls.
    """

    def __init__(
        self,
        shape: MoeShape,
        max_tokens: int,
        make_cache: Callable[[int], DeviceExpertCache],
        device: torch.device,
        seconds: Seconds = seconds_per_call,
    ) -> None:
        self.shape, self.device, self.make_cache, self._seconds = shape, device, make_cache, seconds
        self.resident = make_cache(shape.experts)
        self.backend = self.resident.backend
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(max_tokens, shape.hidden, generator=generator).bfloat16().to(device)
        self.weights = torch.rand(max_tokens, shape.top_k, generator=generator).softmax(-1).to(device)
        self.no_padding = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self.output = torch.empty_like(self.hidden)
        shapes = self.backend.workspace_shapes(max_tokens, shape.hidden, shape.top_k)
        self._workspaces = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in shapes]

    def step(self, cache: DeviceExpertCache, ids: torch.Tensor) -> None:
        """Enqueue a step for ids ``[T, k]``; its output goes to the first T rows of ``output``."""
        tokens = len(ids)
        buffers = self.backend.buffers(*self._workspaces, ids.numel())
        inputs, output = (self.hidden[:tokens], self.weights[:tokens], ids), self.output[:tokens]
        cache.step(*inputs, output, buffers, False, self.no_padding[:tokens], None)

    def microseconds(self, call: Callable[[int], Any], calls: int) -> float:
        return 1e6 * self._seconds(call, calls, REPEATS)

    def steps_us(self, cache: DeviceExpertCache, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Microseconds of a step, over steps for ids ``[steps, T, k]``, and the output of the last of them."""
        time = self.microseconds(lambda number: self.step(cache, ids[number]), len(ids))
        return time, self.output[: ids.shape[1]].clone()

    def known_steps_us(
        self, cache: DeviceExpertCache, known: KnownSteps, ids: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """The same for a cache with misses, whose counters must say what was promised."""
        cache.reset()
        if known.first:
            self.step(cache, first_ids(known, self.shape.top_k).to(self.device))
        for step in ids:
            self.step(cache, step)
        before = cache.counts()
        found = self.steps_us(cache, ids)
        check_outcome(known, before, cache.counts())
        return found

    def parts_us(self, cache: DeviceExpertCache, ids: torch.Tensor) -> dict[str, float]:
        """Microseconds of each part of a step alone. Loads nothing, so ``cache`` must be reset before its next step.

        ``gather`` is the launches of the step with nothing to load, ``compute`` all its waves. A cache's ``blocks``
        has the resident layer's ``align`` in it.
        """
        backend, experts = self.backend, self.shape.experts
        steps, tokens, top_k = ids.shape
        buffers = backend.buffers(*self._workspaces, tokens * top_k)
        hidden, weights, output = self.hidden[:tokens], self.weights[:tokens], self.output[:tokens]
        banks, waves = [cache.slot_bank], [[backend.align(step, experts)] for step in ids]
        resident = cache.table is None
        parts: dict[str, Part] = {
            "combine": lambda number: backend.combine(buffers.out_rows, ids[number], output, all_written=resident)
        }
        if resident:
            parts["align"] = lambda number: backend.align(ids[number], experts)
        else:
            for number, step in enumerate(ids):
                plan(cache.table, step, self.no_padding[:tokens])
                waves[number] = cache.blocks(step)
            staged = cache.staging_bank.banks
            banks += [staged[wave % len(staged)] for wave in range(len(waves[0]) - 1)]
            parts |= self._parts_of_a_cache(cache, ids, len(waves[0]))

        def compute(number: int) -> None:
            for bank, blocks in zip(banks, waves[number], strict=True):
                backend.compute(bank, blocks, hidden, weights, False, buffers)

        rounds = -(-PART_CALLS // steps)  # whole periods, so that what is planned stays what it was
        times = {
            name: self.microseconds(lambda number, part=part: part(number % steps), rounds * steps)
            for name, part in parts.items()
        }
        return times | {"compute": self.microseconds(compute, steps)}

    def _parts_of_a_cache(self, cache: DeviceExpertCache, ids: torch.Tensor, num_waves: int) -> dict[str, Part]:
        table, store, no_padding = cache.table, cache.store, self.no_padding[: ids.shape[1]]
        gather, nothing = Gather(store.layout, cache.slot_bank), torch.zeros_like(table.load_count)

        def gather_nothing(_: int) -> None:
            for _ in range(num_waves):
                gather(store.device_address, table.load_experts, table.load_slots, nothing)

        return {
            "plan": lambda number: plan(table, ids[number], no_padding),
            "blocks": lambda number: cache.blocks(ids[number]),
            "gather": gather_nothing,
        }


def cases(shape: MoeShape, slots: int, quick: bool) -> list[tuple[int, int, int]]:
    """Tokens, experts that they name, and misses, of the steps to measure with a number of slots."""
    decode = [(tokens, named) for tokens, named in DECODE_EXPERTS.items() if not quick or tokens in QUICK_TOKENS]
    found = []
    for tokens, named in decode:
        counts = miss_counts(shape.experts, slots, named)
        found += [(tokens, named, misses) for misses in (sorted({counts[0], counts[-1]}) if quick else counts)]
    prefill = [tokens for tokens in PREFILL_TOKENS if not quick or tokens in QUICK_TOKENS]
    return found + [(tokens, shape.experts, shape.experts - slots) for tokens in prefill]


def measure_case(
    layer: Layer, cache: DeviceExpertCache, tokens: int, named: int, misses: int, bandwidth: float
) -> dict[str, Any]:
    """One row: a step's time, the resident layer's for the same ids, and the step's parts.

    Raises:
        AssertionError: the cache missed other than known, or its output is not the resident layer's.
    """
    shape = layer.shape
    prompt = is_prompt(tokens * shape.top_k, shape.experts)
    known = known_steps(shape.experts, cache.num_slots, named, misses, CALLS.get(tokens, PREFILL_CALLS), prompt)
    ids = ids_of(known, tokens, layer.shape.top_k).to(layer.device)
    resident_us, wanted = layer.steps_us(layer.resident, ids)
    step_us = resident_us
    if cache is not layer.resident:
        step_us, output = layer.known_steps_us(cache, known, ids)
        error, largest = (output.float() - wanted.float()).abs().max(), wanted.float().abs().max()
        if not error <= TOLERANCE * largest:
            raise AssertionError(
                f"{tokens} tokens, {cache.num_slots} slots, {misses} misses: the output differs from the resident "
                f"layer's by {error:.4g}, of at most {largest:.4g}"
            )
    link_us = 1e6 * misses * cache.record_bytes / bandwidth
    step = {"tokens": tokens, "slots": cache.num_slots, "distinct": named, "misses": misses}
    return step | judged(step_us, resident_us, link_us, layer.parts_us(cache, ids))


def measure_layer(layer: Layer, all_slots: tuple[int, ...], bandwidth: float, quick: bool) -> list[dict[str, Any]]:
    """Rows of each number of slots; a cache lives no longer than its rows."""
    rows = []
    for slots in all_slots:
        cache = layer.resident if slots == layer.shape.experts else layer.make_cache(slots)
        rows += [measure_case(layer, cache, *case, bandwidth) for case in cases(layer.shape, slots, quick)]
        del cache
    return rows


def measure(shape: MoeShape, quick: bool) -> dict[str, Any]:
    """Steps over tokens, slots and misses; with ``quick`` a few of them."""
    device = torch.device("cuda", torch.cuda.current_device())
    backend, raw = marlin_backend(shape), random_experts(shape)
    use_engine_workspace(device)
    max_tokens = max(QUICK_TOKENS if quick else PREFILL_TOKENS)

    def make_cache(slots: int) -> DeviceExpertCache:
        return load_cache(raw, backend, slots, 1, shape.top_k, max_tokens, None, [], device)

    bandwidth = host_to_device_bandwidth(device)
    experts = shape.experts
    all_slots = (experts, experts // 4) if quick else (experts, experts - 1, experts // 2, experts // 4, 4)
    # A stream that vLLM has seen set: it would else put its own in place in the middle of a step.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        layer = Layer(shape, max_tokens, make_cache, device)
        rows = measure_layer(layer, all_slots, bandwidth, quick)
    return {"record_bytes": layer.resident.record_bytes, "copy_gb_per_s": bandwidth / 1e9, "rows": rows}
