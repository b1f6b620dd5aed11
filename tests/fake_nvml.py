"""Our small NVML library (fake_nvml.c) in the tests: fixtures for a test file to import.

`fake` is that library given to the real pynvml in place of the one it would load, steered by names that the C file
lists. A test that uses it must leave NVML closed as often as opened. `libraries` are folders for LD_LIBRARY_PATH.
"""

import ctypes
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
FIRST, SECOND, INSTANCE = "GPU-0000-1111", "GPU-2222-3333", "MIG-4444-5555"
"""The UUIDs of its devices."""


class Fake:
    """The library in this process, and its table of numbers."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_longlong)
        self.library.fake_get.argtypes = (ctypes.c_char_p,)
        self.library.fake_get.restype = ctypes.c_longlong

    def set(self, name: str, value: int) -> None:
        self.library.fake_set(name.encode(), value)

    def get(self, name: str) -> int:
        return self.library.fake_get(name.encode())

    def fail(self, *functions: str, code: int = pynvml.NVML_ERROR_NOT_SUPPORTED) -> None:
        for function in functions:
            self.set(f"fail:{function}", code)

    def list_processes(self, *entries: dict[str, int], device: int = 0, kind: str = "compute") -> None:
        self.set(f"{device}.{kind}", len(entries))
        for i, entry in enumerate(entries):
            for name, value in entry.items():
                self.set(f"{device}.{kind}.{i}.{name}", value)

    def await_samples(self, count: int = 4) -> None:
        """Returns when so many more samples were taken, by whichever thread."""
        aim = self.get("calls:nvmlDeviceGetMemoryInfo_v2") + count
        deadline = time.monotonic() + 30
        while self.get("calls:nvmlDeviceGetMemoryInfo_v2") < aim:
            assert time.monotonic() < deadline, "nothing takes samples"
            time.sleep(0.001)


@pytest.fixture(name="libraries", scope="session")
def libraries_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with our libnvidia-ml.so.1: "new", "old" (before driver 510), "broken" (no library), "absent"."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for NVML with")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("new", "old", "broken", "absent")}
    for name, flags in (("new", ()), ("old", ("-DOLD",))):
        output = folders[name] / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-pthread", *flags, SOURCE, "-o", output], check=True)
    (folders["broken"] / "libnvidia-ml.so.1").write_text("not an ELF file")
    return folders


@pytest.fixture(name="fake")
def fake_fixture(libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake = Fake(libraries["new"] / "libnvidia-ml.so.1")
    fake.library.fake_reset()
    monkeypatch.setattr(pynvml, "nvmlLib", fake.library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    yield fake
    assert fake.get("open") == 0
