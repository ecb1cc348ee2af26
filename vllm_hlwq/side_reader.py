"""Reading a tensor that running steps write, from a thread that is not the one that runs them.

On CUDA the tensor is copied on a stream of its own into page-locked memory, and an event is polled: the stream that
computes is never waited for, and the host thread that enqueues steps is left alone but for the copy's launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_POLL_SECONDS = 0.0005


class SideReader:
    """Reads one tensor, for one thread; on CUDA waits for the device once, so that a reset is seen from the start.

    Args:
        tensor: what is read.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def read(self, prepare: Callable[[], None] = lambda: None) -> torch.Tensor:
        """The tensor on the host, valid until the next reading; waits for no step.

        Args:
            prepare: enqueues what fills the tensor.
        """
        if not self._tensor.is_cuda:
            prepare()
            return self._tensor
        # A thread begins on device 0, which another rank may own.
        with torch.cuda.device(self._tensor.device), torch.cuda.stream(self._stream):
            prepare()
            self._host.copy_(self._tensor, non_blocking=True)
            self._copied.record()
            while not self._copied.query():  # type: ignore[no-untyped-call]
                time.sleep(_POLL_SECONDS)
        return self._host
