"""What stands beside a time on a GPU: memory, TFLOP/s, GB/s, the share of what the GPU could do.

    peak_bytes            what one call allocates at most, above what lay there before it: its result and workspaces,
                          not its operands (PyTorch's allocator)
    host_seconds          what the host needs to queue one call; where it is above the time, the host is what a training
                          waits for
    nvml_process_bytes    what the driver says this process has, the benchmark's own buffers included; None where it
                          cannot tell processes apart
    tflops                two operations a useful multiply-add, of the convolution's geometry: the halo's zeros are none
    gb_per_s              each operand and each result once, whatever was really moved
    roofline_share        the least time that the GPU's data sheet allows for both, over the time measured

On a CPU there is none of them: its rows are there to show that they run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from bench.gpu_check.chains import OF_POOLS, Chain
from bench.measure.bound import roofline
from bench.measure.gpus import GPUS
from bench.measure.nvml import NvmlUnavailable, gpu_memory
from bench.measure.work import compulsory_bytes, useful_multiply_adds
from bench.shapes import Layer
from bench.timing_cases import KINDS, Case

GRADIENTS = ("input_grad", "weight_grad")
HOST_CALLS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a call has to do at least."""

    multiply_adds: int
    nbytes: int


def work_of(case: Case) -> Work | None:
    """Of an operation or a chain; None of a whole step, of which convolutions are a part."""
    if isinstance(case.subject, Chain):
        return _work_of_chain(case.subject)
    if not isinstance(case.subject, Layer):
        return None
    g, dtype = case.subject.geometry, KINDS[case.kind].dtype
    parts = ("forward", *GRADIENTS) if case.group == "step" else (case.group,)
    return Work(
        multiply_adds=len(parts) * useful_multiply_adds(g), nbytes=sum(compulsory_bytes(op, g, dtype) for op in parts)
    )


def _work_of_chain(chain: Chain) -> Work:
    g, size = chain.geometry, chain.dtype.itemsize
    x, w, y, bias = (prod(shape) * size for shape in (g.x_shape, g.w_shape, g.y_shape, (g.Co,)))
    if chain.name in OF_POOLS:  # read or write x, the pooled y, and a byte for each window's winner
        return Work(multiply_adds=0, nbytes=x + y + prod(g.y_shape))
    if chain.name == "bias_grad":
        return Work(multiply_adds=0, nbytes=y + bias)
    products = useful_multiply_adds(g)
    if chain.name == "conv_relu":
        return Work(multiply_adds=products, nbytes=compulsory_bytes("forward", g, chain.dtype))
    # dy, y as the mask, x and w; dw, the bias's and, where it is asked for, dx
    results = w + bias + (x if chain.asks_for_dx else 0)
    read = 2 * y + x + (w if chain.asks_for_dx else 0)
    return Work(multiply_adds=(1 + chain.asks_for_dx) * products, nbytes=read + results)


def memory_of(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Of one call, which is not timed."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    found: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    try:
        told = gpu_memory(str(torch.cuda.get_device_properties(device).uuid))
    except NvmlUnavailable as reason:
        return found | {"nvml": f"not available: {reason}"}
    return found | {"nvml_process_bytes": told.process, "nvml_used_bytes": told.used}


def host_of(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """What the host needs to queue one call: the median of HOST_CALLS, each for a GPU that has nothing else to do."""
    times = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
    return {"host_seconds": statistics.median(times)}


def speeds(work: Work, seconds: float, case: Case, arch: str) -> dict[str, Any]:
    """Of a call that took so long on a GPU of `arch`, as "sm_90"."""
    found: dict[str, Any] = {"gb_per_s": work.nbytes / seconds / 1e9}
    if work.multiply_adds:
        found["tflops"] = 2 * work.multiply_adds / seconds / 1e12
    if arch not in GPUS:
        return found | {"roofline": f"not available: no data sheet of {arch} is known here"}
    gpu, kind = GPUS[arch], KINDS[case.kind]
    least = roofline(gpu, work.multiply_adds, work.nbytes, kind.dtype, kind.precision)
    return found | {"roofline": gpu.name, "roofline_by": least.by, "roofline_share": least.seconds / seconds}
