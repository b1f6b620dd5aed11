"""The benchmark's rows and fixtures, and the table of ratios at its end.

On a GPU times are CUDA events', with a cold L2 cache; on the CPU they are the host clock's, PyTorch has one thread,
and Triton's kernels run in its interpreter: such rows are labelled, and say nothing about a GPU.
"""

import io
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping

import pytest
import torch
from rich.console import Console

import models
from bench.conditions import conditions
from bench.measure.timer import EventTime, Flush
from bench.rows import MODEL, PRECISION, SIZES, Row, ratio_table
from bench.shapes import Layer, timed_layers
from train.report import backend_of, device_name

# Seconds and rounds that a row's repetitions may take; a slow row still gets the least number of rounds.
BUDGET, LEAST_ROUNDS, MOST_ROUNDS = 0.5, 5, 200

ROWS = pytest.StashKey[list[Row]]()
FEEDING = pytest.StashKey[dict[str, float]]()
PAIRED = pytest.StashKey[dict[str, dict[str, tuple]]]()
PAIRED_ROUNDS = 7


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where bench/ runs (default: auto, the GPU if there is one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[FEEDING], config.stash[PAIRED] = {}, {}
    if device_of(config).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: PyTorch sees no GPU here")
    # pytest-benchmark's own tables in 80 columns, unless other columns or names were asked for.
    if not config.getoption("benchmark_columns", None):
        config.option.benchmark_columns = ["median", "rounds"]
    if config.getoption("benchmark_name", None) == "normal":  # the default
        config.option.benchmark_name = "short"


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--bench-device", "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    if "conv" in metafunc.fixturenames:
        convolutions = list(models.CONVOLUTIONS)
        labels = [f"{conv}-{backend_of(conv, device)}" for conv in convolutions]
        metafunc.parametrize("conv", convolutions, ids=labels)
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", timed_layers(MODEL, *SIZES[device.type]), ids=lambda layer: layer.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = EventTime if device_of(config).type == "cuda" else time.perf_counter
    for item in items:
        if "timed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=timer, group=operation_of(item)))


def operation_of(item: pytest.Item) -> str:
    """ "forward" for test_forward."""
    return item.originalname.removeprefix("test_")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture(scope="session", autouse=True)
def _settings(device: torch.device):
    torch.backends.fp32_precision = PRECISION
    if device.type == "cpu":
        torch.set_num_threads(1)  # the interpreter's Python has one, and two on shared cores make native times jump


@pytest.fixture(scope="session")
def size(device: torch.device) -> tuple[int, int]:
    """(images, pixels) a step"""
    return SIZES[device.type]


@pytest.fixture(scope="session")
def where(device: torch.device) -> dict:
    return conditions(device)


@pytest.fixture(scope="session")
def before_each(device: torch.device) -> Callable[[], None] | None:
    """What makes each timed call start from the same state."""
    return Flush(device) if device.type == "cuda" else None


@pytest.fixture
def feeding(request: pytest.FixtureRequest) -> dict[str, float]:
    """What bench/test_feeding.py found: images/s by path, and the share of a step that waits for data in percent."""
    return request.config.stash[FEEDING]


@pytest.fixture
def side_by_side(benchmark, request, device, where) -> Callable[..., None]:
    """side_by_side(section, what, {"ours": call, ...}, ...) times the calls in turn; the first is what is measured.

    Ratios are medians over the rounds, told under `section` at the end.
    """

    def run(section: str, what: str, calls: Mapping[str, Callable[[], object]], **facts: object) -> None:
        names = list(calls)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(PAIRED_ROUNDS + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = time.perf_counter()
                calls[name]()
                synchronise(device)
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[names[0]], times[name], strict=True))
            for name in names[1:]
        }
        seconds = {name: statistics.median(values) for name, values in times.items()}
        request.config.stash[PAIRED].setdefault(section, {})[what] = (names[0], seconds, ratios, facts)
        benchmark.group = section
        benchmark.extra_info.update(where, dtype="float32", n=PAIRED_ROUNDS, seconds=seconds, ratios=ratios, **facts)
        benchmark.pedantic(calls[names[0]], rounds=1)

    return run


