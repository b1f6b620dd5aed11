"""What is left running keeps its size: memory, open files, threads, and all that is remembered between calls."""

import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
import train.run
from attacks.apgd import apgd
from attacks.pgd import pgd
from attacks.saliency import grad_cam, last_convolution, saliency, smooth_grad
from attacks.square import square
from bench.measure import sampling
from kernels import conv2d, max_pool2d, tiles
from kernels.geometry import ConvGeometry
from kernels.runtime import INTERPRETER, Target
from train.loop import Trainer

ROOT = Path(__file__).resolve().parent.parent
OURS = ("kernels", "models", "train", "attacks", "bench")
INTERPRETED = Target(INTERPRETER, 1)

# Fixed, or glibc raises both by what it sees freed, and keeps up to 32 MiB to itself according to the order of frees.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

MOST_GROWTH = 1536
"""Bytes a call, from the middle of the second quarter of the calls to that of the last.

The rows of steps.csv, which stay in memory, are some 400 a step. A leak of one page a call is 4,096.
"""

SLACK = 2**18
"""Bytes that few calls may differ by all the same: the allocator takes more at once than a call needs."""


class Usage:
    """What this process takes, noted after each call; as JSON on stdout in the end."""

    def __init__(self, leak: int = 0):
        self.leak, self.leaked = leak, []
        self.resident, self.files, self.threads = [], [], []

    def note(self) -> None:
        self.leaked.append(b"\1" * self.leak)  # of none, the same object each time
        self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(len(os.listdir("/proc/self/task")))

    def tell(self) -> None:
        json.dump({name: getattr(self, name) for name in ("resident", "files", "threads")}, sys.stdout)


def in_a_process(call: str, folder: Path) -> dict[str, list[int]]:
    """What `call`, of a function in this file, tells of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_long_runs\ntest_long_runs.{call}"], cwd=folder, check=False, timeout=800,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def growth(values: list[int]) -> float:
    """Between the medians of the second and of the last quarter."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def assert_flat(told: dict[str, list[int]]) -> None:
    grown, calls = growth(told["resident"]), len(told["resident"]) / 2
    assert grown < max(MOST_GROWTH * calls, SLACK), f"{grown} bytes more after {calls:.0f} calls"
    for name in ("files", "threads"):
        quarter = len(told[name]) // 4
        assert max(told[name][-quarter:]) <= max(told[name][quarter : 2 * quarter]), name


