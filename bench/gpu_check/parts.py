"""The parts of gpu-check: what each runs, for how long at most, and how what it found is read.

Each is a process of its own, so that one that hangs, crashes or breaks the GPU's context takes no other with it.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TILE_TESTS = "tests/test_tiles_on_gpu.py"
# Left out of a quick run: each layer of torchvision's models, and each of 150 random examples, is kernels to compile.
QUICK = "not torchvision and not random"
MOST_WORKERS = 16
MOST_FAILURES, MOST_LINES = 20, 40

PASSED, FAILED, NOT_RUN, TIMED_OUT, INTERRUPTED = "passed", "failed", "not run", "timed out", "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part."""

    name: str
    title: str
    limit: float
    """Seconds it may take."""
    quick_limit: float
    """The same with --quick."""
    command: Callable[[Path, bool], list[str]]
    """(folder for its files, quick) -> what to run, in the root of the project."""
    read: Callable[[Path], Any]
    """(that folder) -> what it found, as far as it got, as plain types."""
    missing: Callable[[Path, bool], str | None] = lambda folder, quick: None
    """(the same) -> why it cannot run on this machine; None where it can."""


def run(part: Part, folder: Path, *, quick: bool, limit: float) -> dict[str, Any]:
    """Runs a part, `limit` seconds at most; its outcome as plain types, with "status" one of those above.

    KeyboardInterrupt ends the part and is raised on, with the outcome as its argument.
    """
    command = part.command(folder, quick)
    log = folder / f"{part.name}.log"
    outcome: dict[str, Any] = {"command": " ".join(command), "limit_s": round(limit, 1)}
    begun, interrupted = time.monotonic(), None
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            outcome["status"] = PASSED if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            outcome["status"] = TIMED_OUT
        except KeyboardInterrupt as stop:
            outcome["status"], interrupted = INTERRUPTED, stop
        finally:
            end(process)
    outcome |= {"exit_code": process.returncode, "seconds": round(time.monotonic() - begun, 1)}
    outcome["found"] = part.read(folder)
    if outcome["status"] != PASSED:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-MOST_LINES:]
        outcome["output"] = lines
        last = lines[-1][:300] if lines else "no output"
        outcome["reason"] = last if outcome["status"] == FAILED else f"after {outcome['seconds']} s: {last}"
    if interrupted is not None:
        raise KeyboardInterrupt(outcome) from interrupted
    return outcome


def environment() -> dict[str, str]:
    """Of a part: one thread, since there are many processes; and no tuning but where a part switches it on."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CONV_LAB_AUTOTUNE": "0", "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}


def end(process: subprocess.Popen) -> None:
    """Ends what is left of a part, its own processes included."""
    for signum, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


# --- tests --------------------------------------------------------------------------------------------------------


def test_files() -> list[str]:
    """The test files that make their tensors where --device says, without the tiles', which are a part of their own."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    names = [f"tests/{path.name}" for path in files if "pytestmark = pytest.mark.on_device" in path.read_text()]
    return [name for name in names if name != TILE_TESTS]


def pytest_command(name: str, files: list[str], folder: Path, *options: str) -> list[str]:
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    return [
        sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider", "--tb=short",
        "-o", "timeout=1800", "-p", "bench.gpu_check.recorder", "--lines", str(folder / f"{name}.jsonl"),
        *parallel, *options, *files,
    ]  # fmt: skip


def tests_command(folder: Path, quick: bool) -> list[str]:
    return pytest_command("tests", test_files(), folder, "-m", "not slow", *(["-k", QUICK] if quick else []))


def tiles_command(folder: Path, quick: bool) -> list[str]:
    return pytest_command("tiles", [TILE_TESTS], folder, *(["-m", "not slow"] if quick else []))


