"""What a step would take of a GPU that is not there: an account, replayed through a model of PyTorch's allocator.

    account = ...                                  of the step on meta tensors
    predict(account, GPUS["t4"]).process           bytes that nvidia-smi would show, from - to

Three parts add up to what nvidia-smi shows. What tensors take of the allocator, and what it keeps of that, is computed;
what libraries take inside it, and the CUDA context beside it, are assumptions, named in `ASSUMPTIONS`, of which every
figure is a range.
"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.measure.account import Account, ConvolutionCall, Mark, ReductionCall, ScratchCall
from bench.measure.allocator import CachingAllocator, OutOfMemory, Request
from bench.measure.occupancy import LANES, LIMITS
from bench.measure.reduction import buffers

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes, from `low` to `high`."""

    low: int
    high: int

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuKind:
    """A kind of GPU that one may not have."""

    name: str
    """As nvidia-smi calls it."""
    arch: str
    """As "sm_75"."""
    multiprocessors: int
    total: int
    """MiB that nvidia-smi shows as its memory, with error correction on where the board has it."""
    kept: int | None = None
    """MiB of it that the driver keeps for itself; None where it is not known, and DRIVERS_SHARE is assumed."""


# Names are what --gpu and --fits take.
GPUS = {
    "t4": GpuKind(name="Tesla T4", arch="sm_75", multiprocessors=40, total=15_360),
    "rtx3090": GpuKind(name="NVIDIA GeForce RTX 3090", arch="sm_86", multiprocessors=82, total=24_576),
    "a100-40gb": GpuKind(name="NVIDIA A100 40GB", arch="sm_80", multiprocessors=108, total=40_960),
    "a100-80gb": GpuKind(name="NVIDIA A100 80GB", arch="sm_80", multiprocessors=108, total=81_920),
    "l4": GpuKind(name="NVIDIA L4", arch="sm_89", multiprocessors=58, total=23_034),
    "rtx4090": GpuKind(name="NVIDIA GeForce RTX 4090", arch="sm_89", multiprocessors=128, total=24_564),
    "h100": GpuKind(name="NVIDIA H100 80GB HBM3", arch="sm_90", multiprocessors=132, total=81_559),
    "h200": GpuKind(name="NVIDIA H200", arch="sm_90", multiprocessors=132, total=143_771),
    "rtx5090": GpuKind(name="NVIDIA GeForce RTX 5090", arch="sm_120", multiprocessors=170, total=32_607),
}

# The context holds the driver's own data and the machine code of loaded kernels, of cuDNN and cuBLAS among them. Lazy
# loading, PyTorch's habit since 1.13, brings in only kernels that are used; before, all of them. Seen: 287 MB against
# 667 MB for one tensor (pytorch/pytorch#86509), "more than 1000 MB" before CUDA 11.7 (pytorch/pytorch#107667), 426 MiB
# on an RTX 6000 Ada with CUDA 13. Measured by this lab: bench.memory of all models on an H100 (driver 580, CUDA 13.0,
# PyTorch 2.11), where one tensor takes 610 MiB of it.
LAZY_CONTEXT = Range(100 * MIB, 800 * MIB)
MEASURED_CONTEXTS = {"sm_90": Range(742 * MIB, 760 * MIB)}
EAGER_CONTEXT = Range(600 * MIB, 1_300 * MIB)

# Percent of a board's memory that the driver keeps for itself: 480 of 81,559 MiB measured on an H100, and 451 of 15,360
# on a T4, of which PyTorch names 14.56 GiB as the capacity.
DRIVERS_SHARE = (0.6, 3.0)

# PyTorch gives cuBLAS a workspace when a thread first multiplies matrices on a stream, and never takes it back. The
# forward pass multiplies in its caller's thread, the backward pass in autograd's. Products with a bias go through
# cuBLASLt, which gets one of its own.
CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_SM_90, CUBLASLT_WORKSPACE = 8_519_680, 32 * MIB, MIB
MATRIX_PRODUCTS = {"aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm"}

# Of a convolution's operands and result together. Recorded on an H100 with cuDNN 9.19, float32: some of SimpleNet's and
# ResNet18's convolutions take nothing, most as much as that and a little more, weight gradients up to a third more.
CUDNN_WORKSPACES = (0.0, 1.0, 1.02, 1.1, 1.2, 1.35, 1.6)
DRAWS = 24
"""Ways in which cuDNN may choose that are tried: what it takes decides which blocks fit where afterwards."""