def training(conv: str, steps: int, leak: int) -> None:
    """The command's own training, one image a step, in ten epochs, each with its validation and its checkpoint."""
    usage, step = Usage(leak), Trainer.train_step
    sampling.CURVE_POINTS = 100  # or the memory's curve grows until it is thinned, for the first 100 seconds

    def noted(*arguments: object) -> None:
        step(*arguments)
        usage.note()

    Trainer.train_step = noted
    train.run.main([
        "simplenet", "--conv", conv, "--device", "cpu", "--batch-size", "1", "--epochs", "10",
        "--limit-train", str(steps // 10), "--limit-val", "10", "--lr", "1e-5", "--out", f"run-{conv}-{leak}",
    ])  # fmt: skip
    sys.stdout.write("\n")
    usage.tell()


def attacking(calls: int, leak: int) -> None:
    """Calls of each attack and explanation in turn."""
    usage, model = Usage(leak), models.build("simplenet", "torch", 10, 32).eval()
    x, y = torch.rand(1, 3, 32, 32), torch.tensor([3])
    for _ in range(calls):
        pgd(model, x, "untargeted", y, num_steps=2, random_start=True)
        apgd(model, x, y, num_steps=2)
        square(model, x, y, num_queries=3)
        saliency(model, x)
        smooth_grad(model, x, samples=2)
        grad_cam(model, x, last_convolution(model))
        usage.note()
    usage.tell()


def convolving(calls: int, leak: int) -> None:
    """Forward and both gradients through the kernels, no shape twice."""
    usage = Usage(leak)
    for width in range(5, 5 + tiles.candidates.cache_info().maxsize):  # until its cache is full
        tiles.candidates("forward", INTERPRETED, ConvGeometry.of((1, 1, 5, width), (1, 1, 3, 3)), torch.half, "ieee")
    for call in range(calls):
        convolve(*new_shape(call))
        usage.note()
    usage.tell()


def new_shape(call: int) -> tuple[int, int, int]:
    """Height, width, channels: others for each call below 900."""
    return 4 + call % 30, 4 + call // 30, 1 + call % 5


def convolve(height: int, width: int, channels: int) -> None:
    x = torch.ones(1, channels, height, width, requires_grad=True)
    w, b = torch.ones(4, channels, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    max_pool2d(conv2d(x, w, b, padding=1, relu=True), 2, relu=True).sum().backward()


RUNS = [
    pytest.param("training('torch', 2000, {})", 2000, id="training"),
    pytest.param("training('triton', 100, {})", 100, id="training-interpreted"),
    pytest.param("attacking(200, {})", 200, id="attacks"),
    pytest.param("convolving(500, {})", 500, id="shapes"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("call", "count"), RUNS)
def test_memory_files_and_threads_stay_what_they_were(call, count, tmp_path):
    told = in_a_process(call.format(0), tmp_path)
    assert len(told["resident"]) == count
    assert_flat(told)


@pytest.mark.soak
@pytest.mark.parametrize(("call", "count"), RUNS[::2])
def test_a_leak_of_one_page_a_call_would_be_seen(call, count, tmp_path):
    told = in_a_process(call.format(4096), tmp_path)
    with pytest.raises(AssertionError, match="bytes more after"):
        assert_flat(told)


def remembered() -> dict[str, int]:
    """How much each thing holds that lives as long as the process: caches without a bound, and modules' collections."""
    found = {}
    for cache in gc.get_objects():
        # Not isinstance, which asks proxies for what they stand for.
        is_ours = type(cache) is functools._lru_cache_wrapper and (cache.__module__ or "").startswith(OURS)
        if is_ours and cache.cache_info().maxsize is None:
            found[f"{cache.__module__}.{cache.__qualname__}()"] = cache.cache_info().currsize
    for name, module in list(sys.modules.items()):
        if name.startswith((*OURS, "triton.runtime")):
            for key, value in vars(module).items():
                if isinstance(value, (dict, list, set)) and not key.startswith("__"):
                    found[f"{name}.{key}"] = len(value)
                if isinstance(value, type):
                    members = vars(value).items()
                    found |= {f"{name}.{key}.{k}": len(v) for k, v in members if isinstance(v, (dict, list, set))}
    return found


def test_nothing_is_remembered_for_each_shape():
    """But by caches with a bound; and no call leaves a file or a thread open."""
    shapes = map(new_shape, itertools.count(100))

    def call() -> None:
        convolve(*next(shapes))

    call()
    assert_nothing_stays(call, 12)


def test_nothing_is_remembered_for_each_model_that_is_fused_trained_or_attacked():
    x, y = torch.rand(1, 3, 16, 16), torch.tensor([3])

    def call() -> None:
        model = models.build("simplenet", "torch", 10, 16).eval()
        pgd(model, x, "untargeted", y, num_steps=1)
        apgd(model, x, y, num_steps=1)
        square(model, x, y, num_queries=2)
        smooth_grad(model, x, samples=1)
        models.build("customnet", "triton", 10, 32, fuse=True)

    call()
    assert_nothing_stays(call, 2)


def assert_nothing_stays(call: Callable[[], None], count: int) -> None:
    usage = Usage()
    usage.note()
    before = remembered()
    for _ in range(count):
        call()
    usage.note()
    assert {name: size for name, size in remembered().items() if size > before.get(name, 0)} == {}
    assert usage.files[1] == usage.files[0]
    assert usage.threads[1] == usage.threads[0]
