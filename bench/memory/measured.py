"""The real step on the GPU at hand: what the driver, PyTorch's allocator and the tracker say of it."""

import multiprocessing
from typing import Any

import torch

from bench.conditions import gpu_state
from bench.measure.nvml import GpuMemory, NvmlUnavailable, gpu_memory
from bench.measure.predict import MIB, GpuKind
from bench.memory.step import STEPS, Step, Training, track
from kernels.runtime import MULTIPROCESSORS
from train.memory import IN_SHORT, PROCESS


class NoGpu(Exception):
    """No step can run on a GPU here; the message is the reason, in one line."""


def find_gpu() -> GpuKind:
    """The first GPU, as a kind to predict for. Raises NoGpu.

    What no kernel is compiled for ahead of time is predicted as the newest older architecture that is, or the oldest.
    """
    if not torch.cuda.is_available():
        try:
            raise NoGpu(f"NVML shows {gpu_memory().name}, but this PyTorch cannot use it")
        except NvmlUnavailable as reason:
            raise NoGpu(str(reason)) from reason
    properties = torch.cuda.get_device_properties(0)
    told = _ask_driver(str(properties.uuid))
    known = {int(arch.removeprefix("sm_")): arch for arch in MULTIPROCESSORS}
    generation = max((one for one in known if one <= 10 * properties.major + properties.minor), default=min(known))
    return GpuKind(
        name=properties.name,
        arch=known[generation],
        multiprocessors=properties.multi_processor_count,
        total=(told.total if told else properties.total_memory) // MIB,
        # What PyTorch names as the total is without the driver's own share.
        kept=(told.reserved or 0) // MIB if told else 0,
    )


def _ask_driver(uuid: str) -> GpuMemory | None:
    try:
        return gpu_memory(uuid)
    except NvmlUnavailable:
        return None


def measure(step: Step) -> dict[str, Any]:
    """The real step on the first GPU, in a fresh process, so that the figures hold one CUDA context and one model.

    Bytes; None is what is not known: "nbytes" and "outside_allocator" without NVML. "tracked_peak" is of one more
    training, under the tracker, which takes no GPU memory itself. {"error": reason} where the step did not fit.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_here, (step,))


def measure_here(step: Step) -> dict[str, Any]:
    """As `measure`, in this process, which has not touched the GPU yet."""
    device = torch.device("cuda", 0)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    before = _ask_driver(uuid)  # NVML needs no CUDA context of this process, so this is all others'
    try:
        training = Training(step, device)
        for turn in range(STEPS):
            if turn == STEPS - 1:
                torch.cuda.reset_peak_memory_stats(device)
            training.step()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    after = _ask_driver(uuid)
    reserved = torch.cuda.max_memory_reserved(device)
    if before is None or after is None:
        source, nbytes = "PyTorch alone, without NVML", None
    elif after.process is not None:
        source, nbytes = IN_SHORT[PROCESS], after.process
    else:
        source, nbytes = "NVML, growth of the device's use", after.used - before.used
    measured = {
        "source": source,
        "nbytes": nbytes,
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "reserved_peak": reserved,
        "outside_allocator": None if nbytes is None else nbytes - reserved,
        "gpu": gpu_state(device),
    }
    del training
    torch.cuda.empty_cache()
    try:
        return measured | {"tracked_peak": track(step, device).peak.nbytes}
    except torch.OutOfMemoryError:  # what others took meanwhile
        return measured | {"tracked_peak": None}
