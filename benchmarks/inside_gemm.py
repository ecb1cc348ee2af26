"""Experts that are not on the GPU, loaded before the GEMM or read over the link from inside it.

``gather``: the gather kernel loads what a call names into a bank, and vLLM's Marlin kernels compute from the bank.
``inside``: the same Marlin kernels compute from weights that lie in host memory (``HostMappedBank``): codes and scales,
as with ``--cpu-offload-gb``. ``resident``: from the bank, with nothing to load.

Calls name other experts until every one has been named, so that caches do not help. Each call is the two products and
the activation between them; alignment and the sum over top-k, the same for all three, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gather_link import EXPERTS_A_CALL, QUICK_EXPERTS_A_CALL, ROUNDS
from layer_step import TOLERANCE, Seconds

from vllm_hlwq.bench.cuda_timing import seconds_per_call
from vllm_hlwq.bench.host_mapped import HostMappedBank
from vllm_hlwq.bench.link import host_to_device_bandwidth
from vllm_hlwq.bench.moe_shapes import MoeShape
from vllm_hlwq.bench.random_layer import marlin_backend, random_experts, use_engine_workspace
from vllm_hlwq.device_backend import Buffers, DeviceBackend
from vllm_hlwq.device_loading import kernel_layout, resident_bank
from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.weight_bank import WeightBank

LARGE_TOKENS = (512, 2048, 8192)
"""Of batches that name every expert: with 8 of 128 a token, one block of rows an expert, two, and eight."""
QUICK_LARGE_TOKENS = (2048,)
REPEATS = 5

Way = Callable[[int], None]
"""Enqueues call number i."""


@dataclass(frozen=True)
class Case:
    """What a call computes: ``tokens`` tokens that name ``experts`` experts in all, ``top_k`` each."""

    experts: int
    tokens: int
    top_k: int


def cases(shape: MoeShape, quick: bool) -> list[Case]:
    """As few tokens as name 1 to all experts, with a smaller top-k below the layer's; then many tokens."""
    counts = [count for count in (QUICK_EXPERTS_A_CALL if quick else EXPERTS_A_CALL) if count <= shape.experts]
    found = []
    for count in counts:
        top_k = min(count, shape.top_k)
        found.append(Case(count, -(-count // top_k), top_k))
    large = QUICK_LARGE_TOKENS if quick else LARGE_TOKENS
    return found + [Case(shape.experts, tokens, shape.top_k) for tokens in large]


def ids_naming(experts: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """int32 ``[T, k]`` that name all of ``experts`` ``[n]`` and no other, each as often as the next, once a token.

    Raises:
        ValueError: they are fewer than a token has, or more than the tokens can name.
    """
    if not top_k <= len(experts) <= tokens * top_k:
        raise ValueError(f"{tokens} tokens of {top_k} experts cannot name {len(experts)} in all")
    return experts.int()[torch.arange(tokens * top_k) % len(experts)].view(tokens, top_k)


class Ways:
    """The three ways over one layer.

    Args:
        shape: of the layer.
        backend: computes.
        store: the experts in the kernels' layout, page-locked.
        bank: a row for each expert, row = expert; overwritten.
        mapped: the same experts in host memory.
        max_tokens: rows of the largest call.
        seconds: times calls.
    """

    def __init__(
        self,
        shape: MoeShape,
        backend: DeviceBackend,
        store: HostStore,
        bank: WeightBank,
        mapped: WeightBank,
        max_tokens: int,
        seconds: Seconds = seconds_per_call,
    ) -> None:
        self.shape, self.backend, self.store, self.bank, self.mapped = shape, backend, store, bank, mapped
        self._seconds = seconds
        self._gather = Gather(store.layout, bank)
        self.device = next(iter(bank.fields.values())).device
        self._generator = torch.Generator().manual_seed(2)
        self.hidden = torch.randn(max_tokens, shape.hidden, generator=self._generator).bfloat16().to(self.device)
        shapes = backend.workspace_shapes(max_tokens, shape.hidden, shape.top_k)
        self._workspaces = [torch.empty(size, dtype=torch.bfloat16, device=self.device) for size in shapes]
        self.order = torch.randperm(shape.experts, generator=self._generator)
        self._list = self.order.int().to(self.device)
        # Element n is n: the count of any call, without a launch that would write it.
        self._counts = torch.arange(shape.experts + 1, dtype=torch.int32, device=self.device)

    def row(self, case: Case) -> dict[str, Any]:
        """Times of a case, after its outputs have been compared.

        Raises:
            AssertionError: the three ways do not compute the same.
        """
        calls = self.shape.experts // case.experts
        buffers = self.backend.buffers(*self._workspaces, case.tokens * case.top_k)
        ways = self._ways(case, calls, buffers)
        same_bits = self._check(case, ways, calls, buffers)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                times[name].append(self._seconds(way, calls, REPEATS))
        block_size = self.backend.block_size(case.tokens, case.top_k, self.shape.experts)
        rows_an_expert = -(-case.tokens * case.top_k // case.experts)
        row = {"experts": case.experts, "tokens": case.tokens, "top_k": case.top_k}
        found = {"blocks": -(-rows_an_expert // block_size), "same_bits": same_bits}
        missing_bytes = case.experts * self.store.layout.record_bytes
        return row | found | compared(missing_bytes, **{name: min(seconds) for name, seconds in times.items()})

    def _ways(self, case: Case, calls: int, buffers: Buffers) -> dict[str, Way]:
        """In an order in which the bank is loaded before it is only read."""
        address = self.store.device_address
        assert address is not None
        hidden = self.hidden[: case.tokens]
        weights = torch.rand(case.tokens, case.top_k, generator=self._generator).softmax(-1).to(self.device)
        named = self.order[: calls * case.experts].view(calls, case.experts)
        ids = [ids_naming(experts, case.tokens, case.top_k).to(self.device) for experts in named]
        blocks = [self.backend.align(step, self.shape.experts) for step in ids]

        def compute(bank: WeightBank, number: int) -> None:
            self.backend.compute(bank, blocks[number], hidden, weights, False, buffers)

        def gather(number: int) -> None:
            first = number * case.experts
            count = self._counts[first + case.experts : first + case.experts + 1]
            self._gather(address, self._list, self._list, count, first)
            compute(self.bank, number)

        return {
            "gather": gather,
            "inside": lambda number: compute(self.mapped, number),
            "resident": lambda number: compute(self.bank, number),
        }

    def _check(self, case: Case, ways: dict[str, Way], calls: int, buffers: Buffers) -> bool:
        """Compare the outputs of all calls; return whether they have the same bits."""
        for tensor in self.bank.fields.values():
            tensor.view(torch.uint8).fill_(0xA5)
        found = {}
        for name, way in ways.items():
            outputs = []
            for number in range(calls):
                buffers.out_rows.fill_(torch.nan)
                way(number)
                outputs.append(buffers.out_rows.clone())
            found[name] = torch.cat(outputs)
        wanted = found.pop("resident")
        largest = float(wanted.float().abs().max())
        for name, output in found.items():
            error = float((output.float() - wanted.float()).abs().max())
            if not (error <= TOLERANCE * largest and largest > 0):
                raise AssertionError(f"{case}: {name} differs from resident by {error:.4g}, of at most {largest:.4g}")
        return all(torch.equal(output, wanted) for output in found.values())


def compared(missing_bytes: int, gather: float, inside: float, resident: float) -> dict[str, float]:
    """Microseconds of a call each way, the missing experts' bytes a second, and how the two ways compare.

    Args:
        missing_bytes: bytes of the experts that a call names, all of them missing.
        gather, inside, resident: seconds of a call.
    """
    return {
        "gather_us": gather * 1e6,
        "inside_us": inside * 1e6,
        "resident_us": resident * 1e6,
        "gather_gb_per_s": missing_bytes / gather / 1e9,
        "inside_gb_per_s": missing_bytes / inside / 1e9,
        "ratio": gather / inside,
    }


def page_locked_store(bank: WeightBank, device: torch.device) -> HostStore:
    """The experts of a bank as records that the gather kernel on ``device`` reads."""
    layout = RecordLayout({name: (tuple(field.shape[1:]), field.dtype) for name, field in bank.fields.items()})
    store = HostStore(bank.rows, layout, device)
    for name in layout:
        store.field(name).copy_(bank.fields[name])
    store.page_lock()
    return store


def measure(shape: MoeShape, quick: bool = False) -> dict[str, Any]:
    """The three ways over numbers of experts and tokens; with ``quick`` a few of them."""
    device = torch.device("cuda", torch.cuda.current_device())
    backend, raw = marlin_backend(shape), random_experts(shape)
    use_engine_workspace(device)
    bandwidth = host_to_device_bandwidth(device)
    chosen = cases(shape, quick)
    # A stream that vLLM has seen set: it would else put its own in place in the middle of a call.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        bank = resident_bank(raw, kernel_layout(raw, backend, device), backend, device)
        del raw
        mapped = HostMappedBank(bank.fields, device)
        store, max_tokens = page_locked_store(bank, device), max(case.tokens for case in chosen)
        ways = Ways(shape, backend, store, bank, mapped, max_tokens)
        rows = [ways.row(case) for case in chosen]
    return {"record_bytes": store.layout.record_bytes, "copy_gb_per_s": bandwidth / 1e9, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"no expert on the GPU, microseconds a call; records of {result['record_bytes']:,} bytes, copy engine "
        f"{result['copy_gb_per_s']:.1f} GB/s; same bits in {sum(row['same_bits'] for row in result['rows'])} of "
        f"{len(result['rows'])} cases",
        f"{'experts':>8} {'tokens':>7} {'top-k':>6} {'blocks':>7} {'gather+GEMM':>12} {'inside':>10} {'resident':>9} "
        f"{'gather GB/s':>12} {'inside GB/s':>12} {'gather/inside':>14}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['experts']:>8} {row['tokens']:>7} {row['top_k']:>6} {row['blocks']:>7} {row['gather_us']:>12.1f} "
            f"{row['inside_us']:>10.1f} {row['resident_us']:>9.1f} {row['gather_gb_per_s']:>12.1f} "
            f"{row['inside_gb_per_s']:>12.1f} {row['ratio']:>14.2f}"
        )
    return "\n".join(lines)
