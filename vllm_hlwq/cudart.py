"""The few calls of CUDA's runtime library that torch does not offer, through ctypes.

The library is the one that torch has loaded into this process, so both speak of the same devices and the same memory.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Protocol

MAPPED_AND_PORTABLE = 0x1 | 0x2
"""cudaHostRegister: readable by kernels, and page-locked for every device of the process."""

HOST_TO_DEVICE = 1
"""cudaMemcpyKind."""


class CudaError(RuntimeError):
    """A call of the CUDA runtime that failed, with the runtime's own number and words for it."""


class PageLocker(Protocol):
    """What page-locking a region needs of the CUDA runtime. Addresses are integers, sizes bytes."""

    def host_register(self, address: int, nbytes: int) -> None:
        """Page-lock memory and map it for all devices; raises CudaError."""

    def host_unregister(self, address: int) -> None:
        """Undo ``host_register`` once no device can still be reading; raises CudaError."""

    def device_address(self, address: int) -> int:
        """Where kernels find page-locked memory; raises CudaError."""


class CudaRuntime:
    """``PageLocker`` of the CUDA runtime in this process, on its current device."""

    def __init__(self) -> None:
        """Find the library.

        Raises:
            CudaError: no CUDA runtime is loaded, as in a process with a CPU build of torch.
        """
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = [path for line in lines if "libcudart" in (path := line.split(maxsplit=5)[-1])]
        if not paths:
            raise CudaError("no CUDA runtime library (libcudart) is loaded; a CUDA build of torch brings it")
        self.library = ctypes.CDLL(paths[0])
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

    @classmethod
    @functools.cache
    def loaded(cls) -> CudaRuntime:
        """The runtime of this process, looked for once."""
        return cls()

    def check(self, status: int) -> None:
        """Raise CudaError for a status other than success, and clear it so that torch does not report it later."""
        if status:
            self.library.cudaGetLastError()
            raise CudaError(f"CUDA error {status}: {self.library.cudaGetErrorString(status).decode()}")

    def host_register(self, address: int, nbytes: int) -> None:
        region, size = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
        self.check(self.library.cudaHostRegister(region, size, ctypes.c_uint(MAPPED_AND_PORTABLE)))

    def host_unregister(self, address: int) -> None:
        # A kernel or copy that still reads would fault.
        self.check(self.library.cudaDeviceSynchronize())
        self.check(self.library.cudaHostUnregister(ctypes.c_void_p(address)))

    def device_address(self, address: int) -> int:
        found = ctypes.c_void_p()
        host: Any = ctypes.c_void_p(address)
        self.check(self.library.cudaHostGetDevicePointer(ctypes.byref(found), host, ctypes.c_uint(0)))
        assert found.value is not None
        return found.value

    def copy_rows_to_device(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Let a copy engine bring ``rows`` stretches of ``width`` bytes out of page-locked memory; only enqueues.

        Args:
            target, source: addresses of the first stretch on the device and on the host.
            target_pitch, source_pitch: bytes from one stretch to the next.
            width: bytes of a stretch.
            rows: stretches.
            stream: handle of the stream.
        """
        addresses = (ctypes.c_void_p(target), ctypes.c_size_t(target_pitch), ctypes.c_void_p(source))
        sizes = (ctypes.c_size_t(source_pitch), ctypes.c_size_t(width), ctypes.c_size_t(rows))
        handle = ctypes.c_void_p(stream)
        self.check(self.library.cudaMemcpy2DAsync(*addresses, *sizes, ctypes.c_int(HOST_TO_DEVICE), handle))

    def pci_id(self, device_index: int) -> str:
        """PCI address of a device as /sys/bus/pci writes it, such as ``0000:17:00.0``."""
        text = ctypes.create_string_buffer(32)
        self.check(self.library.cudaDeviceGetPCIBusId(text, len(text), device_index))
        return text.value.decode().lower()
