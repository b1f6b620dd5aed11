"""Where a kernel runs: compiled on CUDA, in Triton's interpreter on the CPU, or compiled ahead for a named GPU.

`triton.jit` decides between compiler and interpreter once, from an environment variable that must be set before
Triton is imported, and `import torchvision` already imports it. Here both forms of a kernel are built from one
function, and each launch picks by the device of its tensors, so that CPU and CUDA tensors work in one process.
The price: a kernel may not call jitted helpers, and `tl.zeros`, `tl.sum`, `tl.max` and `tl.cdiv` are such helpers.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, MockTensor

from kernels import interpreter
from kernels.geometry import ConvGeometry

INTERPRETER = "interpreter"

# What the kernels compute in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Compilation ahead of time swaps Triton's driver and interpretation patches `triton.language`: global state, which a
# launch in another thread must not meet half way.
_triton_lock = threading.RLock()
_ahead = threading.local()
_listeners: list[Callable[[int, str, torch.Tensor], None]] = []
_operations: dict[str, Callable[..., object]] = {}


class Kernel:
    """A Triton kernel in both forms, made from one function by `@kernel`; see `launch`."""

    def __init__(self, fn: Callable) -> None:
        self.name = fn.__name__
        self.compiled = JITFunction(fn)
        self.interpreted = InterpretedFunction(fn)


kernel = Kernel


@dataclass(frozen=True, slots=True)
class Target:
    """What a launch is made for."""

    name: str
    """"interpreter", or the GPU architecture as "sm_80"."""
    multiprocessors: int
    """Streaming multiprocessors of the device; 1 for the interpreter, which runs one program at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A launch as it would be on a GPU that is not here."""

    kernel: CompiledKernel
    """With `.asm["cubin"]` (`"hsaco"` for AMD), `.asm["ptx"]`, `.metadata`."""
    grid: tuple[int, int]
    """Programs on each axis."""
    arguments: dict[str, object]
    """By name, all that are no tensors: sizes, strides, block sizes, `num_warps`, `num_stages`."""


# Of the best-known GPU of each generation: T4, A100, RTX 3090, L4, H100, B200, RTX 5090. A launch asks its device;
# these serve compilation ahead of time only.
MULTIPROCESSORS = {"sm_75": 40, "sm_80": 108, "sm_86": 82, "sm_89": 58, "sm_90": 132, "sm_100": 148, "sm_120": 170}
# Compute units of AMD's MI300X and RX 7900 XTX, for which the kernels compile; nobody has run them there.
COMPUTE_UNITS = {"gfx942": 304, "gfx1100": 96}


def backend_for(device: torch.device | str) -> str:
    """How kernels run on tensors of `device`: "compiled" or "interpreter".

    Raises RuntimeError for devices other than CUDA and the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "compiled"
    if device.type == "cpu":
        return INTERPRETER
    raise RuntimeError(f"the Triton kernels run on cuda and cpu tensors, not on {device.type}")


def target_for(device: torch.device) -> Target:
    """The target of a launch on tensors of `device`; meta tensors stand for that of `compiling_ahead` or `planning`.

    Raises RuntimeError for devices that no kernel runs on.
    """
    if device.type == "meta" and getattr(_ahead, "target", None) is not None:
        return _ahead.target
    if backend_for(device) == INTERPRETER:
        return Target(INTERPRETER, 1)
    return _gpu(device)


