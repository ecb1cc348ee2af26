"""How fast host memory reaches the compute device: the rate that a step with misses is held against.

Large copies by the copy engine out of page-locked memory, which no way of moving experts can beat; on a CPU, where a
load is a copy from host memory to host memory, that copy.
"""

from __future__ import annotations

import time
from statistics import median

import torch

COPY_BYTES = 256 * 2**20
CPU_COPY_BYTES = 32 * 2**20
REPEATS = 9


def host_to_device_bandwidth(device: torch.device) -> float:
    """Bytes per second from host memory to ``device``: the median of several copies, after one that is not timed."""
    cuda = device.type == "cuda"
    size = COPY_BYTES if cuda else CPU_COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> float:
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    copy()
    return size / median(copy() for _ in range(REPEATS))
