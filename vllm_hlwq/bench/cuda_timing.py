"""Times work on a CUDA device: events around replays of a captured graph, or around launches one by one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

import torch


@cache
def timing_stream(device_index: int) -> torch.cuda.Stream:
    """One for all measurements: torch hands out 32 streams in turn, and new ones would soon be the measured work's."""
    return torch.cuda.Stream(device_index)  # type: ignore[no-untyped-call]


def seconds_per_call(call: Callable[[int], None], calls: int, repeats: int = 20, graph: bool = True) -> float:
    """Median time of one call when ``calls`` of them follow each other.

    Args:
        call: enqueues call number i (0 .. calls - 1) on the current stream; let the numbers rotate over more data than
            the second-level cache holds.
        calls: calls in one measurement.
        repeats: measurements; two more before them warm up.
        graph: capture the calls in one CUDA graph and replay it, which leaves out the host's time to launch.
    """

    def run() -> None:
        for number in range(calls):
            call(number)

    stream = timing_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles and loads what capture may not
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                run()
        times: list[float] = []
        for _ in range(repeats + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            if graph:
                captured.replay()
            else:
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times[2:])
