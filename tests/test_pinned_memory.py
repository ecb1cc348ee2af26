"""Host memory for experts: its size, where it comes from, and that page-locking ends with its owner.

mlock(2) stands in for cudaHostRegister: like it, it page-locks a region, shows that in /proc and fails at the limit.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from vllm_hlwq import host_store, pinned_memory
from vllm_hlwq.cudart import CudaError
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.expert_loading import LOCKING_THREADS, ExpertLoading
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.pinned_memory import HostRegion, describe_refusal, device_numa_node, prefer_node
from vllm_hlwq.progress_bars import SILENT

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
NUMA_MAPS = Path("/proc/self/numa_maps")
ALLOCATOR_NOISE = 2**24
"""Bytes by which Python's and torch's own allocations may change the address space meanwhile."""
LAYOUT = RecordLayout({"w13_weight": ((64, 32), torch.int32), "w2_scale": ((33,), torch.bfloat16)})


class MemoryLock:
    """A ``PageLocker`` made of mlock(2); remembers what it did, and like CUDA locks no memory twice."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.sizes: dict[int, int] = {}
        self.released: list[int] = []

    def host_register(self, address: int, nbytes: int) -> None:
        if address in self.sizes and address not in self.released:
            raise CudaError("part or all of the requested memory range is already mapped")
        if self.libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)):
            raise CudaError(os.strerror(ctypes.get_errno()))
        self.sizes[address] = nbytes

    def host_unregister(self, address: int) -> None:
        # Fails with ENOMEM when the region is already unmapped.
        assert self.libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(self.sizes[address])) == 0
        self.released.append(address)
        print(f"released {self.sizes[address]} bytes")

    def device_address(self, address: int) -> int:
        return address + (1 << 56)


