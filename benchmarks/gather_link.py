"""How fast experts' records cross the link: the copy engine against the gather kernel, and what the kernel's sizes do.

Every measurement brings all experts of the store over once, so that caches do not help, and every variant of the
kernel is checked byte for byte before it is timed.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gather_bulk import VARIANTS, CudaGather, build, load

from vllm_hlwq.bench.cuda_timing import seconds_per_call
from vllm_hlwq.bench.moe_shapes import MoeShape
from vllm_hlwq.cudart import CudaRuntime
from vllm_hlwq.gather_kernel import CHUNK_BYTES, PROGRAMS, WARPS, Gather
from vllm_hlwq.host_store import HostStore
from vllm_hlwq.weight_bank import WeightBank

EXPERTS_A_CALL = (1, 2, 4, 8, 16, 32, 64, 128)
SWEPT_EXPERTS = (1, 8)
QUICK_EXPERTS_A_CALL = (1, 8)
PROGRAM_COUNTS = (4, 8, 16, 32, 64, 132)
ROUNDS = 3
"""Of copy engine and kernel in turn, of which the fastest count: others on the same host use its memory too."""
SHARED_MEMORY_BYTES = 220 * 1024  # a block's most on Hopper, less what the barriers need


class Link:
    """A page-locked store of random records, and lists that bring every expert over once."""

    def __init__(self, shape: MoeShape) -> None:
        device = torch.device("cuda")
        self.layout = shape.marlin_layout()
        self.experts = shape.experts
        self.store = HostStore(shape.experts, self.layout, device)
        generator = torch.Generator().manual_seed(0)
        for name in self.layout:
            field = self.store.field(name)
            words = field.numel() * field.itemsize // 8
            raw = torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, generator=generator)
            field.copy_(raw.view(field.dtype).view(field.shape))
        self.store.page_lock()
        self.bank = WeightBank.allocate(shape.experts, self.layout, device)
        self.order = torch.randperm(shape.experts, generator=generator)
        self.rows = torch.randperm(shape.experts, generator=generator)
        self.expert_list = self.order.int().to(device)
        self.row_list = self.rows.int().to(device)
        # Element n is n: the count of any call, without a launch that would write it.
        self.counts = torch.arange(shape.experts + 1, dtype=torch.int32, device=device)
        self.expected = WeightBank.allocate(shape.experts, self.layout, device)
        self.expected.load(self.store, self.order, self.rows)

    def check(self, gather: Gather) -> None:
        """Raise if the kernel leaves one byte of the bank wrong."""
        for tensor in self.bank.fields.values():
            tensor.view(torch.uint8).fill_(0xA5)
        for number in range(2):
            self.call(gather, self.experts // 2)(number)
        for name, tensor in self.bank.fields.items():
            if not torch.equal(tensor.view(torch.uint8), self.expected.fields[name].view(torch.uint8)):
                raise AssertionError(f"{settings_of(gather)}: field {name} differs from the store")

    def call(self, gather: Gather, experts: int) -> Callable[[int], None]:
        """Call number i loads entries ``i * experts .. (i + 1) * experts`` of the list."""
        address = self.store.device_address
        assert address is not None

        def call(number: int) -> None:
            first = number * experts
            count = self.counts[first + experts : first + experts + 1]
            gather(address, self.expert_list, self.row_list, count, first)

        return call

    def gather_rate(self, gather: Gather, experts: int) -> float:
        """Bytes a second with ``experts`` in each launch."""
        seconds = seconds_per_call(self.call(gather, experts), self.experts // experts)
        return experts * self.layout.record_bytes / seconds

    def copy_rate(self, experts: int, together: bool) -> float:
        """Bytes a second of the copy engine: a copy for each record, or one for ``experts`` neighbouring records."""
        size = self.layout.record_bytes
        scratch = torch.empty(self.experts, size, dtype=torch.uint8, device="cuda")
        runtime = CudaRuntime()
        to_device = 1  # cudaMemcpyHostToDevice
        order = self.order.tolist()

        def copy(record: int, row: int, records: int) -> None:
            target, source = scratch.data_ptr() + row * size, self.store.address + record * size
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            runtime.check(
                runtime.library.cudaMemcpyAsync(
                    ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(records * size), to_device, stream
                )
            )

        def call(number: int) -> None:
            first = number * experts
            if together:
                copy(first, first, experts)
            else:
                for row in range(first, first + experts):
                    copy(order[row], row, 1)

        # Some drivers replay copy nodes slower than they run queued copies: the engine's rate is the better of both.
        seconds = min(seconds_per_call(call, self.experts // experts, graph=graph) for graph in (True, False))
        return experts * size / seconds

    def empty_seconds(self, gather: Gather) -> float:
        """A launch with nothing to load."""
        address = self.store.device_address
        assert address is not None
        nothing = self.counts[:1]
        return seconds_per_call(lambda _: gather(address, self.expert_list, self.row_list, nothing), calls=100)


def settings_of(gather: Gather) -> dict[str, Any]:
    if isinstance(gather, CudaGather):
        kernel = {"kernel": VARIANTS[gather.number], "stages": gather.stages}
    else:
        kernel = {"kernel": "triton", "warps": gather.warps, "read_cache": gather.read_cache}
    return kernel | {"programs": gather.programs, "chunk_bytes": gather.chunk_bytes}


def triton_variants(link: Link) -> Iterator[Gather]:
    for programs, chunk, warps, cache in product(PROGRAM_COUNTS, (4096, 8192, 16384, 32768), (4, 8), ("", ".cg")):
        if chunk >= 16 * 32 * warps:
            yield Gather(link.layout, link.bank, programs, chunk, warps, cache)


def cuda_variants(link: Link, library: ctypes.CDLL) -> Iterator[Gather]:
    for programs, variant in product(PROGRAM_COUNTS, VARIANTS[:2]):
        yield CudaGather(library, variant, link.layout, link.bank, programs, 32768)
    if torch.cuda.get_device_capability() >= (9, 0):
        for programs, chunk, stages in product(PROGRAM_COUNTS, (8192, 16384, 32768), (4, 8)):
            if chunk * stages <= SHARED_MEMORY_BYTES:
                yield CudaGather(library, "bulk", link.layout, link.bank, programs, chunk, stages)


def sweep(link: Link, variants: Iterator[Gather]) -> list[dict[str, Any]]:
    """Rate of every variant, checked first, at a few numbers of experts a launch."""
    found = []
    for gather in variants:
        link.check(gather)
        rates = {str(experts): link.gather_rate(gather, experts) / 1e9 for experts in SWEPT_EXPERTS}
        found.append(settings_of(gather) | {"gb_per_s": rates})
    return found


def pcie_link() -> dict[str, str]:
    """The link as the driver sees it now; empty without nvidia-smi."""
    names = ("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, values, strict=True))


def measure(shape: MoeShape, swept: bool, cuda_cpp: str | None, quick: bool = False) -> dict[str, Any]:
    """Copy engine against gather at 1 to 128 experts a launch.

    Args:
        shape: the layer.
        swept: try the kernel's sizes too, about a minute.
        cuda_cpp: and the CUDA C++ variants out of this library of ``gather_bulk.py``; nvcc builds it first if "".
        quick: only two numbers of experts a launch.
    """
    link = Link(shape)
    gather = Gather(link.layout, link.bank)
    link.check(gather)
    rates = []
    for experts in (n for n in (QUICK_EXPERTS_A_CALL if quick else EXPERTS_A_CALL) if n <= shape.experts):
        copies, gathers = [], []
        for _ in range(ROUNDS):
            copies += [link.copy_rate(experts, together) for together in (False, True)]
            gathers.append(link.gather_rate(gather, experts))
        copy, rate = max(copies) / 1e9, max(gathers) / 1e9
        rates.append({"experts": experts, "copy_gb_per_s": copy, "gather_gb_per_s": rate, "share": rate / copy})
    result: dict[str, Any] = {
        "record_bytes": link.layout.record_bytes,
        "pcie": pcie_link(),
        "default": {"programs": PROGRAMS, "chunk_bytes": CHUNK_BYTES, "warps": WARPS},
        "empty_us": link.empty_seconds(gather) * 1e6,
        "rates": rates,
    }
    if swept:
        result["sweep"] = sweep(link, triton_variants(link))
    if cuda_cpp is not None:
        with tempfile.TemporaryDirectory(prefix="gather-") as folder:
            library = Path(cuda_cpp or f"{folder}/gather_bulk.so")
            if not cuda_cpp:
                build(library, torch.cuda.get_device_capability())
            result["cuda_sweep"] = sweep(link, cuda_variants(link, load(library)))
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"records of {result['record_bytes']:,} bytes, {result['pcie']}; empty gather {result['empty_us']:.1f} us",
        f"{'experts':>8} {'copy engine GB/s':>18} {'gather GB/s':>12} {'share':>7}",
    ]
    for row in result["rates"]:
        lines.append(
            f"{row['experts']:>8} {row['copy_gb_per_s']:>18.1f} {row['gather_gb_per_s']:>12.1f} {row['share']:>7.0%}"
        )
    for name in ("sweep", "cuda_sweep"):
        for experts in map(str, SWEPT_EXPERTS if name in result else ()):
            lines.append(f"{name}, {experts} experts a launch, best 5:")
            for row in sorted(result[name], key=lambda row: -row["gb_per_s"][experts])[:5]:
                settings = {key: value for key, value in row.items() if key != "gb_per_s"}
                lines.append(f"  {row['gb_per_s'][experts]:6.1f} GB/s  {settings}")
    return "\n".join(lines)
