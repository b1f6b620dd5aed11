"""GPU memory as the driver tells it (NVML, the source of nvidia-smi): the whole device's, and this process's.

    gpu_memory(str(torch.cuda.get_device_properties(0).uuid)).used

The driver counts what no allocator knows of: the CUDA context, libraries' code and workspaces, other processes.
`gpu_conditions` tells clocks, power and heat, without which no time means much. `bench.measure.sampling` follows the
memory over a run.

Devices are named by UUID: NVML numbers them by PCI bus whatever CUDA_VISIBLE_DEVICES says, torch by that variable.
Where there is no NVML, `NvmlUnavailable` says why in one line. What a driver cannot tell is None, and `notes` say why.

Source: NVML API Reference Guide, https://docs.nvidia.com/deploy/nvml-api/ ("System Queries", "Device Queries",
"Multi Instance GPU Management").
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pynvml

HOST_PID_NAMESPACE = 0xEFFFFFFC
"""The inode that Linux gives the outermost namespace of process ids (include/linux/proc_ns.h)."""

RESERVED_IS_USED = "this driver does not tell reserved memory apart: used includes it"

# What clocks may be held down by, from the lowest bit up: NVML API reference, nvmlClocksEventReasons.
THROTTLE_REASONS = (
    "GPU idle",
    "application clocks",
    "software power cap",
    "hardware slowdown",
    "sync boost",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
    "display clocks",
    "board limit",
    "reliability",
)

_CANNOT_TELL = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NoData,
    pynvml.NVMLError_Timeout,
    pynvml.NVMLError_Unknown,
)


class NvmlUnavailable(Exception):
    """NVML cannot tell; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Memory of one GPU at one moment, in bytes."""

    name: str
    """As "Tesla T4"."""
    uuid: str
    """As "GPU-8f6d...", which outlives reordering by CUDA_VISIBLE_DEVICES; "MIG-..." of a MIG instance."""
    total: int
    """What the board has, or the MIG instance."""
    used: int
    """Taken by all processes together; without what the driver reserves, where this driver can tell them apart."""
    process: int | None
    """Taken by this process; None where NVML cannot tell, as in containers that hide process ids."""
    free: int | None = None
    reserved: int | None = None
    """Kept by the driver and its firmware; None where it is part of `used`."""
    notes: tuple[str, ...] = ()
    """What these figures lack or hold besides, a line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConditions:
    """What a measurement on one GPU depended on; None is what the GPU, the driver or the user's rights do not tell."""

    name: str
    uuid: str
    driver: str | None
    """As "550.54.15"."""
    cuda_driver: str | None
    """The newest CUDA that the driver serves, as "12.4"."""
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    """The lowest limit in force, whoever set it."""
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None
    """Why clocks are not higher just now, of THROTTLE_REASONS; () if nothing holds them down."""
    notes: tuple[str, ...] = ()


def gpu_memory(uuid: str | None = None) -> GpuMemory:
    """Memory of the GPU with this UUID ("GPU-" may be missing, as in torch's device properties), else of the first.

    Raises NvmlUnavailable where there is no NVML, no driver, no permission or no such GPU.
    """
    with open_gpu(uuid) as gpu:
        return gpu.memory()


def gpu_conditions(uuid: str | None = None) -> GpuConditions:
    """Versions, clocks, power and heat of the GPU that `gpu_memory` would take. Raises NvmlUnavailable as that does."""
    with open_gpu(uuid) as gpu:
        return gpu.conditions()


