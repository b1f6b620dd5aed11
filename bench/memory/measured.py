"""The real step on the GPU at hand: what the driver, PyTorch's allocator and the tracker say of it."""

import multiprocessing
from typing import Any

import torch

from bench.conditions import gpu_state
from bench.measure.nvml import GpuMemory, NvmlUnavailable, gpu_memory
from bench.memory.step import Step, Training, track

STEPS = 3
"""The first brings in kernels and the optimiser's state, the second may still split blocks otherwise."""


def find_gpu() -> GpuMemory:
    """The GPU the real step can run on; raises NvmlUnavailable with the reason where there is none."""
    gpu = gpu_memory()
    if not torch.cuda.is_available():
        raise NvmlUnavailable(f"NVML shows {gpu.name}, but this PyTorch cannot use it")
    return gpu_memory(str(torch.cuda.get_device_properties(0).uuid))


def measure(step: Step) -> dict[str, Any]:
    """The real step on the first GPU, in a fresh process, so that the figures hold one CUDA context and one model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_here, (step,))


def _measure_here(step: Step) -> dict[str, Any]:
    """Bytes. "tracked" is of one more step, under the tracker, which takes no GPU memory itself."""
    device = torch.device("cuda", 0)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    before = gpu_memory(uuid).used  # NVML needs no CUDA context of this process, so this is all others'
    try:
        training = Training(step, device)
        for turn in range(STEPS):
            if turn == STEPS - 1:
                torch.cuda.reset_peak_memory_stats(device)
            training.step()
        torch.cuda.synchronize(device)
        after = gpu_memory(uuid)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        del training
        torch.cuda.empty_cache()
        tracked = track(step, device).peak.nbytes
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    if after.process is not None:
        source, nbytes = "NVML, this process", after.process
    else:
        source, nbytes = "NVML, growth of the device's use", after.used - before
    return {
        "source": source,
        "nbytes": nbytes,
        "allocated_peak": allocated,
        "reserved_peak": reserved,
        "tracked_peak": tracked,
        "outside_allocator": nbytes - reserved,
        "gpu": gpu_state(device),
    }
