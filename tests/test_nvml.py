"""The NVML wrapper, through the real pynvml, against a small NVML library of our own (fake_nvml.c).

What depends on how pynvml loads its library runs in a fresh process, which finds ours by LD_LIBRARY_PATH.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
from fake_nvml import FIRST, INSTANCE, SECOND, fake_fixture, libraries_fixture  # noqa: F401

from bench.measure import nvml
from bench.measure.nvml import GpuConditions, GpuMemory, NvmlUnavailable, gpu_conditions, gpu_memory, open_gpu
from bench.measure.sampling import Recorder

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
ME = os.getpid()

LISTS_V3 = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3")
LISTS_V2 = ("nvmlDeviceGetComputeRunningProcesses_v2", "nvmlDeviceGetGraphicsRunningProcesses_v2")


# ---- the library itself: loaded, missing, refusing ----

QUERY = """
import dataclasses, json, sys
from bench.measure.nvml import NvmlUnavailable, gpu_memory
try:
    answer = dataclasses.asdict(gpu_memory())
except NvmlUnavailable as reason:
    answer = str(reason)
json.dump(answer, sys.stdout)
"""


def query(folder: Path, settings: str = "") -> dict | str:
    """What gpu_memory() answers in a process that finds NVML in `folder`."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": settings}
    process = subprocess.run(
        [sys.executable, "-c", QUERY],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(process.stdout)


def test_the_library_is_loaded_by_its_name(libraries):
    answer = query(libraries["new"], "0.used=7340032")
    assert (answer["name"], answer["uuid"], answer["used"], answer["reserved"]) == ("Paper GPU", FIRST, 7 * MIB, MIB)


def test_a_driver_from_before_the_newer_queries(libraries):
    answer = query(libraries["old"])
    assert (answer["used"], answer["reserved"]) == (6 * MIB, None)
    assert nvml.RESERVED_IS_USED in answer["notes"]


def test_reasons_are_one_line(libraries):
    assert query(libraries["new"], "fail:nvmlInitWithFlags=9") == "no NVML: Driver Not Loaded"
    assert query(libraries["broken"]) == "no NVML: NVML Shared Library Not Found"


def test_no_library_at_all(libraries):
    answer = query(libraries["absent"])
    if isinstance(answer, dict):
        pytest.skip(f"this machine has an NVML of its own ({answer['name']})")
    assert answer == "no NVML: NVML Shared Library Not Found"


@pytest.mark.parametrize(
    ("function", "code", "reason"),
    [
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "no NVML: Driver Not Loaded"),
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_NO_PERMISSION, "no NVML: Insufficient Permissions"),
        ("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_NO_PERMISSION, "NVML: Insufficient Permissions"),
        ("nvmlDeviceGetMemoryInfo_v2", pynvml.NVML_ERROR_GPU_IS_LOST, "NVML: GPU is lost"),
    ],
)
@pytest.mark.parametrize("ask", [gpu_memory, Recorder], ids=["gpu_memory", "Recorder"])
def test_whoever_refuses_is_named_and_nvml_is_closed(fake, function, code, reason, ask):
    fake.fail(function, code=code)
    if ask is gpu_memory:
        with pytest.raises(NvmlUnavailable) as raised:
            gpu_memory()
        told = str(raised.value)
    else:
        with Recorder(period=None) as recorder:
            pass
        told = recorder.recording.unavailable or f"NVML: {' '.join(recorder.recording.failures)}"
    assert told == reason


def test_no_gpu(fake):
    fake.set("devices", 0)
    with pytest.raises(NvmlUnavailable, match=r"^NVML sees no GPU$"):
        gpu_memory()
    with pytest.raises(NvmlUnavailable, match=rf"^NVML knows no GPU {FIRST}$"):
        gpu_memory(FIRST)


def test_errors_of_the_callers_own_leave_nvml_closed(fake):
    opened = []
    with pytest.raises(ZeroDivisionError), open_gpu():
        opened.append(fake.get("open") / 0)