@contextlib.contextmanager
def open_gpu(uuid: str | None = None) -> Iterator["Gpu"]:
    """The GPU that `gpu_memory` would take, for as many questions as the context lasts.

    Raises NvmlUnavailable as `gpu_memory` does; an NVMLError that leaves the context becomes one.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"no NVML: {error}") from error
    try:
        yield Gpu(_find(uuid))
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML: {error}") from error
    finally:
        # Fails for a GPU that is lost, after which there is nothing left to close.
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


class Gpu:
    """A GPU, or a MIG instance of one, while NVML is open. Its methods raise pynvml.NVMLError once it is lost."""

    def __init__(self, handle: pynvml.c_nvmlDevice_t) -> None:
        self.handle = self.board = handle
        self.name: str = pynvml.nvmlDeviceGetName(handle)
        self.uuid: str = pynvml.nvmlDeviceGetUUID(handle)
        self.notes: tuple[str, ...] = ()
        is_instance = _ask(pynvml.nvmlDeviceIsMigDeviceHandle, handle)
        if is_instance is not None and is_instance.value:
            self.board = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            board = pynvml.nvmlDeviceGetUUID(self.board)
            self.notes = (f"a MIG instance: memory is its own; clocks, power and heat are those of all of {board}",)
        elif (_ask(pynvml.nvmlDeviceGetMigMode, handle) or [0])[0]:
            self.notes = ("a whole GPU in MIG mode: memory is that of all its instances together",)

    def memory(self) -> GpuMemory:
        """The memory now."""
        # Drivers before 510 have only the older query.
        told = _ask(pynvml.nvmlDeviceGetMemoryInfo, self.handle, pynvml.nvmlMemory_v2)
        reserved = None if told is None else told.reserved
        if told is None:
            told = pynvml.nvmlDeviceGetMemoryInfo(self.handle)
        process, reason = _process_memory(self.handle)
        return GpuMemory(
            name=self.name,
            uuid=self.uuid,
            total=told.total,
            used=told.used,
            process=process,
            free=told.free,
            reserved=reserved,
            notes=self.notes + ((RESERVED_IS_USED,) if reserved is None else ()) + ((reason,) if reason else ()),
        )

    def conditions(self) -> GpuConditions:
        """The conditions now."""
        cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion)
        power = _ask(pynvml.nvmlDeviceGetPowerUsage, self.board)
        limit = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, self.board)
        reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, self.board)
        if reasons is None:  # the name that it has since driver 535
            reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self.board)
        return GpuConditions(
            name=self.name,
            uuid=self.uuid,
            driver=_ask(pynvml.nvmlSystemGetDriverVersion),
            cuda_driver=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            sm_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, self.board, pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, self.board, pynvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            temperature_c=_ask(pynvml.nvmlDeviceGetTemperature, self.board, pynvml.NVML_TEMPERATURE_GPU),
            throttle_reasons=None if reasons is None else _in_words(reasons),
            notes=self.notes,
        )


def _find(uuid: str | None) -> pynvml.c_nvmlDevice_t:
    """torch leaves the prefix of a UUID away, and in MIG mode it may be the instance's or the whole GPU's."""
    if uuid is None:
        if pynvml.nvmlDeviceGetCount() == 0:
            raise NvmlUnavailable("NVML sees no GPU")
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    for prefix in ("",) if uuid.startswith(("GPU-", "MIG-")) else ("GPU-", "MIG-"):
        with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            return pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
    raise NvmlUnavailable(f"NVML knows no GPU {uuid}")


def _ask(query: Callable[..., Any], *arguments: object) -> Any:
    """The answer, or None where this GPU, driver or user gets none."""
    try:
        return query(*arguments)
    except _CANNOT_TELL:
        return None


def _queries(kind: str) -> list[Callable]:
    """The queries for running processes, newest first.

    The name without a version refuses drivers that lack the newest one, and some releases of pynvml have no _v2.
    """
    names = (f"nvmlDeviceGet{kind}RunningProcesses_{version}" for version in ("v3", "v2"))
    return [getattr(pynvml, name) for name in names if hasattr(pynvml, name)]


_PROCESS_QUERIES = {kind: _queries(kind) for kind in ("Compute", "Graphics")}


def _process_memory(handle: pynvml.c_nvmlDevice_t) -> tuple[int | None, str | None]:
    """Bytes that this process takes on this device, or None and the reason.

    A process that computes and draws is in both lists with the same figure; on a whole GPU in MIG mode it has an
    entry for each instance.
    """
    lists = {}
    for kind, queries in _PROCESS_QUERIES.items():
        answers = (_ask(query, handle) for query in queries)
        lists[kind] = next((answer for answer in answers if answer is not None), None)
    mine = {
        (entry.gpuInstanceId, entry.computeInstanceId): entry.usedGpuMemory
        for listed in lists.values()
        for entry in listed or ()
        if entry.pid == os.getpid()
    }
    if mine and None not in mine.values():
        return sum(mine.values()), None
    if mine:
        return None, "NVML lists this process without its memory, as under WSL"
    if lists["Compute"] is None:
        return None, "NVML lists no computing processes of this GPU: not supported or not permitted"
    hidden = "; it runs in a namespace of process ids, as in a container" if _in_pid_namespace() else ""
    return None, f"NVML lists no process {os.getpid()} on this GPU, which is this one{hidden}"


def _in_pid_namespace() -> bool:
    """Whether process ids here are others than the driver's, which knows the host's."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino != HOST_PID_NAMESPACE
    except OSError:
        return False


def _in_words(bits: int) -> tuple[str, ...]:
    known = tuple(word for bit, word in enumerate(THROTTLE_REASONS) if bits >> bit & 1)
    unknown = bits >> len(THROTTLE_REASONS) << len(THROTTLE_REASONS)
    return known + ((f"reasons {unknown:#x}",) if unknown else ())
