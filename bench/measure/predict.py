"""What a step would take of a GPU that is not there: an account, replayed through a model of PyTorch's allocator.

    account = ...                                  of the step on meta tensors
    predict(account, GPUS["t4"]).process           bytes that nvidia-smi would show, from - to

Three parts add up to what nvidia-smi shows. The allocator's part is computed; what libraries take inside it, and the
CUDA context beside it, are assumptions, named in `ASSUMPTIONS` and given as ranges. The low end of every range is
without what is uncertain, the high end with all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.measure.account import Account, Call, Change, Mark
from bench.measure.allocator import CachingAllocator, OutOfMemory

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
# on an RTX 6000 Ada with CUDA 13.
LAZY_CONTEXT = Range(100 * MIB, 600 * MIB)
EAGER_CONTEXT = Range(600 * MIB, 1_300 * MIB)

# PyTorch gives cuBLAS a workspace when a thread first multiplies matrices on a stream, and never takes it back. The
# forward pass multiplies in its caller's thread, the backward pass in autograd's.
CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_SM_90 = 8_519_680, 32 * MIB
MATRIX_PRODUCTS = {"aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm"}

ASSUMPTIONS = {
    "context": "CUDA context with the code of loaded kernels: 100-600 MiB, kernels loaded when first used (PyTorch "
    "1.13 and later, CUDA 11.7 and later); 600-1,300 MiB where all are loaded at the start, as before",
    "cublas": "cuBLAS' workspace, once for each thread that multiplies matrices: 8.1 MiB, from Hopper on 32 MiB",
    "cudnn": "cuDNN's workspace of one convolution: between nothing and as much as its operands and results together, "
    "which is what copies of them in another layout take",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Of one account on one GPU, in bytes; all of it predicted."""

    allocated: Range
    """torch.cuda.max_memory_allocated over the step that counts."""
    reserved: Range
    """torch.cuda.max_memory_reserved over all steps."""
    context: Range
    """Outside of the allocator, LAZY_CONTEXT."""
    process: Range
    """What nvidia-smi shows for the process: reserved and context."""


def predict(account: Account, gpu: GpuKind) -> Prediction:
    """The account's steps on an empty GPU of that kind; its entries begin with an empty process."""
    low, high = (replay(account, gpu, workspaces=workspaces) for workspaces in (False, True))
    reserved = Range(low.peak_reserved, high.peak_reserved)
    return Prediction(
        allocated=Range(low.peak_allocated, high.peak_allocated),
        reserved=reserved,
        context=LAZY_CONTEXT,
        process=reserved + LAZY_CONTEXT,
    )


def replay(account: Account, gpu: GpuKind, *, workspaces: bool, capacity: int | None = None) -> CachingAllocator:
    """The allocator after all of the account's entries, its peaks being those of the step that counts.

    The account's first phase is the forward pass.

    workspaces  whether cuDNN takes for each convolution what it may take by ASSUMPTIONS, or nothing
    capacity    bytes that the allocator may reserve, or None for any

    Raises OutOfMemory where it would need more.
    """
    allocator = CachingAllocator(capacity)
    cublas = CUBLAS_WORKSPACE_SM_90 if int(gpu.arch.removeprefix("sm_")) >= 90 else CUBLAS_WORKSPACE
    threads_seen: set[bool] = set()
    is_forward = True  # until the first mark; what comes later is either the other thread or has its workspace
    blocks: dict[int, tuple[int, object]] = {}
    for index, entry in enumerate(account.entries):
        if index == account.start:
            allocator.reset_peaks()
        if isinstance(entry, Mark):
            is_forward = False
        elif isinstance(entry, Call):
            if workspaces:
                allocator.free(allocator.allocate(entry.nbytes))
        else:
            _change(entry, blocks, allocator)
            if entry.operator in MATRIX_PRODUCTS and is_forward not in threads_seen:
                threads_seen.add(is_forward)
                allocator.allocate(cublas)
    return allocator


def _change(entry: Change, blocks: dict, allocator: CachingAllocator) -> None:
    nbytes, block = blocks.get(entry.storage, (0, None))
    if entry.nbytes == nbytes:
        return
    if block is not None:
        allocator.free(block)
        del blocks[entry.storage]
    if entry.nbytes:
        blocks[entry.storage] = entry.nbytes, allocator.allocate(entry.nbytes)


def fits(account: Account, gpu: GpuKind, *, pessimistic: bool) -> bool:
    """Whether the account's steps fit on an empty GPU; pessimistic takes the high end of every range, else the low."""
    context = LAZY_CONTEXT.high if pessimistic else LAZY_CONTEXT.low
    try:
        replay(account, gpu, workspaces=pessimistic, capacity=gpu.total * MIB - context)
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