def test_a_close_that_fails_is_no_error(fake):
    fake.fail("nvmlShutdown", code=pynvml.NVML_ERROR_GPU_IS_LOST)
    assert gpu_memory().used == 5 * MIB
    fake.fail("nvmlShutdown", code=pynvml.NVML_SUCCESS)
    pynvml.nvmlShutdown()


def test_the_stand_in_refuses_structures_of_another_size(fake):
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    with pytest.raises(pynvml.NVMLError) as raised:
        pynvml.nvmlDeviceGetMemoryInfo(device, pynvml.nvmlMemory_v2 + 8)
    assert raised.value.value == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    pynvml.nvmlShutdown()


# ---- memory ----


def test_memory_of_the_device_and_of_this_process(fake):
    fake.list_processes(dict(pid=1, used=2 * MIB), dict(pid=ME, used=3 * MIB), dict(pid=ME + 1, used=MIB))
    assert gpu_memory() == GpuMemory(
        name="Paper GPU", uuid=FIRST, total=16 * MIB, used=5 * MIB, process=3 * MIB, free=10 * MIB, reserved=MIB,
    )  # fmt: skip


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_where_reserved_memory_is_not_told_apart(fake, code):
    fake.list_processes(dict(pid=ME, used=3 * MIB))
    fake.fail("nvmlDeviceGetMemoryInfo_v2", code=code)
    memory = gpu_memory()
    assert (memory.used, memory.reserved, memory.free) == (6 * MIB, None, 10 * MIB)
    assert memory.notes == (nvml.RESERVED_IS_USED,)