def mapping(address: int) -> dict[str, str]:
    """What /proc/self/smaps says of the mapping that an address lies in."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":" if line[0].isupper() else " ")
        if "-" in key:
            if found:
                break
            start, end = (int(part, 16) for part in key.split("-"))
            inside = start <= address < end
        elif inside:
            found[key] = value.strip()
    return found


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_region_has_its_exact_size_and_is_unmapped_with_its_last_view() -> None:
    nbytes = 2**28 + 2**20  # torch's pinned allocator would take 2**29
    gc.collect()
    before = address_space()
    store = HostStore(1, RecordLayout({"w": ((nbytes,), torch.uint8)}))
    assert nbytes <= address_space() - before < nbytes + ALLOCATOR_NOISE
    view = store.field("w")[0, -1:]
    address = store.address
    del store
    view.fill_(7)
    assert mapping(address)["Rss"] != "0 kB"
    del view
    assert address_space() - before < ALLOCATOR_NOISE


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no transparent huge pages")
def test_huge_pages_are_advised() -> None:
    region = HostRegion(2**22)
    assert "hg" in mapping(region.address)["VmFlags"].split()


def test_pages_can_be_made_ahead() -> None:
    region = HostRegion(2**22)
    before = mapping(region.address)["Rss"]
    assert region.populate()
    assert (before, mapping(region.address)["Rss"]) == ("0 kB", "4096 kB")


def test_page_locking_ends_with_the_store_although_views_live_on() -> None:
    lock = MemoryLock()
    store = HostStore(3, LAYOUT)
    store.page_lock(lock)
    view, address = store.field("w13_weight"), store.address
    assert store.device_address == address + (1 << 56)
    assert lock.sizes == {address: 3 * LAYOUT.record_bytes}
    assert HostRegion.page_locked_bytes == store.nbytes
    assert "lo" in mapping(address)["VmFlags"].split()
    del store
    assert lock.released == [address]
    assert "lo" not in mapping(address)["VmFlags"].split()
    assert HostRegion.page_locked_bytes == 0
    assert not view.any()


def test_an_interrupted_load_leaves_nothing_page_locked() -> None:
    lock = MemoryLock()

    def load() -> None:
        stores = [HostStore(2, LAYOUT) for _ in range(3)]
        for store in stores[:2]:
            store.page_lock(lock)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load()
    gc.collect()
    assert sorted(lock.released) == sorted(lock.sizes)
    assert len(lock.sizes) == 2
    assert HostRegion.page_locked_bytes == 0


def test_threads_page_lock_beside_the_loading() -> None:
    lock, stores = MemoryLock(), [HostStore(3, LAYOUT) for _ in range(20)]
    current = ExpertLoading(SILENT)
    for store in stores:
        current.page_lock(store, torch.device("cpu"), lock)
    for store in stores:
        store.page_lock()
        assert store.device_address == store.address + (1 << 56)
    assert lock.sizes == {store.address: store.nbytes for store in stores}
    assert HostRegion.page_locked_bytes == 20 * stores[0].nbytes
    current.close()
    del store, stores
    assert sorted(lock.released) == sorted(lock.sizes)
    assert HostRegion.page_locked_bytes == 0


def test_what_a_thread_may_not_page_lock_is_refused_where_the_layer_is_finished() -> None:
    class Refusing(MemoryLock):
        def host_register(self, address: int, nbytes: int) -> None:
            raise CudaError("operation not permitted")

    store, current = HostStore(3, LAYOUT), ExpertLoading(SILENT)
    current.page_lock(store, torch.device("cpu"), Refusing())
    with pytest.raises(ExpertCacheError, match=rf"^page-locking {store.nbytes} bytes .*operation not permitted"):
        store.page_lock()
    assert HostRegion.page_locked_bytes == 0


def test_an_interrupted_loading_page_locks_no_more() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(MemoryLock):
        def host_register(self, address: int, nbytes: int) -> None:
            begun.set()
            go_on.wait(60)
            super().host_register(address, nbytes)

    lock, stores, current = Slow(), [HostStore(3, LAYOUT) for _ in range(20)], ExpertLoading(SILENT)
    for store in stores:
        current.page_lock(store, torch.device("cpu"), lock)
    begun.wait(60)
    threading.Timer(0.1, go_on.set).start()
    current.close()
    assert 1 <= len(lock.sizes) <= LOCKING_THREADS
    del store, stores
    gc.collect()
    assert sorted(lock.released) == sorted(lock.sizes)
    assert HostRegion.page_locked_bytes == 0


def in_a_process(body: str) -> subprocess.CompletedProcess[str]:
    code = "import os, resource, sys\nfrom test_pinned_memory import *\nstore = HostStore(256, LAYOUT)\n" + body
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)])
def test_page_locking_ends_before_the_process_does(ending: str, status: int) -> None:
    result = in_a_process(f"store.page_lock(MemoryLock())\n{ending}\n")
    assert result.returncode == status, result.stderr
    assert result.stdout == f"released {256 * LAYOUT.record_bytes} bytes\n"


def test_a_refusal_says_what_was_asked_and_which_limit_to_raise() -> None:
    # Root may lock what it likes, so root becomes nobody first.
    result = in_a_process(
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "os.getuid() or os.setuid(65534)\n"
        "lock, small = MemoryLock(), HostStore(2, LAYOUT)\n"
        "small.page_lock(lock)\n"
        "with pytest.raises(ValueError) as refused:\n    store.page_lock(lock)\n"
        "print(refused.value)\n"
        "store.field('w13_weight').fill_(1)\n"
    )
    asked, held = 256 * LAYOUT.record_bytes, 2 * LAYOUT.record_bytes
    assert result.stdout == (
        f"page-locking {asked} bytes of expert weights was refused (Cannot allocate memory) after {held} bytes; the "
        "locked-memory limit is 65536 bytes: raise it (ulimit -l unlimited; docker --ulimit memlock=-1; systemd "
        f"LimitMEMLOCK=infinity)\nreleased {held} bytes\n"
    ), result.stderr


def test_a_refusal_under_wsl_names_its_setting() -> None:
    kernel = "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@f9c826d3017f) (gcc 11.2.0) #1 SMP"
    message = describe_refusal(5000, 70, "CUDA error 2: out of memory", kernel)
    assert message.startswith("page-locking 5000 bytes of expert weights was refused (CUDA error 2: out of memory)")
    assert "memory= in .wslconfig" in message


def test_a_release_that_cuda_refuses_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(MemoryLock):
        def host_unregister(self, address: int) -> None:
            super().host_unregister(address)
            raise CudaError("CUDA error 700: an illegal memory access was encountered")

    store = HostStore(1, LAYOUT)
    store.page_lock(Faulty())
    logging.getLogger("vllm").propagate, before = True, logging.getLogger("vllm").propagate
    del store
    logging.getLogger("vllm").propagate = before
    assert f"{LAYOUT.record_bytes} bytes stay page-locked until this process ends: CUDA error 700" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA runtime is loaded here")
def test_without_cuda_there_is_no_runtime_to_page_lock_with() -> None:
    with pytest.raises(CudaError, match="libcudart"):
        HostStore(1, LAYOUT).page_lock()


@pytest.mark.parametrize(("content", "node"), [("0\n", 0), ("1\n", 1), ("-1\n", None), ("", None), (None, None)])
def test_the_numa_node_of_a_pci_device(tmp_path: Path, content: str | None, node: int | None) -> None:
    device = tmp_path / "0000:17:00.0"
    device.mkdir()
    if content is not None:
        (device / "numa_node").write_text(content)
    assert device_numa_node("0000:17:00.0", tmp_path) == node


@pytest.mark.skipif(not NUMA_MAPS.exists(), reason="this kernel does not tell where memory lies")
def test_memory_of_a_node_is_preferred_where_the_system_lets_us() -> None:
    region = HostRegion(2**22)
    if not prefer_node(region.address, region.nbytes, 0):
        pytest.skip("this system forbids mbind")
    line = next(line for line in NUMA_MAPS.read_text().splitlines() if line.startswith(f"{region.address:x} "))
    assert line.split()[1] == "prefer:0"


def test_memory_near_the_device_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoDevices:
        def pci_id(self, index: int) -> str:
            return f"0000:{index}7:00.0"

    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(host_store, "CudaRuntime", TwoDevices)
    monkeypatch.setattr(host_store, "device_numa_node", {"0000:07:00.0": 4, "0000:17:00.0": 5}.get)
    monkeypatch.setattr(pinned_memory, "prefer_node", lambda *arguments: asked.append(arguments))
    store = HostStore(3, LAYOUT, torch.device("cuda", 1))
    assert asked == [(store.address, store.nbytes, 5)]
    HostStore(3, LAYOUT, torch.device("cpu"))
    assert len(asked) == 1


def test_a_node_that_cannot_be_preferred_is_no_failure() -> None:
    region = HostRegion(2**16, numa_node=1000)
    assert not prefer_node(region.address, region.nbytes, 1000)
    region.buffer[-1] = 7
    assert region.buffer[-1] == 7
