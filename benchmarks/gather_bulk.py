"""Builds gather_bulk.cu with nvcc and offers its variants with the interface of ``vllm_hlwq.gather_kernel.Gather``.

python benchmarks/gather_bulk.py 9.0 LIBRARY.so     # for a GPU machine that has no nvcc
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from vllm_hlwq.gather_kernel import Gather
from vllm_hlwq.host_store import RecordLayout
from vllm_hlwq.weight_bank import WeightBank

SOURCE = Path(__file__).with_name("gather_bulk.cu")
VARIANTS = ("vector", "vector_l2_256", "bulk")
"""In the order of their numbers in the source."""


class Lists(ctypes.Structure):
    """Arguments of a launch; mirrors the struct of the same name in the source."""

    _fields_ = (
        ("store_address", ctypes.c_int64),
        ("record_bytes", ctypes.c_int64),
        ("chunk_table", ctypes.c_void_p),
        ("chunks", ctypes.c_int32),
        ("bank_rows", ctypes.c_int32),
        ("experts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("first", ctypes.c_int32),
    )


def build(library: Path, capability: tuple[int, int]) -> None:
    """Compile into a library for a compute capability such as (9, 0).

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: it failed.
    """
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run(["nvcc", arch, *options, "-o", str(library), str(SOURCE)], check=True)


def load(library: Path) -> ctypes.CDLL:
    """What ``build`` has made."""
    loaded = ctypes.CDLL(str(library))
    loaded.gather_launch.restype = ctypes.c_char_p
    return loaded


class CudaGather(Gather):
    """A variant of the CUDA C++ gather for one bank."""

    def __init__(
        self,
        library: ctypes.CDLL,
        variant: str,
        layout: RecordLayout,
        bank: WeightBank,
        programs: int,
        chunk_bytes: int,
        stages: int = 4,
    ) -> None:
        """Choose a kernel.

        Args:
            library: what ``load`` returned.
            variant: one of ``VARIANTS``; "bulk" needs compute capability 9.0.
            layout: of the stores to load from.
            bank: where experts go.
            programs: thread blocks.
            chunk_bytes: bytes a block copies at once, for "bulk" the size of a stage.
            stages: of the ring in shared memory, 2 to 16; for "bulk" only.
        """
        if variant == "bulk" and torch.cuda.get_device_capability() < (9, 0):
            raise ValueError("bulk asynchronous copies need compute capability 9.0")
        super().__init__(layout, bank, programs, chunk_bytes, warps=4)
        self.library, self.number, self.stages = library, VARIANTS.index(variant), stages

    def __call__(
        self,
        store_address: int,
        experts: torch.Tensor,
        rows: torch.Tensor,
        count: torch.Tensor,
        first: int = 0,
        skip: torch.Tensor | None = None,
    ) -> None:
        if skip is not None:
            raise ValueError("this kernel copies whole lists only")
        lists = Lists(
            store_address, self.record_bytes, self.chunk_table.data_ptr(), len(self.chunk_table), self.bank.rows,
            experts.data_ptr(), rows.data_ptr(), count.data_ptr(), first,
        )  # fmt: skip
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = self.library.gather_launch(
            self.number, ctypes.byref(lists), self.programs, self.chunk_bytes, self.stages, stream
        )
        if error is not None:
            raise RuntimeError(f"gather variant {VARIANTS[self.number]}: {error.decode()}")


if __name__ == "__main__":
    major, minor = (int(part) for part in sys.argv[1].split("."))
    build(Path(sys.argv[2]), (major, minor))
