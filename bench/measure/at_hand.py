"""The GPU of this machine, as a kind to predict for."""

import torch

from bench.measure.nvml import GpuMemory, NvmlUnavailable, gpu_memory
from bench.measure.predict import MIB, GpuKind
from kernels.runtime import MULTIPROCESSORS


class NoGpu(Exception):
    """No step can run on a GPU here; the message is the reason, in one line."""


def find_gpu(device: torch.device | int = 0) -> GpuKind:
    """The GPU `device`, by default the first, as a kind to predict for. Raises NoGpu.

    What no kernel is compiled for ahead of time is predicted as the newest older architecture that is, or the oldest.
    """
    if not torch.cuda.is_available():
        try:
            raise NoGpu(f"NVML shows {gpu_memory().name}, but this PyTorch cannot use it")
        except NvmlUnavailable as reason:
            raise NoGpu(str(reason)) from reason
    properties = torch.cuda.get_device_properties(device)
    told = ask_driver(str(properties.uuid))
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


def ask_driver(uuid: str) -> GpuMemory | None:
    """What NVML says of the GPU's memory, or None where there is no NVML."""
    try:
        return gpu_memory(uuid)
    except NvmlUnavailable:
        return None
