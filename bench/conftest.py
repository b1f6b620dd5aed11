"""The benchmark's options, rows and fixtures; bench/timing_tables.py draws what stands at its end.

On a GPU times are CUDA events', with a cold L2 cache and operands that take turns; on the CPU they are the host
clock's, PyTorch has one thread, and Triton's kernels run in its interpreter: such rows are labelled, and say nothing
about a GPU.
"""

import io
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Mapping

import pytest
import torch
from pytest_benchmark.session import PerformanceRegression
from rich.console import Console

import models
from bench.conditions import conditions
from bench.measure.timer import Flush
from bench.rows import PRECISION, SIZES, Row
from bench.timing_ahead import compile_ahead
from bench.timing_cases import Case, backend, fused_cases, operation_cases, step_cases, why_not
from bench.timing_gpu import host_of, memory_of, speeds, work_of
from bench.timing_rounds import Call, Turns, clock, one, rotating, rounds_of
from bench.timing_tables import Paired, conditions_lines, feeding_table, paired_table, print_rows
from train.report import backend_of, device_name

ROWS = pytest.StashKey[list[Row]]()
FEEDING = pytest.StashKey[dict[str, float]]()
PAIRED = pytest.StashKey[dict[str, list[Paired]]]()
AHEAD = pytest.StashKey[dict[str, int | str]]()
AHEAD_SECONDS = 5e-3
"""What the GPU is kept busy for while the host queues a row's call, which took it up to 2 ms through autograd."""
# What only pytest-benchmark's own tables show; without any of these they are left out.
THEIR_OPTIONS = ("benchmark_columns", "benchmark_compare", "benchmark_histogram", "benchmark_cprofile")
CASES = {"operation_case": operation_cases, "fused_case": fused_cases, "step_case": step_cases}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where bench/ runs (default: auto, the GPU if there is one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[FEEDING], config.stash[PAIRED], config.stash[AHEAD] = [], {}, {}, {}
    if device_of(config).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: PyTorch sees no GPU here")
    # Their tables of raw times give way to ratios, and fit 80 columns unless other columns or names were asked for.
    config.option.benchmark_quiet |= not any(config.getoption(option) for option in THEIR_OPTIONS)
    if not config.getoption("benchmark_columns"):
        config.option.benchmark_columns = ["median", "rounds"]
    if config.getoption("benchmark_name") == "normal":  # the default
        config.option.benchmark_name = "short"


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--bench-device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    if "conv" in metafunc.fixturenames:
        convolutions = list(models.CONVOLUTIONS)
        metafunc.parametrize("conv", convolutions, ids=[f"{conv}-{backend_of(conv, device)}" for conv in convolutions])
    for name, cases_of in CASES.items():
        if name in metafunc.fixturenames:
            group = metafunc.function.__name__.removeprefix("test_")
            metafunc.parametrize(name, cases_of(group, device.type), ids=lambda case: case.label(device))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        case = case_of(item)
        if case is not None:
            item.add_marker(pytest.mark.benchmark(timer=clock(device_of(config)), group=case.group))
        elif "side_by_side" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=clock(device_of(config))))