def read_tests(file: Path) -> dict[str, Any]:
    """Counts, failures by name and skips by reason out of what recorder.py wrote."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, skips = [], {}
    for row in read_rows(file):
        counts[row["outcome"]] += 1
        if row["outcome"] == "failed":
            failures.append({"test": row["test"], "why": row["why"]})
        elif row["outcome"] == "skipped":
            skips[row["why"]] = skips.get(row["why"], 0) + 1
    return counts | {"failures": failures[:MOST_FAILURES], "skips": skips}


# --- ours ---------------------------------------------------------------------------------------------------------


def worker_command(name: str, folder: Path, quick: bool) -> list[str]:
    return [
        sys.executable, "-m", "bench.gpu_check.worker", name, str(folder / f"{name}.jsonl"),
        *(["--quick"] if quick else []),
    ]  # fmt: skip


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Those that were written whole."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


CALIBRATION = "calibration.json"
SANITIZER_ERROR = 99


def sanitizer() -> str | None:
    """The path of compute-sanitizer, which is often in CUDA's folder and not in PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in homes if h)])
    )


def sanitizer_command(folder: Path, quick: bool) -> list[str]:
    # Errors of the API are not asked for: PyTorch provokes some on purpose, to learn what the device can do.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(SANITIZER_ERROR)]
    # Each tensor in memory of its own, or a block that reaches past one is still inside what PyTorch took.
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [*uncached, sanitizer() or "", *options, *worker_command("touch", folder, quick)]


def read_sanitizer(folder: Path) -> dict[str, Any]:
    log = (folder / "sanitizer.log").read_text(errors="replace").splitlines()
    summary = [line.strip("= ") for line in log if "ERROR SUMMARY" in line]
    return {"convolutions": len(read_rows(folder / "touch.jsonl")), "summary": summary[-1] if summary else None}


def no_sanitizer(folder: Path, quick: bool) -> str | None:
    return None if sanitizer() else "compute-sanitizer is not installed"


def read_calibration(folder: Path) -> dict[str, Any] | None:
    file = folder / CALIBRATION
    return json.loads(file.read_text())["factors"] if file.exists() else None


def nothing_to_calibrate(folder: Path, quick: bool) -> str | None:
    if quick:
        return "left out by --quick; bench.report_card.calibration.write makes it of the report's rows, on any machine"
    return None if any("op" in row for row in read_rows(folder / "timing.jsonl")) else "nothing was timed"


PARTS = (
    Part(
        name="tests", title="the convolution's tests on CUDA tensors", limit=2400, quick_limit=125,
        command=tests_command, read=lambda folder: read_tests(folder / "tests.jsonl"),
    ),
    Part(
        name="tiles", title="each tile by itself", limit=1200, quick_limit=60,
        command=tiles_command, read=lambda folder: read_tests(folder / "tiles.jsonl"),
    ),
    Part(
        name="tuning", title="autotuning of SimpleNet's layers", limit=1500, quick_limit=75,
        command=lambda folder, quick: worker_command("tuning", folder, quick),
        read=lambda folder: read_rows(folder / "tuning.jsonl"),
    ),
    Part(
        name="timing", title="times beside cuDNN's", limit=1800, quick_limit=200,
        command=lambda folder, quick: worker_command("timing", folder, quick),
        read=lambda folder: read_rows(folder / "timing.jsonl"),
    ),
    Part(
        name="memory", title="memory of training steps", limit=1200, quick_limit=90,
        command=lambda folder, quick: worker_command("memory", folder, quick),
        read=lambda folder: read_rows(folder / "memory.jsonl"),
    ),
    Part(
        name="sanitizer", title="compute-sanitizer memcheck", limit=900, quick_limit=60,
        command=sanitizer_command, read=read_sanitizer, missing=no_sanitizer,
    ),
    Part(
        name="calibration", title="calibration of the report card", limit=600, quick_limit=0,
        command=lambda folder, quick: [sys.executable, "-m", "bench.gpu_check.calibrate", str(folder)],
        read=read_calibration, missing=nothing_to_calibrate,
    ),
)  # fmt: skip
