"""The real step on the GPU at hand: what the driver, PyTorch's allocator and the tracker say of it."""

import multiprocessing
from typing import Any

import torch

from bench.conditions import gpu_state
from bench.measure.at_hand import ask_driver
from train.memory import IN_SHORT, PROCESS
from train.rehearsal import STEPS, Step, Training, track


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
    before = ask_driver(uuid)  # NVML needs no CUDA context of this process, so this is all others'
    try:
        training = Training(step, device)
        for turn in range(STEPS):
            if turn == STEPS - 1:
                torch.cuda.reset_peak_memory_stats(device)
            training.step()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    after = ask_driver(uuid)
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