def in_mib(span: Range) -> str:
    """As "1,055-2,110 MiB", or "1,055 MiB" where it is none."""
    ends = dict.fromkeys(f"{nbytes / MIB:,.0f}" for nbytes in (span.low, span.high))
    return f"{'-'.join(ends)} MiB"


ASSUMPTIONS = {
    "context": f"CUDA context with the code of loaded kernels: {in_mib(MEASURED_CONTEXTS['sm_90'])} on Hopper, as "
    f"measured on an H100, else {in_mib(LAZY_CONTEXT)}, kernels loaded when first used (PyTorch 1.13 and later, CUDA "
    f"11.7 and later). Where all are loaded at the start, as before, it is {in_mib(EAGER_CONTEXT)}, which the figures "
    "leave out",
    "cublas": "cuBLAS' workspace, once for each thread that multiplies matrices: "
    f"{CUBLAS_WORKSPACE / MIB:.1f} MiB, from Hopper on {CUBLAS_WORKSPACE_SM_90 / MIB:.0f} MiB; "
    f"{CUBLASLT_WORKSPACE / MIB:.0f} MiB for products with a bias",
    "cudnn": "cuDNN's workspace of one convolution: nothing, or as much as its operands and result together, or up to "
    f"{CUDNN_WORKSPACES[-1]} times that; it decides what fits where afterwards, so the range is that over {DRAWS} "
    "random mixtures of these",
}


def context_of(gpu: "GpuKind") -> Range:
    """What a context with lazily loaded kernels takes."""
    return MEASURED_CONTEXTS.get(gpu.arch, LAZY_CONTEXT)


def room_on(gpu: "GpuKind") -> Range:
    """Bytes that the allocator may reserve: what neither the driver nor the context takes."""
    kept = [gpu.total * MIB * share / 100 for share in DRIVERS_SHARE] if gpu.kept is None else 2 * [gpu.kept * MIB]
    context = context_of(gpu)
    return Range(gpu.total * MIB - int(kept[1]) - context.high, gpu.total * MIB - int(kept[0]) - context.low)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Of one account on one GPU, in bytes; all of it predicted."""

    allocated: Range
    """torch.cuda.max_memory_allocated over the step that counts."""
    reserved: Range
    """torch.cuda.max_memory_reserved over all steps."""
    context: Range
    """Outside of the allocator."""
    process: Range
    """What nvidia-smi shows for the process: reserved and context."""


def predict(account: Account, gpu: GpuKind) -> Prediction:
    """The account's steps on an empty GPU of that kind; its entries begin with an empty process."""
    replays = [replay(account, gpu, choose) for choose in choices(account)]
    allocated = [allocator.peak_allocated for allocator in replays]
    reserved = [allocator.peak_reserved for allocator in replays]
    span = Range(min(reserved), max(reserved))
    return Prediction(
        allocated=Range(min(allocated), max(allocated)),
        reserved=span,
        context=context_of(gpu),
        process=span + context_of(gpu),
    )


Choice = Callable[[ConvolutionCall], int]
"""Bytes of the workspace that a library takes for a convolution."""


def choices(account: Account) -> list[Choice]:
    """What cuDNN may do by ASSUMPTIONS: everywhere the same of CUDNN_WORKSPACES, and DRAWS random mixtures of them."""
    if not any(isinstance(entry, ConvolutionCall) for entry in account.entries):
        return [_constant(0.0)]
    drawn = [_drawn(random.Random(seed)) for seed in range(DRAWS)]
    return [*map(_constant, CUDNN_WORKSPACES), *drawn]


def _constant(share: float) -> Choice:
    return lambda call: int(share * call.nbytes)


def _drawn(draw: random.Random) -> Choice:
    """The same for one convolution in every step, as cuDNN's choice is."""
    shares: dict[ConvolutionCall, float] = {}
    return lambda call: int(call.nbytes * shares.setdefault(call, draw.choice(CUDNN_WORKSPACES)))


