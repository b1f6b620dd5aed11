"""Time on a GPU by CUDA events, in the form of the timer that pytest-benchmark and timeit call: end() - start().

A host clock would add what Python needs to queue the work, and without synchronising would time nothing else. Events
are recorded by the GPU itself, between the kernels around them.
"""

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
    """

    def __init__(self, device: torch.device) -> None:
        # A few milliseconds on a T4 and half of one on an H200: more than the host needs for a layer's launches.
        self.buffer = torch.empty(2**30, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()
