"""GPU memory as the driver tells it (NVML, the source of nvidia-smi): the whole device's, and this process's.

The driver counts what no allocator knows of: the CUDA context, libraries' code and workspaces, other processes.
Where there is no NVML, `NvmlUnavailable` says why in one line.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pynvml


class NvmlUnavailable(Exception):
    """NVML cannot tell; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Memory of one GPU at one moment, in bytes."""

    name: str
    """As "Tesla T4"."""
    uuid: str
    """As "GPU-8f6d...", which outlives reordering by CUDA_VISIBLE_DEVICES."""
    total: int
    """What the board has."""
    used: int
    """Taken by all processes together; without what the driver reserves, where this driver can tell them apart."""
    process: int | None
    """Taken by this process; None where NVML cannot tell, as in containers that hide process ids."""


def gpu_memory(uuid: str | None = None) -> GpuMemory:
    """Memory of the GPU with this UUID ("GPU-" may be missing, as in torch's device properties), else of the first.

    Raises NvmlUnavailable where there is no NVML, no driver or no such GPU.
    """
    with _session():
        handle = _device(uuid)
        memory = _memory(handle)
        return GpuMemory(
            name=pynvml.nvmlDeviceGetName(handle),
            uuid=pynvml.nvmlDeviceGetUUID(handle),
            total=memory.total,
            used=memory.used,
            process=_process_memory(handle),
        )


@contextlib.contextmanager
def _session() -> Iterator[None]:
    """NVML open; its errors become NvmlUnavailable."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"no NVML: {error}") from error
    try:
        yield
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML: {error}") from error
    finally:
        pynvml.nvmlShutdown()


def _device(uuid: str | None) -> pynvml.c_nvmlDevice_t:
    if uuid is None:
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    if not uuid.startswith(("GPU-", "MIG-")):
        uuid = f"GPU-{uuid}"
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument) as error:
        raise NvmlUnavailable(f"NVML knows no GPU {uuid}") from error


def _memory(handle: pynvml.c_nvmlDevice_t) -> pynvml.c_nvmlMemory_t | pynvml.c_nvmlMemory_v2_t:
    """The newer query keeps apart what the driver reserves; drivers before 510 have only the older one."""
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported):
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _process_memory(handle: pynvml.c_nvmlDevice_t) -> int | None:
    # pynvml's name without a version refuses drivers that lack the newest one.
    for query in (
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
    ):
        try:
            processes = query(handle)
        except (
            pynvml.NVMLError_FunctionNotFound,
            pynvml.NVMLError_NotSupported,
            pynvml.NVMLError_NoPermission,
        ):
            continue
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    return None