def replay(account: Account, gpu: GpuKind, choose: Choice, capacity: int | None = None) -> CachingAllocator:
    """The allocator after all of the account's entries, its peaks being those of the step that counts.

    `capacity` is bytes that the allocator may reserve, or None for any. Raises OutOfMemory where it would need more.
    """
    allocator = CachingAllocator(capacity)
    for index, asked in enumerate(requests(account, gpu, choose)):
        if index == account.start:
            allocator.reset_peaks()
        for request in asked:
            allocator.serve(request)
    return allocator


def requests(account: Account, gpu: GpuKind, choose: Choice) -> Iterator[list[Request]]:
    """What each entry asks of the allocator, libraries included; the account's first phase is the forward pass.

    Keys are the numbers of storages, and tuples for what libraries take.
    """
    threads_seen: set[bool] = set()
    is_forward = True  # until the first mark; what comes later is either the other thread or has its workspace
    has_bias_products = False
    given_back: list[Request] = []
    hopper = int(gpu.arch.removeprefix("sm_")) >= 90
    for entry in account.entries:
        asked: list[Request] = []
        if isinstance(entry, Mark):
            is_forward = False
        elif isinstance(entry, ConvolutionCall):
            asked += _for_the_time(("cuDNN's workspace (assumed)", entry.module), choose(entry))
        elif isinstance(entry, ScratchCall):
            taken, *given_back = _for_the_time(("scratch", entry.operator, entry.module), entry.nbytes)
            asked.append(taken)
        elif isinstance(entry, ReductionCall):
            threads = LANES * LIMITS[gpu.arch].warps
            taken = buffers(
                entry.results, entry.terms, entry.element, multiprocessors=gpu.multiprocessors, threads=threads
            )
            asked += _for_the_time(("reduction's buffers", entry.module), taken.staging, taken.semaphores)
        else:
            asked.append(Request(entry.storage, entry.nbytes, (entry.operator, entry.module, entry.category)))
            asked, given_back = asked + given_back, []
            if entry.operator in MATRIX_PRODUCTS and is_forward not in threads_seen:
                threads_seen.add(is_forward)
                label = ("cuBLAS' workspace (assumed)", "forward" if is_forward else "backward")
                asked.append(Request(label, CUBLAS_WORKSPACE_SM_90 if hopper else CUBLAS_WORKSPACE, label))
            if entry.operator == "aten.addmm" and not has_bias_products:
                has_bias_products = True
                label = ("cuBLASLt's workspace (assumed)",)
                asked.append(Request(label, CUBLASLT_WORKSPACE, label))
        yield asked


def _for_the_time(label: tuple[str, ...], *sizes: int) -> list[Request]:
    """Buffers that are taken, and given back before anything else happens."""
    taken = [Request((*label, place), nbytes, label) for place, nbytes in enumerate(sizes) if nbytes]
    return taken + [Request(request.key, 0) for request in reversed(taken)]


def fits(account: Account, gpu: GpuKind, *, pessimistic: bool, room: Range | None = None) -> bool:
    """Whether the account's steps fit into `room`, by default what a GPU of that kind has that nobody else uses.

    Pessimistic is with the least room, whatever cuDNN chooses; else it is with the most, if cuDNN chooses well.
    """
    room = room or room_on(gpu)
    outcomes = (
        _has_room(account, gpu, choose, room.low if pessimistic else room.high) for choose in choices(account)
    )
    return all(outcomes) if pessimistic else any(outcomes)


def _has_room(account: Account, gpu: GpuKind, choose: Choice, capacity: int) -> bool:
    try:
        replay(account, gpu, choose, capacity)
    except OutOfMemory:
        return False
    return True


def largest_batch(
    account_of: Callable[[int], Account], gpu: GpuKind, *, pessimistic: bool, least: int = 1, below: int | None = None,
    room: Range | None = None,
) -> int:
    """The largest number of images a step that `fits`; 0 if not even `least` do. `account_of(batch)` is the step's.

    Found by bisection, as if whatever is larger than a batch that does not fit did not fit either; `below`, if given,
    is known not to fit.
    """
    fit = functools.partial(fits, gpu=gpu, pessimistic=pessimistic, room=room)
    if not fit(account_of(least)):
        return 0
    fitting, failing = least, below or 2 * least
    while below is None and fit(account_of(failing)):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fit(account_of(middle)):
            fitting = middle
        else:
            failing = middle
    return fitting