def case_of(item: pytest.Item) -> Case | None:
    """The row's case; None of what is timed side by side, and of feeding."""
    name = next((name for name in CASES if name in item.fixturenames), None)
    return item.callspec.params[name] if name else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A row that this GPU has no memory for is left out, not the run."""
    case = case_of(item)
    reason = why_not(case, device_of(item.config)) if case is not None else None
    if reason is not None:
        pytest.skip(reason)
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pytest.skip(f"out of GPU memory: {item.name.partition('[')[2].rstrip(']')}")
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # so that NVML's figure is the row's own


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture(scope="session", autouse=True)
def _settings(request: pytest.FixtureRequest, device: torch.device) -> None:
    torch.backends.fp32_precision = PRECISION
    if device.type == "cpu":
        torch.set_num_threads(1)  # the interpreter's Python has one, and two on shared cores make native times jump
        return
    cases = filter(None, map(case_of, request.session.items))
    request.config.stash[AHEAD] = compile_ahead((case for case in cases if not why_not(case, device)), device)


@pytest.fixture(scope="session")
def where(device: torch.device) -> dict:
    return conditions(device)


@pytest.fixture(scope="session")
def before_each(device: torch.device) -> Callable[[], None] | None:
    """What makes each timed call start from the same state."""
    return Flush(device, ahead=AHEAD_SECONDS) if device.type == "cuda" else None


@pytest.fixture
def feeding(request: pytest.FixtureRequest) -> dict[str, float]:
    """What bench/test_feeding.py found: images/s by path, and the share of a step that waits for data in percent."""
    return request.config.stash[FEEDING]


@pytest.fixture
def timed(benchmark, request, device, where, before_each) -> Callable[..., None]:
    """timed(calls, case, error=...) times the calls, which take turns, and keeps the row with its conditions.

    All calls do the same, each with operands of its own.
    """

    def run(calls: list[Call], case: Case, *, error: float) -> None:
        rounds = rounds_of(calls[0], device)
        on_gpu, is_step = device.type == "cuda", case.layer is None
        figures = memory_of(calls[0], device) | host_of(calls[0], device) if on_gpu else {}
        benchmark.extra_info.update(
            where, **case.facts(device), relative_error=error, n=rounds, copies=len(calls), **figures
        )
        # A whole step is timed as its user waits for it: with what its launches cost the host.
        benchmark.pedantic(one, setup=rotating(calls, None if is_step else before_each), rounds=rounds)
        if not benchmark.enabled:
            return
        seconds, work = benchmark.stats.stats.median, work_of(case)
        if on_gpu and work is not None:
            figures |= speeds(work, seconds, case, "sm_{}{}".format(*torch.cuda.get_device_capability(device)))
            benchmark.extra_info.update(figures)
        request.config.stash[ROWS].append(
            Row(
                group=case.group, what=case.what, kind=case.kind, contender=case.contender,
                backend=backend(case.contender, device), seconds=seconds, figures=figures, target=case.target,
            )
        )  # fmt: skip

    return run


@pytest.fixture
def side_by_side(benchmark, request, device, where) -> Callable[..., None]:
    """side_by_side(section, what, {"ours": call, ...}, ...) times the calls in turn; the first is what is measured.

    Ratios are medians over the rounds, told under `section` at the end.
    """

    def run(section: str, what: str, calls: Mapping[str, Call], *, conv: str, x_shape: tuple[int, ...]) -> None:
        turns = Turns(calls, device)
        rounds = turns.warm_up()
        benchmark.group = section
        benchmark.pedantic(calls[turns.first], setup=turns.round, rounds=rounds)
        if not benchmark.enabled:
            return
        seconds = {name: statistics.median(values) for name, values in turns.times.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(turns.times[turns.first], turns.times[name], strict=True))
            for name in turns.others
        }
        shape, by = "x".join(map(str, x_shape)), backend_of(conv, device)
        benchmark.extra_info.update(
            where, conv=conv, backend=by, dtype="float32", x_shape=x_shape, n=rounds, seconds=seconds,
            ratios=ratios,
        )  # fmt: skip
        row = Paired(what=f"{what}, {conv} ({by}), {shape}, n = {rounds}", seconds=seconds, ratios=ratios)
        request.config.stash[PAIRED].setdefault(section, []).append(row)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    """Below pytest-benchmark's: what is read first is what stands last, also where that ends in a regression."""
    try:
        return (yield)
    except PerformanceRegression as worse:  # which would be a traceback through pytest itself
        pytest.exit(str(worse), returncode=pytest.ExitCode.TESTS_FAILED)
    finally:
        text = summary(config, skipped(terminalreporter), colours=terminalreporter.hasmarkup)
        if text:
            terminalreporter.write_sep("=", "ratios of the same run")
            terminalreporter.write(text)


def skipped(terminalreporter: pytest.TerminalReporter) -> Counter[str]:
    """How many rows were skipped, by reason."""
    reports = terminalreporter.stats.get("skipped", [])
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def summary(config: pytest.Config, skips: Counter[str], *, colours: bool) -> str:
    """All tables of what ran, and its conditions; "" where nothing did."""
    rows, paired, feeding = config.stash[ROWS], config.stash[PAIRED], dict(config.stash[FEEDING])
    if not (rows or paired or feeding or skips):
        return ""
    device = device_of(config)
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=colours, width=shutil.get_terminal_size().columns, highlight=False, emoji=False
    )
    waiting, speed = feeding.pop("data_wait_pct", None), feeding.pop("steps", None)
    if feeding:
        console.print(feeding_table(feeding))
    if waiting is not None:
        console.print(f"waiting for data: {waiting:.1f}% of SimpleNet's steps, {speed:.0f} images/s, 2 threads\n")
    for section, found in paired.items():
        console.print(paired_table(section, found))
    print_rows(console, rows, on_gpu=device.type == "cuda")
    for line in conditions_lines(rows, skips, config.stash[AHEAD], device_name(device), *SIZES[device.type]):
        console.print(line)
    return text.getvalue()