@pytest.mark.parametrize("uuid", [SECOND, SECOND.removeprefix("GPU-")], ids=["nvml's", "torch's"])
def test_devices_are_told_by_uuid_whatever_their_order(fake, monkeypatch, uuid):
    """As after CUDA_VISIBLE_DEVICES=1,0: torch's first is NVML's second."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    memory = gpu_memory(uuid)
    assert (memory.name, memory.uuid, memory.total, memory.used) == ("Second GPU", SECOND, 32 * MIB, 10 * MIB)
    assert gpu_conditions(uuid).sm_clock_mhz == 1411
    assert gpu_memory().uuid == FIRST


@pytest.mark.parametrize("kinds", [("compute",), ("graphics",), ("compute", "graphics")], ids="+".join)
@pytest.mark.parametrize("newest", [True, False], ids=["v3", "v2"])
def test_a_process_counts_once_whatever_it_does(fake, kinds, newest):
    for kind in kinds:
        fake.list_processes(dict(pid=ME, used=3 * MIB), dict(pid=1, used=MIB), kind=kind)
    if not newest:
        if not hasattr(pynvml, LISTS_V2[0]):
            pytest.skip("this pynvml has only the newest query")
        fake.fail(*LISTS_V3, code=pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert gpu_memory().process == 3 * MIB


@pytest.mark.parametrize(
    ("entries", "failing", "reason"),
    [
        pytest.param([], (), f"NVML lists no process {ME} on this GPU", id="nothing-listed"),
        pytest.param([dict(pid=1, used=MIB)], (), f"NVML lists no process {ME} on this GPU", id="only-others"),
        pytest.param([dict(pid=ME, used=-1)], (), "NVML lists this process without its memory", id="not-available"),
        pytest.param(
            [dict(pid=ME, used=MIB)], (LISTS_V3[0], LISTS_V2[0]), "NVML lists no computing", id="not-supported"
        ),
        pytest.param([], (LISTS_V3[1], LISTS_V2[1]), f"NVML lists no process {ME} on", id="no-drawing-supported"),
    ],
)
def test_where_this_process_has_no_figure_the_reason_is_told(fake, entries, failing, reason):
    fake.list_processes(*entries)
    fake.fail(*failing)
    memory = gpu_memory()
    assert (memory.process, memory.used) == (None, 5 * MIB)
    (note,) = memory.notes
    assert note.startswith(reason)


def test_lists_of_drawing_processes_are_not_needed(fake):
    fake.list_processes(dict(pid=ME, used=3 * MIB))
    fake.fail(LISTS_V3[1], LISTS_V2[1])
    assert gpu_memory().process == 3 * MIB


@pytest.mark.parametrize("inside", [False, True])
def test_hidden_process_ids_are_explained(fake, monkeypatch, inside):
    here = os.stat("/proc/self/ns/pid").st_ino
    monkeypatch.setattr(nvml, "HOST_PID_NAMESPACE", here + inside)
    assert ("as in a container" in gpu_memory().notes[0]) is inside


def test_a_mig_instance_by_its_own_uuid(fake):
    fake.set("1.mig", 1)
    fake.list_processes(dict(pid=ME, used=4 * MIB, gi=3, ci=0), device=2)
    memory = gpu_memory("4444-5555")  # torch leaves "MIG-" away as it does "GPU-"
    assert (memory.uuid, memory.total, memory.used, memory.process) == (INSTANCE, 48 * MIB, 15 * MIB, 4 * MIB)
    assert SECOND in memory.notes[0]
    conditions = gpu_conditions(INSTANCE)
    assert (conditions.name, conditions.sm_clock_mhz, conditions.power_w) == ("Second GPU MIG 1g.5gb", 1411, 61.501)
    assert "clocks, power and heat" in conditions.notes[0]


def test_a_whole_gpu_in_mig_mode(fake):
    fake.set("1.mig", 1)
    fake.list_processes(dict(pid=ME, used=MIB, gi=1, ci=0), dict(pid=ME, used=2 * MIB, gi=2, ci=0), device=1)
    memory = gpu_memory(SECOND)
    assert (memory.uuid, memory.process) == (SECOND, 3 * MIB)
    assert "all its instances" in memory.notes[0]
    fake.set("1.mig", 0)
    assert gpu_memory(SECOND).notes == ()
    with pytest.raises(NvmlUnavailable, match=INSTANCE):
        gpu_memory(INSTANCE)


# ---- conditions ----

CONDITIONS = GpuConditions(
    name="Paper GPU", uuid=FIRST, driver="550.54.15", cuda_driver="12.4", sm_clock_mhz=1410, memory_clock_mhz=1593,
    power_w=61.5, power_limit_w=400.0, temperature_c=41, throttle_reasons=(),
)  # fmt: skip


def test_conditions(fake):
    assert gpu_conditions() == CONDITIONS


@pytest.mark.parametrize(
    ("functions", "unknown"),
    [
        (["nvmlSystemGetDriverVersion"], ["driver"]),
        (["nvmlSystemGetCudaDriverVersion"], ["cuda_driver"]),
        (["nvmlDeviceGetClockInfo"], ["sm_clock_mhz", "memory_clock_mhz"]),
        (["nvmlDeviceGetPowerUsage"], ["power_w"]),
        (["nvmlDeviceGetEnforcedPowerLimit"], ["power_limit_w"]),
        (["nvmlDeviceGetTemperature"], ["temperature_c"]),
        (
            ["nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetCurrentClocksEventReasons"],
            ["throttle_reasons"],
        ),
        (["nvmlDeviceIsMigDeviceHandle", "nvmlDeviceGetMigMode"], []),
    ],
    ids=lambda names: "+".join(names) if names and names[0].startswith("nvml") else "",
)
@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_UNKNOWN]
)
def test_what_is_not_told_is_none_and_the_rest_stays(fake, functions, unknown, code):
    fake.fail(*functions, code=code)
    assert gpu_conditions() == dataclasses.replace(CONDITIONS, **dict.fromkeys(unknown))


def test_a_lost_gpu_has_no_conditions(fake):
    fake.fail("nvmlDeviceGetPowerUsage", code=pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(NvmlUnavailable, match=r"^NVML: GPU is lost$"):
        gpu_conditions()


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x1, ("GPU idle",)),
        (0x4 | 0x40, ("software power cap", "hardware thermal slowdown")),
        (0x80 | 0x400, ("hardware power brake", "reliability")),
        (0x8 | 0x5000, ("hardware slowdown", "reasons 0x5000")),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_throttle_reasons_in_words(fake, bits, words, renamed):
    fake.set("0.throttle", bits)
    if renamed:
        fake.fail("nvmlDeviceGetCurrentClocksThrottleReasons", code=pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert gpu_conditions().throttle_reasons == words
