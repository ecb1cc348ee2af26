"""A region of host memory that the GPU reads: mapped at its exact size, near the GPU, page-locked, and given back.

torch's pinned allocator is not used because it rounds sizes up to powers of two. Huge pages are advised because the
GPU's and the processor's page tables of tens of gigabytes are otherwise slow to fill and to walk.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import resource
import threading
import weakref
from pathlib import Path

from .cudart import CudaError, PageLocker
from .errors import ExpertCacheError

logger = logging.getLogger("vllm.expert_cache")

PCI_DEVICES = Path("/sys/bus/pci/devices")
MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the mbind system call; glibc has no function for it."""
MPOL_PREFERRED = 1
MADV_POPULATE_WRITE = 23


class HostRegion:
    """Anonymous memory of exactly ``nbytes``, zero until written; unmapped when its last user is gone.

    Users that are buffers over it (tensors) keep the mapping alive, so page-locking always ends before the mapping.
    """

    page_locked_bytes = 0
    """Bytes that all regions of this process have page-locked now; of all threads, so changed under ``_counting``."""
    _counting = threading.Lock()

    def __init__(self, nbytes: int, numa_node: int | None = None) -> None:
        """Map memory.

        Args:
            nbytes: size.
            numa_node: where pages should come from while that node has room; None for no preference.

        Raises:
            OSError, ValueError: the system refuses the mapping.
        """
        self.nbytes = nbytes
        self.buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        handle = ctypes.c_char.from_buffer(self.buffer)
        self.address = ctypes.addressof(handle)
        advise_huge_pages(self.buffer)
        if numa_node is not None:
            prefer_node(self.address, nbytes, numa_node)

    def populate(self) -> bool:
        """Let the system make all pages now, without Python's lock; page-locking then finds them there.

        Returns:
            Whether it did; Linux can from 5.14 on.
        """
        region, size = ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes)
        if ctypes.CDLL(None, use_errno=True).madvise(region, size, ctypes.c_int(MADV_POPULATE_WRITE)) == 0:
            return True
        logger.debug("Expert cache: pages are not made ahead: %s", os.strerror(ctypes.get_errno()))
        return False

    def page_lock(self, runtime: PageLocker) -> int:
        """Register the region with CUDA until this object is gone or the process exits.

        Returns:
            The address at which kernels on any device of the process read the region.

        Raises:
            ExpertCacheError: refused, mostly because of a limit on locked memory.
        """
        try:
            runtime.host_register(self.address, self.nbytes)
        except CudaError as error:
            raise ExpertCacheError(describe_refusal(self.nbytes, HostRegion.page_locked_bytes, str(error))) from None
        HostRegion.count(self.nbytes)
        weakref.finalize(self, unlock, runtime, self.address, self.nbytes)
        return runtime.device_address(self.address)

    @classmethod
    def count(cls, nbytes: int) -> None:
        """Note that ``nbytes`` more are page-locked."""
        with cls._counting:
            cls.page_locked_bytes += nbytes


def unlock(runtime: PageLocker, address: int, nbytes: int) -> None:
    """End the page-locking of a region; one that CUDA will not end, after a fault, ends with the process."""
    HostRegion.count(-nbytes)
    try:
        runtime.host_unregister(address)
    except CudaError as error:
        logger.warning("Expert cache: %d bytes stay page-locked until this process ends: %s", nbytes, error)


def describe_refusal(nbytes: int, locked: int, reason: str, kernel: str | None = None) -> str:
    """One line for page-locking that was refused: what was asked, and which limit to raise.

    Args:
        nbytes: bytes asked for.
        locked: bytes that were granted before.
        reason: CUDA's words.
        kernel: the kernel's version line, by default this system's.
    """
    kernel = Path("/proc/version").read_text() if kernel is None else kernel
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if "microsoft" in kernel.lower():
        remedy = "Windows lets WSL2 page-lock only a part of its memory: raise memory= in .wslconfig and restart WSL"
    elif limit == resource.RLIM_INFINITY:
        remedy = "the locked-memory limit is unlimited, so free host memory (or raise the container's memory limit)"
    else:
        remedy = (
            f"the locked-memory limit is {limit} bytes: raise it (ulimit -l unlimited; docker --ulimit memlock=-1; "
            "systemd LimitMEMLOCK=infinity)"
        )
    return f"page-locking {nbytes} bytes of expert weights was refused ({reason}) after {locked} bytes; {remedy}"


def advise_huge_pages(buffer: mmap.mmap) -> None:
    """Ask for transparent huge pages, where the system has them."""
    try:
        buffer.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError) as error:
        logger.debug("Expert cache: no huge pages for host memory: %s", error)


def device_numa_node(pci_id: str, devices: Path = PCI_DEVICES) -> int | None:
    """NUMA node that a PCI device is attached to; None where the kernel does not know one.

    Args:
        pci_id: such as ``0000:17:00.0``.
        devices: the kernel's folder of PCI devices.
    """
    try:
        node = int((devices / pci_id / "numa_node").read_text())
    except (OSError, ValueError) as error:
        logger.debug("Expert cache: NUMA node of PCI device %s is not known: %s", pci_id, error)
        return None
    return node if node >= 0 else None


def prefer_node(address: int, nbytes: int, node: int) -> bool:
    """Let untouched pages of a mapping come from a NUMA node while it has room.

    Args:
        address: start of the mapping.
        nbytes: its size.
        node: number of the node.

    Returns:
        Whether the system took the advice; containers often forbid it.
    """
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = (ctypes.c_ulong * (node // word_bits + 1))()
    words[node // word_bits] = 1 << node % word_bits
    number = MBIND.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told.
    arguments = (ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(MPOL_PREFERRED), words)
    bits = ctypes.c_ulong(len(words) * word_bits + 1)
    if number is None or libc.syscall(ctypes.c_long(number), *arguments, bits, ctypes.c_uint(0)) != 0:
        reason = platform.machine() if number is None else os.strerror(ctypes.get_errno())
        logger.debug("Expert cache: host memory is not placed on NUMA node %d: %s", node, reason)
        return False
    return True
