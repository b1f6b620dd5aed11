"""Time on a GPU by CUDA events, in the form of the timer that pytest-benchmark and timeit call: end() - start().

A host clock would add what Python needs to queue the work, and without synchronising would time nothing else. Events
are recorded by the GPU itself, between the kernels around them.
"""

import math

import torch


class EventTime:
    """The moment at which the GPU reaches this place in its current stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "EventTime") -> float:
        """Seconds of GPU time since `start`; waits until the GPU got there."""
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


class Flush:
    """Called before each timed call: writes over the L2 cache, so that it is cold, and lets the host run ahead.

    The host queues the timed kernels while the GPU is still writing; otherwise short ones would be timed together
    with the gaps in which the GPU waits for the next.

    ahead    keep the GPU writing for so many seconds; one write takes a few milliseconds on a T4 and a third of one on
             an H100, which is more than the host needs for bare launches
    """

    def __init__(self, device: torch.device, *, ahead: float = 0.0) -> None:
        self.buffer = torch.empty(2**30, dtype=torch.uint8, device=device)
        self.writes = 1
        if ahead:
            self()  # the first write is slower
            start = EventTime()
            self()
            self.writes = max(1, math.ceil(ahead / (EventTime() - start)))

    def __call__(self) -> None:
        for _ in range(self.writes):
            self.buffer.zero_()
