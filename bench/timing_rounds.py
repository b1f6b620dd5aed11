"""How a row is timed: how often, on which operands, by which clock."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import Any

import torch

from bench.gpu_check.operations import Precise, precision_of
from bench.measure.timer import EventTime

Call = Callable[[], Any]

BUDGET = {"cuda": 0.2, "cpu": 0.1}
"""Seconds that a row's rounds may take; a slow row still gets the least number of them."""
LEAST_ROUNDS, MOST_ROUNDS = {"cuda": 5, "cpu": 3}, 100
PAIRED_BUDGET, LEAST_PAIRS, MOST_PAIRS = 3.0, 5, 7
"""The same of rounds in which several calls take turns."""
MOST_COPIES, MOST_BYTES = 3, 2**30
"""Of a row's operands: with three, what a round reads has been driven out of a cache by two others, flushed or not."""


def clock(device: torch.device) -> Callable[[], Any]:
    """end() - start() are seconds: of CUDA events on a GPU, of the host elsewhere."""
    return EventTime if device.type == "cuda" else time.perf_counter


def copies_of(nbytes: int) -> int:
    """How many operands of so many bytes take turns."""
    return max(1, min(MOST_COPIES, MOST_BYTES // max(1, nbytes)))


def rounds_of(call: Call, device: torch.device) -> int:
    """As many as BUDGET allows, by one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    fit = math.ceil(BUDGET[device.type] / (time.perf_counter() - start))
    return max(LEAST_ROUNDS[device.type], min(MOST_ROUNDS, fit))


def rotating(calls: list[Call], before: Callable[[], object] | None) -> Callable[[], tuple]:
    """pytest-benchmark's `setup`: makes ready, and gives `one` the next of the calls."""
    turns = cycle(calls)

    def setup() -> tuple:
        if before is not None:
            before()
        return (next(turns),), {}

    return setup


def one(call: Call) -> Any:
    """What is timed."""
    return call()


@contextlib.contextmanager
def multiplying(precise: Precise) -> Iterator[None]:
    """While open, convolutions and the products that unfold makes of them multiply float32 as `precise` says.

    cuDNN looks for its fastest algorithm.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with precision_of(precise, benchmark=True):
        matmul.fp32_precision = precise.precision
        try:
            yield
        finally:
            matmul.fp32_precision = before


class Turns:
    """Times several calls round by round, so that a slow minute of the machine is everybody's.

    `round` is pytest-benchmark's setup; what that times itself, the first call once more, from another place than all
    the others, goes into its own records alone.
    """

    def __init__(self, calls: Mapping[str, Call], device: torch.device) -> None:
        self.calls, self.device = dict(calls), device
        self.first, *self.others = calls
        self.times: dict[str, list[float]] = {name: [] for name in calls}

    def warm_up(self) -> int:
        """Calls each once; how many rounds there is time for."""
        start = time.perf_counter()
        for call in self.calls.values():
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        fit = math.ceil(PAIRED_BUDGET / (time.perf_counter() - start))
        return max(LEAST_PAIRS, min(MOST_PAIRS, fit))

    def round(self) -> None:
        """Times each once, in each round beginning with another."""
        now, names = clock(self.device), list(self.calls)
        first = len(self.times[self.first]) % len(names)
        for name in names[first:] + names[:first]:
            start = now()
            self.calls[name]()
            self.times[name].append(now() - start)
