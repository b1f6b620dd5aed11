"""What a step would take of a GPU that is not there: an account, replayed through a model of PyTorch's allocator.

    account = ...                                  of the step on meta tensors
    predict(account, GPUS["t4"]).process           bytes that nvidia-smi would show, from - to

Three parts add up to what nvidia-smi shows. What tensors take of the allocator, and what it keeps of that, is computed;
what libraries take inside it, and the CUDA context beside it, are assumptions, named in `ASSUMPTIONS`, of which every
figure is a range.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.measure.account import Account, Change, ConvolutionCall, Mark, ReductionCall
from bench.measure.allocator import Block, CachingAllocator, OutOfMemory
from bench.measure.reduction import THREADS, buffers

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
LAZY_CONTEXT = Range(100 * MIB, 600 * MIB)
MEASURED_CONTEXTS = {"sm_90": Range(742 * MIB, 760 * MIB)}
EAGER_CONTEXT = Range(600 * MIB, 1_300 * MIB)

# PyTorch gives cuBLAS a workspace when a thread first multiplies matrices on a stream, and never takes it back. The
# forward pass multiplies in its caller's thread, the backward pass in autograd's. Products with a bias go through
# cuBLASLt, which gets one of its own.
CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_SM_90, CUBLASLT_WORKSPACE = 8_519_680, 32 * MIB, MIB
MATRIX_PRODUCTS = {"aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm"}

# Of a convolution's operands and result together. Recorded on an H100 with cuDNN 9.19, float32: some of SimpleNet's and
# ResNet18's convolutions take nothing, most as much as that and a little more, weight gradients up to a third more.
CUDNN_WORKSPACES = (0.0, 1.0, 1.02, 1.1, 1.35)
DRAWS = 24
"""Ways in which cuDNN may choose that are tried: what it takes decides which blocks fit where afterwards."""

ASSUMPTIONS = {
    "context": "CUDA context with the code of loaded kernels: 742-760 MiB on Hopper, as measured on an H100, else "
    "100-600 MiB, kernels loaded when first used (PyTorch 1.13 and later, CUDA 11.7 and later); 600-1,300 MiB where "
    "all are loaded at the start, as before",
    "cublas": "cuBLAS' workspace, once for each thread that multiplies matrices: 8.1 MiB, from Hopper on 32 MiB; "
    "1 MiB for products with a bias",
    "cudnn": "cuDNN's workspace of one convolution: nothing, or as much as its operands and result together, or up to "
    f"a third more; it decides what fits where afterwards, so the range is that over {DRAWS} random mixtures of these",
}


def context_of(gpu: "GpuKind") -> Range:
    """What a context with lazily loaded kernels takes."""
    return MEASURED_CONTEXTS.get(gpu.arch, LAZY_CONTEXT)


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
    """What cuDNN may do by ASSUMPTIONS: take nothing, take the most, and DRAWS random mixtures of its ways."""
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

    The account's first phase is the forward pass. `capacity` is bytes that the allocator may reserve, or None for any.

    Raises OutOfMemory where it would need more.
    """
    allocator = CachingAllocator(capacity)
    threads_seen: set[bool] = set()
    is_forward = True  # until the first mark; what comes later is either the other thread or has its workspace
    has_bias_products = False
    blocks: dict[int, tuple[int, Block]] = {}
    for index, entry in enumerate(account.entries):
        if index == account.start:
            allocator.reset_peaks()
        if isinstance(entry, Mark):
            is_forward = False
        elif isinstance(entry, ConvolutionCall):
            allocator.free(allocator.allocate(choose(entry)))
        elif isinstance(entry, ReductionCall):
            _reduce(entry, gpu, allocator)
        else:
            _change(entry, blocks, allocator)
            if entry.operator in MATRIX_PRODUCTS and is_forward not in threads_seen:
                threads_seen.add(is_forward)
                allocator.allocate(CUBLAS_WORKSPACE_SM_90 if _generation(gpu) >= 90 else CUBLAS_WORKSPACE)
            if entry.operator == "aten.addmm" and not has_bias_products:
                has_bias_products = True
                allocator.allocate(CUBLASLT_WORKSPACE)
    return allocator


def _generation(gpu: GpuKind) -> int:
    return int(gpu.arch.removeprefix("sm_"))


def _reduce(entry: ReductionCall, gpu: GpuKind, allocator: CachingAllocator) -> None:
    taken = buffers(
        entry.results, entry.terms, entry.element, multiprocessors=gpu.multiprocessors, threads=THREADS[gpu.arch]
    )
    blocks = [allocator.allocate(nbytes) for nbytes in (taken.staging, taken.semaphores)]
    for block in reversed(blocks):
        allocator.free(block)


def _change(entry: Change, blocks: dict[int, tuple[int, Block]], allocator: CachingAllocator) -> None:
    nbytes, block = blocks.get(entry.storage, (0, None))
    if entry.nbytes == nbytes:
        return
    if block is not None:
        allocator.free(block)
        del blocks[entry.storage]
    if entry.nbytes:
        blocks[entry.storage] = entry.nbytes, allocator.allocate(entry.nbytes)


def fits(account: Account, gpu: GpuKind, *, pessimistic: bool) -> bool:
    """Whether the account's steps fit on an empty GPU.

    Pessimistic is with the largest context, whatever cuDNN chooses; else it is with the smallest, if cuDNN chooses
    well.
    """
    context = context_of(gpu).high if pessimistic else context_of(gpu).low
    outcomes = (_has_room(account, gpu, choose, gpu.total * MIB - context) for choose in choices(account))
    return all(outcomes) if pessimistic else any(outcomes)


def _has_room(account: Account, gpu: GpuKind, choose: Choice, capacity: int) -> bool:
    try:
        replay(account, gpu, choose, capacity)
    except OutOfMemory:
        return False
    return True


def largest_batch(account_of: Callable[[int], Account], gpu: GpuKind, *, pessimistic: bool, least: int = 1) -> int:
    """The largest number of images a step that `fits`; 0 if not even `least` do. `account_of(batch)` is the step's.

    Found by bisection, as if whatever is larger than a batch that does not fit did not fit either.
    """
    fitting, failing = 0, least
    while fits(account_of(failing), gpu, pessimistic=pessimistic):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(account_of(middle), gpu, pessimistic=pessimistic):
            fitting = middle
        else:
            failing = middle
    return fitting
