"""GPUs that ``hlwq plan`` knows: nominal memory, and how fast their link carries experts out of page-locked memory.

Assumptions, not measurements: the memory is what the maker states, and the rate is what copies reach in practice of a
link's nominal rate (PCIe 4 x16: 25 of 31.5 GB/s; PCIe 5 x16: 50 of 63). A board or slot with fewer lanes is slower.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB, GB = 2**30, 10**9
USABLE_PERCENT = 98
"""Of the nominal memory, what CUDA shows; the rest is the driver's, and error correction's."""
LANE_RATES = {4: 25 * GB // 16, 5: 50 * GB // 16}
"""Bytes a second of a lane, by PCIe generation."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, nominal bytes of memory, bytes per second from host memory, and its link in words."""

    name: str
    nominal: int
    link: int
    link_name: str

    @property
    def usable(self) -> int:
        """Bytes that CUDA shows."""
        return self.nominal * USABLE_PERCENT // 100


def pcie(name: str, gib: int, generation: int, lanes: int) -> Gpu:
    """A GPU on a PCIe link of so many lanes."""
    return Gpu(name, gib * GIB, LANE_RATES[generation] * lanes, f"PCIe {generation} x{lanes}")


GPUS = (
    pcie("RTX 3060 12 GB", 12, 4, 16),
    pcie("RTX 4070 12 GB", 12, 4, 16),
    pcie("RTX 4060 Ti 16 GB", 16, 4, 8),
    pcie("RTX 4090 24 GB", 24, 4, 16),
    pcie("RTX 5090 32 GB", 32, 5, 16),
    pcie("RTX 6000 Ada 48 GB", 48, 4, 16),
    pcie("A100 80 GB", 80, 4, 16),
    pcie("H100 80 GB", 80, 5, 16),
)
