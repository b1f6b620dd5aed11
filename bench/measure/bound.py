"""The least time a launch can take, and why: from its machine code, its tile and its grid. No GPU is asked.

    found = bound(gpu, work, code.worked, ...)
    found.seconds, found.by, found.parts          # the largest of the parts, each in seconds
    roofline(gpu, useful, nbytes, torch.float16).seconds

    seconds = max(multiply, issue, shared memory, DRAM)

multiply        multiply-adds executed, by the rate of the unit that the main loop uses (tensor cores or FMA units)
issue           instructions that warps execute in their main loops, by 4 a cycle
shared memory   bytes that those loops move to and from shared memory, tensor cores' operands among them, by 128 a cycle
DRAM            compulsory bytes, by the bandwidth: caches that start cold and forget nothing, results that are written
                through (a small one may still lie in L2 when the launch ends)

The first three are of the multiprocessor with the most to do: with P equal programs on S multiprocessors one of them
gets ceil(P / S), whatever the order, so the time is ceil(P / S) * S / P of what an even spread would take ("wave
quantisation"). Programs that are not equal: some multiprocessor gets ceil(k / S) of the k longest.

It is a bound because everything is counted at its best: nothing waits, a branch that may jump over instructions does,
broadcasts are free, all caches work, clocks are the boost clock. Uncalibrated, it says which of two kernels has less in
its way, not how long either takes. The roofline counts less still (useful products, any unit, an even spread), so a
bound is never below it.

Not counted: latency, L2 bandwidth, code outside the main loop, the gap between launches, and copies by PyTorch around
them (transposed weights, the pixels of packed residue classes).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.measure.gpus import FMA, ISSUED, SHARED_BYTES, TENSOR, Gpu
from bench.measure.sass import BYTES_OF_K, Code, Loop
from bench.measure.work import Work

MULTIPLY, ISSUE, SHARED, DRAM = "multiply", "issue", "shared memory", "DRAM"
LABEL = "upper bound on speed, uncalibrated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Of one launch, or one roofline."""

    parts: dict[str, float]
    """Seconds by MULTIPLY, ISSUE, SHARED, DRAM; those that are not known are absent."""
    unit: str | None = None
    """What multiplies: TENSOR or FMA."""
    quantisation: float = 1.0
    """How much longer the busiest multiprocessor multiplies than all would at an even spread."""

    @property
    def seconds(self) -> float:
        return max(self.parts.values(), default=0.0)

    @property
    def by(self) -> str:
        """The part that is the largest; for MULTIPLY the unit's name."""
        part = max(self.parts, key=self.parts.__getitem__, default="nothing known")
        return self.unit if part == MULTIPLY and self.unit else part


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What all warps of a block do in one pass of the main loop."""

    multiply_adds: int
    instructions: int
    shared_bytes: int


def pass_of(loop: Loop, *, warps: int, tile: tuple[int, int, int], itemsize: int) -> Pass:
    """Of a block of `warps` that computes a (BLOCK_M, BLOCK_N, BLOCK_K) tile of operands of `itemsize` bytes.

    UTCHMMA (sm_100) does not tell its size in machine code. It is taken from the tile: as many rows as it has, up to
    128, as many columns, up to 256, and 32 bytes along the reduction (PTX ISA, "tcgen05.mma", shapes of .kind::f16 and
    .kind::tf32); one thread issues it for the block.
    """
    M, N, _ = tile
    m, n = min(M, 128), min(N, 256)
    large = [one for one in loop.instructions if one.name == "UTCHMMA"]
    multiply_adds = warps * loop.multiply_adds + len(large) * m * n * (BYTES_OF_K // itemsize)
    # A left operand that lies in tensor memory is not read from shared memory.
    reads = sum((n + m * one.operands.startswith("gdesc")) * BYTES_OF_K for one in large)
    reads += warps * sum(one.shared_reads for one in loop.instructions)
    # Lanes without an element of their own are switched off, which the code does not tell: never more than the tile.
    of_the_tile = multiply_adds // (M * N) * (M + N) * itemsize if M * N else 0
    writes = warps * sum(one.shared_writes for one in loop.instructions)
    writes = of_the_tile if loop.has_tensor_copies else min(writes, of_the_tile)
    return Pass(multiply_adds=multiply_adds, instructions=warps * loop.fewest, shared_bytes=reads + writes)


def bound(
    gpu: Gpu,
    work: Work,
    code: Code,
    *,
    warps: int,
    tile: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str = "ieee",
) -> Bound:
    """Of one launch of `work` with this machine code, on `gpu`. A sum of splits is bound by DRAM alone."""
    parts = {DRAM: work.compulsory / gpu.bandwidth}
    if not work.multiply_adds:
        return Bound(parts=parts)
    loop = code.worked
    once = pass_of(loop, warps=warps, tile=tile, itemsize=dtype.itemsize)
    unit = TENSOR if loop.has_tensor_cores else FMA
    cycle = 1 / gpu.clock
    rate = gpu.rate(unit, dtype, precision) or gpu.rate(FMA, dtype)
    whole = Loop(code.instructions, unrolled=True)
    outside = pass_of(whole, warps=warps, tile=tile, itemsize=dtype.itemsize).multiply_adds - once.multiply_adds

    def passes(multiply_adds: float) -> float:
        """Those that a program makes at least: what it multiplies outside the loop it need not do inside."""
        if not once.multiply_adds:
            return 0.0
        return 1.0 if loop.unrolled else max(0, multiply_adds - outside) / once.multiply_adds

    def busiest(seconds: Callable[[float], float]) -> float:
        return _busiest(work, gpu.multiprocessors, seconds)

    parts[MULTIPLY] = busiest(lambda count: count / rate / gpu.clock_of(unit, dtype))
    parts[ISSUE] = busiest(lambda count: passes(count) * once.instructions / ISSUED * cycle)
    parts[SHARED] = busiest(lambda count: passes(count) * once.shared_bytes / SHARED_BYTES * cycle)
    even = work.multiply_adds / gpu.multiprocessors
    return Bound(parts=parts, unit=unit, quantisation=busiest(float) / even)


def roofline(gpu: Gpu, multiply_adds: int, nbytes: int, dtype: torch.dtype, precision: str = "ieee") -> Bound:
    """The time of so many multiply-adds and bytes of DRAM on the fastest unit there is for `dtype`."""
    unit = max((TENSOR, FMA), key=lambda unit: gpu.speed(unit, dtype, precision))
    return Bound(parts={MULTIPLY: multiply_adds / gpu.peak(dtype, precision), DRAM: nbytes / gpu.bandwidth}, unit=unit)


def _busiest(work: Work, multiprocessors: int, cost: Callable[[float], float]) -> float:
    """What the multiprocessor with the most to do has to do at least, where a program costs `cost(multiply-adds)`."""
    if not work.parts:  # nobody knows which program does what; all together they do this
        return work.programs * cost(work.multiply_adds / work.programs) / multiprocessors
    most = sum(count * cost(each) for count, each in work.parts) / multiprocessors
    begun = 0
    for count, each in work.parts:
        begun += count
        most = max(most, -(-begun // multiprocessors) * cost(each))
    return most
