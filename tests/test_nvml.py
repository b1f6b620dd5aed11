"""The NVML wrapper, through the real pynvml, against a small NVML library of our own.

pynvml loads its library once a process, so each case is a fresh process that finds ours by LD_LIBRARY_PATH.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# One GPU of 16 MiB, of which 5 are used by everything and 1 is reserved by the driver. FAKE_NVML says what is odd.
SOURCE = r"""
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;
enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9 };
static const char *uuid = "GPU-0000-1111";
static int is(const char *oddity) { const char *set = getenv("FAKE_NVML"); return set && !strcmp(set, oddity); }

int nvmlInitWithFlags(unsigned flags) { return is("no-driver") ? NO_DRIVER : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) { return error == NO_DRIVER ? "Driver Not Loaded" : "Some Error"; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return SUCCESS; }
int nvmlDeviceGetHandleByUUID(const char *asked, void **device) {
    *device = (void *)1;
    return strcmp(asked, uuid) ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetName(void *device, char *name, unsigned size) { strncpy(name, "Paper GPU", size); return SUCCESS; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { strncpy(text, uuid, size); return SUCCESS; }
int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *memory) {
    *memory = (memory_v1){16 << 20, 10 << 20, 6 << 20};
    return SUCCESS;
}
#ifdef OLD
#define nvmlDeviceGetComputeRunningProcesses_v3 nvmlDeviceGetComputeRunningProcesses_v2
#else
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory) {
    if (memory->version != (sizeof(memory_v2) | 2 << 24)) return INVALID;
    memory->total = 16 << 20, memory->reserved = 1 << 20, memory->free = 10 << 20, memory->used = 5 << 20;
    return is("no-v2") ? NOT_SUPPORTED : SUCCESS;
}
#endif
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *list) {
    if (is("no-processes")) return NOT_SUPPORTED;
    unsigned room = *count;
    *count = 2;
    if (room < 2) return TOO_SMALL;
    list[0] = (process){1, 2 << 20, 0, 0};
    list[1] = (process){is("hidden-pid") ? 7 : getpid(), is("used-unknown") ? -1ULL : 3 << 20, 0, 0};
    return SUCCESS;
}
"""

QUERY = """
import dataclasses, json, sys
from bench.measure.nvml import NvmlUnavailable, gpu_memory
try:
    answer = dataclasses.asdict(gpu_memory(*sys.argv[1:]))
except NvmlUnavailable as reason:
    answer = str(reason)
json.dump(answer, sys.stdout)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with our libnvidia-ml.so.1, "new" and "old" (before driver 510), and an "absent" one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for NVML with")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("new", "old", "absent")}
    for name, flags in (("new", ()), ("old", ("-DOLD",))):
        command = [compiler, "-shared", "-fPIC", *flags, "-x", "c", "-", "-o", folders[name] / "libnvidia-ml.so.1"]
        subprocess.run(command, input=SOURCE, text=True, check=True)
    return folders


def query(folder: Path, oddity: str = "", uuid: str | None = None) -> dict | str:
    """What gpu_memory(uuid) answers in a process that finds NVML in `folder`."""
    arguments = [] if uuid is None else [uuid]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": oddity}
    process = subprocess.run(
        [sys.executable, "-c", QUERY, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(process.stdout)


MIB = 2**20
WHOLE = {"name": "Paper GPU", "uuid": "GPU-0000-1111", "total": 16 * MIB, "used": 5 * MIB, "process": 3 * MIB}


@pytest.mark.parametrize("uuid", [None, "GPU-0000-1111", "0000-1111"], ids=["first", "uuid", "uuid-as-torch-has-it"])
def test_memory_of_the_device_and_of_this_process(libraries, uuid):
    assert query(libraries["new"], uuid=uuid) == WHOLE


@pytest.mark.parametrize(
    ("oddity", "differs"),
    [
        ("no-v2", {"used": 6 * MIB}),
        ("no-processes", {"process": None}),
        ("hidden-pid", {"process": None}),
        ("used-unknown", {"process": None}),
    ],
)
def test_what_a_driver_cannot_tell(libraries, oddity, differs):
    assert query(libraries["new"], oddity) == WHOLE | differs


def test_a_driver_from_before_the_newer_queries(libraries):
    assert query(libraries["old"]) == WHOLE | {"used": 6 * MIB}


def test_reasons_are_one_line(libraries):
    assert query(libraries["new"], "no-driver") == "no NVML: Driver Not Loaded"
    assert query(libraries["new"], uuid="GPU-9999") == "NVML knows no GPU GPU-9999"


def test_no_library_at_all(libraries):
    answer = query(libraries["absent"])
    if isinstance(answer, dict):
        pytest.skip(f"this machine has an NVML of its own ({answer['name']})")
    assert answer == "no NVML: NVML Shared Library Not Found"