@cache
def _gpu(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


@contextlib.contextmanager
def on_allocate(listener: Callable[[int, str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `listener(nbytes, what, tensor)` for each buffer a launcher takes, in any thread, while it is open.

    A dispatch mode never looks inside a custom operator; this is how an accountant sees what is taken there:
    outputs, split-K workspaces and layout copies.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def empty(
    shape: tuple[int, ...],
    what: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """An uninitialised tensor, announced to the listeners of `on_allocate` as `what`."""
    tensor = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    for listener in tuple(_listeners):
        listener(tensor.untyped_storage().nbytes(), what, tensor)
    return tensor


def channels_last(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The 4-D tensor itself if its memory is dense (N, H, W, C), else a copy that is, announced as `what`."""
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    copy = empty(
        tuple(tensor.shape), what, dtype=tensor.dtype, device=tensor.device, memory_format=torch.channels_last
    )
    return copy.copy_(tensor)


def dense(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor itself if its memory is dense in the order of its axes, else a copy that is, announced as `what`."""
    if tensor.is_contiguous():
        return tensor
    return empty(tuple(tensor.shape), what, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def filter_matrix(w: torch.Tensor, geometry: ConvGeometry, *, transposed: bool) -> tuple[torch.Tensor, tuple[int, ...]]:
    """w (Co, Ci/groups, R, S), channels-last -> itself, or a copy whose groups are (Ci/groups, R, S, Co/groups) each.

    With its strides over (output channel, tap, input channel), in elements.
    """
    g = geometry
    if not transposed:
        return w, (g.R * g.S * g.Ci_group, g.Ci_group, 1)
    shape = (g.groups, g.Ci_group, g.R, g.S, g.Co_group)
    copy = empty(shape, "transposed weight", dtype=w.dtype, device=w.device)
    copy.copy_(w.unflatten(0, (g.groups, g.Co_group)).permute(0, 2, 3, 4, 1))
    return copy, (1, g.Co_group, g.R * g.S * g.Co_group)


def index_type(*extents: int) -> tl.dtype:
    """The integer type that counts pixels: int32 while every extent fits it, else int64."""
    return tl.int32 if max(extents) < 2**31 else tl.int64


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type that products of `dtype` are summed in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(
    kernel: Kernel,
    target: Target,
    grid: tuple[int, int],
    *args: torch.Tensor | int | None,
    output: torch.Tensor,
    **constants,
) -> None:
    """Runs `kernel` over `grid`; `constants` are its compile-time arguments, with `num_warps` and `num_stages`.

    `output` is the one of `args` that the kernel writes. CUDA takes 2**31 - 1 programs on the first axis of a grid,
    65,535 on the second.

    Nothing is launched for meta tensors: under `compiling_ahead` the kernel is compiled for `target` and collected.
    """
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if tensors[0].is_meta and _ahead.collected is None:
        return
    if target.name == INTERPRETER:
        with _triton_lock:
            interpreter.interpret(kernel.interpreted, grid, args, output, constants)
    elif tensors[0].is_meta:
        stand_ins = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        compiled = kernel.compiled.warmup(*stand_ins, grid=grid, **constants)
        names = kernel.compiled.arg_names
        numbers = {name: arg for name, arg in zip(names, args, strict=False) if not isinstance(arg, torch.Tensor)}
        _ahead.collected.append(Launch(kernel=compiled, grid=grid, arguments=numbers | constants))
    else:
        with _triton_lock, torch.cuda.device(tensors[0].device):
            kernel.compiled[grid](*args, **constants)


class _AheadDriver:
    """What the JIT asks of a GPU's driver in order to specialise and compile, without the GPU."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        if self.arch in COMPUTE_UNITS:
            # A wavefront has 64 lanes on the data centre's generations and 32 on the gamers'.
            return GPUTarget("hip", self.arch, 64 if self.arch.startswith("gfx9") else 32)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        # The JIT keeps one cache a device; a name no real device has keeps these kernels apart.
        return f"ahead of time for {self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_ahead(arch: str) -> Iterator[list[Launch]]:
    """While open, launchers called on meta tensors compile for `arch` ("sm_80") instead of running.

    The launches are appended to the list that the context yields. Needs no GPU, and may be entered in a process
    that also interprets or runs kernels.

    Raises ValueError for an architecture that is neither in `MULTIPROCESSORS` nor in `COMPUTE_UNITS`.
    """
    known = MULTIPROCESSORS | COMPUTE_UNITS
    if arch not in known:
        raise ValueError(f"unknown GPU architecture {arch!r}; known: {', '.join(known)}")
    with _triton_lock:
        active = driver._active
        driver.set_active(_AheadDriver(arch))
        try:
            with _standing_for(Target(arch, known[arch]), []) as compiled:
                yield compiled
        finally:
            driver._active = active


@contextlib.contextmanager
def planning(target: Target) -> Iterator[None]:
    """While open, operators on meta tensors take the buffers that their launch on `target` would, and launch nothing.

    So an accountant hears by `on_allocate` of workspaces and layout copies on a device that is not there.
    """
    with _standing_for(target, None):
        yield


@contextlib.contextmanager
def _standing_for(target: Target, collected: list[Launch] | None) -> Iterator[list[Launch] | None]:
    """While open, meta tensors of this thread stand for those on `target`."""
    outer = getattr(_ahead, "target", None), getattr(_ahead, "collected", None)
    _ahead.target, _ahead.collected = target, collected
    try:
        yield collected
    finally:
        _ahead.target, _ahead.collected = outer


def is_planned(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a meta tensor under `planning`."""
    return tensor.is_meta and getattr(_ahead, "target", None) is not None and _ahead.collected is None


def operation(name: str) -> Callable[[Callable], Callable]:
    """Registers `call(geometry, dtype, precision)`, which calls a launcher on meta tensors, for `compile_ahead`.

    Raises ValueError for a name that is taken.
    """
    if name in _operations:
        raise ValueError(f"an operation is called {name!r} already")

    def register(call: Callable[[ConvGeometry, torch.dtype, str], object]) -> Callable:
        _operations[name] = call
        return call

    return register


def withdraw_operation(name: str) -> None:
    """Takes back what `operation` registered."""
    del _operations[name]


def compile_ahead(
    op: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float16,
    precision: str = "ieee",
    arch: str = "sm_80",
) -> list[CompiledKernel]:
    """The kernels that `op` would launch on a GPU of `arch`, compiled without one; `launches_ahead` tells more of each.

    Takes and raises what that does. Each kernel has `.asm["cubin"]` (`"hsaco"` for AMD), `.asm["ptx"]`, `.metadata`.
    """
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    launches = launches_ahead(op, x_shape, w_shape, **options, dtype=dtype, precision=precision, arch=arch)
    return [launch.kernel for launch in launches]


def launches_ahead(
    op: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float16,
    precision: str = "ieee",
    arch: str = "sm_80",
) -> list[Launch]:
    """What `op` would launch on a GPU of `arch`, in that order, compiled without one.

    op is "forward" (with a bias), "input_grad" or "weight_grad", "relu_max_pool" or "relu_max_pool_grad", whose window
    takes the filter's place, or a variant's name (kernels/variants), once that is imported; x_shape (N, Ci, H, W),
    w_shape (Co, Ci/groups, R, S), all tensors channels-last; precision is "ieee" or "tf32" and concerns float32 alone.
    The launcher itself picks tile and arguments, on meta tensors, and the JIT itself specialises them.

    Raises ValueError for an unknown operation, architecture, dtype or precision, and RuntimeError for a geometry that
    does not fit.
    """
    if op not in _operations:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(_operations)}")
    if dtype not in DTYPES:
        raise ValueError(f"unsupported dtype {dtype}; supported: {', '.join(map(str, DTYPES))}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    geometry = ConvGeometry.of(x_shape, w_shape, stride, padding, dilation, groups)
    with compiling_ahead(arch) as launches:
        _operations[op](geometry, dtype, precision)
    return launches


def meta_channels_last(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A channels-last tensor without memory, as operands of `operation` calls are."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=torch.channels_last)