@pytest.fixture
def timed(benchmark, request, device, size, where, before_each) -> Callable[..., None]:
    """timed(call, conv=..., layer=..., error=...) times `call` and keeps the row with its conditions."""

    def run(call: Callable[[], object], *, conv: str, layer: Layer | None, error: float) -> None:
        backend = backend_of(conv, device)
        images, pixels = size
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, math.ceil(BUDGET / wall_seconds(call, device))))
        benchmark.extra_info.update(
            where,
            model=MODEL,
            conv=conv,
            backend=backend,
            dtype="float32",
            precision=PRECISION,
            layout=str(models.memory_format(conv)).removeprefix("torch."),
            batch_size=images,
            image_size=pixels,
            x_shape=layer.x_shape if layer else (images, 3, pixels, pixels),
            w_shape=layer.w_shape if layer else None,
            stride=layer.stride if layer else None,
            padding=layer.padding if layer else None,
            dilation=layer.dilation if layer else None,
            groups=layer.groups if layer else None,
            relative_error=error,
            n=rounds,
        )
        benchmark.pedantic(call, setup=before_each, rounds=rounds, warmup_rounds=1)
        if benchmark.enabled:
            request.config.stash[ROWS].append(
                Row(
                    operation=operation_of(request.node),
                    layer=layer.name if layer else MODEL,
                    conv=conv,
                    backend=backend,
                    seconds=benchmark.stats.stats.median,
                )
            )

    return run


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Roughly what a call takes, after one that compiles and warms up."""
    call()
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables: what is read first is what stands last
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tell_feeding(terminalreporter, config.stash[FEEDING])
    for section, paired in config.stash[PAIRED].items():
        tell_paired(terminalreporter, section, paired, device_of(config))
    rows = config.stash[ROWS]
    if not rows:
        return
    device = device_of(config)
    images, pixels = SIZES[device.type]
    backends = ", ".join(dict.fromkeys(f"{row.conv} {row.backend}" for row in rows))
    text = io.StringIO()
    width = shutil.get_terminal_size().columns
    console = Console(file=text, force_terminal=terminalreporter.hasmarkup, width=width, highlight=False)
    console.print(ratio_table(rows))
    name, threads = device_name(device), torch.get_num_threads()
    console.print(
        f"medians; {name}, PyTorch threads {threads}, batch {images}, {pixels} px, float32 ({PRECISION}); {backends}"
    )
    if any(row.backend == "interpreter" for row in rows):
        console.print("triton: interpreted on a CPU: says nothing about a GPU", style="bold")
    terminalreporter.write_sep("=", "ratios of the same run")
    terminalreporter.write(text.getvalue())


def tell_feeding(terminalreporter: pytest.TerminalReporter, feeding: dict[str, float]) -> None:
    """Images/s and their ratio, where the rows of bench/test_feeding.py ran."""
    if not feeding:
        return
    terminalreporter.write_sep("=", "feeding, one CPU thread, the write-up's augmentation at 128 px")
    for name in ("cached", "per_image", "per_image_decoded"):
        if name in feeding:
            ratio = f"   cached / this: {feeding['cached'] / feeding[name]:.2f}" if "cached" in feeding else ""
            terminalreporter.write_line(f"{name:18} {feeding[name]:8,.0f} images/s{ratio}")
    if "data_wait_pct" in feeding:
        share = feeding["data_wait_pct"]
        terminalreporter.write_line(f"wait for data: {share:.1f}% of SimpleNet's steps (native, batch 64, 2 threads)")


def tell_paired(
    terminalreporter: pytest.TerminalReporter, section: str, rows: dict[str, tuple], device: torch.device
) -> None:
    """Milliseconds and ratios of what `side_by_side` timed."""
    terminalreporter.write_sep("=", f"{section}, {device_name(device)}")
    for what, (first, seconds, ratios, facts) in rows.items():
        backend = backend_of(facts["conv"], device)
        shape = "x".join(map(str, facts["x_shape"]))
        terminalreporter.write_line(f"{what}, {shape} ({backend})")
        for name, value in seconds.items():
            ratio = f"   {first} / this: {ratios[name]:.3f}" if name in ratios else ""
            terminalreporter.write_line(f"  {name:12} {1e3 * value:10,.1f} ms{ratio}")
