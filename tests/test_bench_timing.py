"""How the benchmark times, what a GPU's rows say besides, and its tables; GPUs are faked."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_case import CPU, SMALL, case, rows_of, shown

from bench import timing_ahead, timing_gpu, timing_rounds
from bench.gpu_check.chains import Chain
from bench.measure import timer
from bench.measure.gpus import GPUS
from bench.measure.nvml import NvmlUnavailable
from bench.rows import TOLERANCE, Row
from bench.shapes import Layer
from bench.timing_cases import KINDS, OPERATIONS, fused_cases, operation_cases, step_cases
from bench.timing_gpu import memory_of, speeds, work_of
from bench.timing_rounds import Turns, copies_of
from bench.timing_tables import Paired, conditions_lines, feeding_table, heading, paired_table, print_rows

# --- timing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 3), (2**30 // 3, 3), (2**29, 2), (2**30 - 1, 1), (2**34, 1)])
def test_copies_stay_under_a_gibibyte(nbytes, copies):
    assert copies_of(nbytes) == copies


def test_rounds_fit_the_budget_within_their_limits(monkeypatch):
    for seconds, rounds in ((0.03, 4), (1.0, 3), (1e-6, 100)):
        now = iter([10.0, 10.0 + seconds])
        monkeypatch.setattr(timing_rounds.time, "perf_counter", lambda now=now: next(now))
        assert timing_rounds.rounds_of(lambda: None, CPU) == rounds


def test_in_each_round_another_begins(monkeypatch):
    order, seconds = [], iter(range(1000))
    monkeypatch.setattr(timing_rounds, "clock", lambda device: lambda: next(seconds))
    turns = Turns({name: lambda name=name: order.append(name) for name in "abc"}, CPU)
    for _ in range(4):
        turns.round()
    assert "".join(order) == "abc" "bca" "cab" "abc"
    assert turns.times == {"a": [1] * 4, "b": [1] * 4, "c": [1] * 4}


def test_precision_is_switched_for_both_and_put_back():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    with timing_rounds.multiplying(KINDS["tf32"]):
        assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
    assert (conv.fp32_precision, matmul.fp32_precision) == before


def test_event_times_subtract_to_seconds(monkeypatch):
    clock = iter([1000.0, 1250.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.synchronized = False

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            self.synchronized = True

        def elapsed_time(self, end):
            assert end.synchronized
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    start, end = timer.EventTime(), timer.EventTime()
    assert end - start == pytest.approx(0.25)


# --- what a GPU's rows say besides --------------------------------------------------------------------------------


def test_speeds_are_of_useful_work_and_compulsory_bytes():
    layer = Layer(
        name="conv1x1-64", x_shape=(256, 64, 32, 32), w_shape=(64, 64, 1, 1), stride=(1, 1), padding=(0, 0),
        dilation=(1, 1), groups=1,
    )  # fmt: skip
    row = case(kind="float16", subject=layer)
    products, nbytes = 256 * 32 * 32 * 64 * 64, 2 * (2 * 256 * 64 * 32 * 32 + 64 * 64 + 64)
    found = speeds(work_of(row), 1e-3, row, "sm_90")
    assert found["tflops"] == pytest.approx(2 * products / 1e-3 / 1e12)
    assert found["gb_per_s"] == pytest.approx(nbytes / 1e-3 / 1e9)
    assert found["roofline_share"] == pytest.approx(nbytes / GPUS["sm_90"].bandwidth / 1e-3)
    assert (found["roofline"], found["roofline_by"]) == ("H100 SXM", "DRAM")
    step = work_of(replace(row, group="step"))
    assert step.multiply_adds == 3 * products
    # Input and weight gradient read the output's gradient, and have no bias.
    assert step.nbytes == 3 * nbytes - 2 * 2 * 64


def test_a_gpu_without_a_data_sheet_has_no_roofline():
    found = speeds(work_of(case()), 1e-3, case(), "sm_87")
    assert "roofline_share" not in found
    assert found["roofline"] == "not available: no data sheet of sm_87 is known here"


X, W, BIAS, Y = 2 * 4 * 8 * 8, 8 * 4, 8, 2 * 8 * 8 * 8


@pytest.mark.parametrize(
    ("name", "multiply_adds", "elements"),
    [
        ("conv_relu", Y * 4, X + W + BIAS + Y),
        ("conv_relu_grad", 2 * Y * 4, (2 * Y + X + W) + (X + W + BIAS)),
        ("bias_grad", 0, Y + BIAS),
    ],
)
def test_a_chain_moves_each_operand_and_result_once(name, multiply_adds, elements):
    layer = replace(SMALL, x_shape=(2, 4, 8, 8), w_shape=(8, 4, 1, 1), stride=(1, 1), padding=(0, 0))
    chain = Chain(layer=layer, name=name, dtype=torch.float32, precision="ieee")
    work = work_of(case(group=name, subject=chain))
    assert (work.multiply_adds, work.nbytes) == (multiply_adds, 4 * elements)


def test_a_pool_keeps_a_byte_for_each_winner():
    chain = next(one.subject for one in fused_cases("relu_max_pool", "cpu") if one.kind == "float16")
    g = chain.geometry
    x, y = math.prod(g.x_shape), math.prod(g.y_shape)
    assert work_of(case(group=chain.name, subject=chain)).nbytes == 2 * x + 2 * y + y


def test_a_whole_step_has_no_work_of_its_own():
    assert all(work_of(one) is None for one in step_cases("train_step", "cuda"))


def test_memory_is_what_one_call_adds_and_what_the_driver_says(monkeypatch):
    calls = []
    fakes = {"synchronize": None, "memory_allocated": 100, "reset_peak_memory_stats": None,
             "max_memory_allocated": 164, "get_device_properties": SimpleNamespace(uuid="a")}  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value, name=name: calls.append(name) or value)
    told = SimpleNamespace(process=7, used=9)
    monkeypatch.setattr(timing_gpu, "gpu_memory", lambda uuid: told)
    found = memory_of(lambda: calls.append("call"), CPU)
    assert found == {"peak_bytes": 64, "nvml_process_bytes": 7, "nvml_used_bytes": 9}
    assert calls.index("reset_peak_memory_stats") < calls.index("call") < calls.index("max_memory_allocated")

    def absent(uuid):
        raise NvmlUnavailable("no driver")

    monkeypatch.setattr(timing_gpu, "gpu_memory", absent)
    assert memory_of(lambda: None, CPU) == {"peak_bytes": 64, "nvml": "not available: no driver"}


def test_the_host_is_timed_while_it_queues_and_not_while_it_waits(monkeypatch):
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(timing_gpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: passes(100.0))
    queueing = iter([3.0, 1.0, 2.0, 9.0, 1.0])
    assert timing_gpu.host_of(lambda: passes(next(queueing)), CPU) == {"host_seconds": 2.0}


def test_a_fast_gpu_is_kept_writing_while_the_host_runs_ahead(monkeypatch):
    now = iter([0.0, 0.4e-3])  # of one write

    class Time:
        def __init__(self):
            self.at = next(now)

        def __sub__(self, start):
            return self.at - start.at

    writes = []
    monkeypatch.setattr(timer, "EventTime", Time)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(zero_=lambda: writes.append(1)))
    flush = timer.Flush(CPU, ahead=5e-3)
    writes.clear()
    flush()
    assert len(writes) == 13
    assert timer.Flush(CPU).writes == 1


def test_only_ours_are_held_to_the_tolerance():
    allowed = {name: case(contender=name, kind="float16").tolerance for name in
               ("triton", "triton-unfused", "unfold", "torch", "torch-channels-last", "inductor")}  # fmt: skip
    ours = TOLERANCE["float16"]
    assert allowed == {"triton": ours, "triton-unfused": ours, "unfold": ours, "torch": 10 * ours,
                       "torch-channels-last": 10 * ours, "inductor": 10 * ours}  # fmt: skip


def test_kernels_are_compiled_ahead_once_for_the_rows_asked_for():
    operations = [one for name in OPERATIONS for one in operation_cases(name, "cuda")]
    layers = {(one.subject, one.kind) for one in operations if one.contender == "triton"}
    assert len(timing_ahead.jobs(operations)) == len(layers)
    native = [one for one in operations if one.contender == "torch"]
    assert timing_ahead.jobs(native) == []
    steps = [one for one in step_cases("train_step", "cuda") if one.model == "resnet18"]
    assert {job.keywords["bias"] for job in timing_ahead.jobs(steps)} == {False}
    chains = fused_cases("conv_relu", "cuda")
    assert len(timing_ahead.jobs(chains)) == len({one.subject for one in chains})


# --- tables -------------------------------------------------------------------------------------------------------


def test_ratios_of_the_table():
    rows = [
        Row(group="forward", what="simplenet conv3x3-64", kind="float32", contender=conv, backend="native", seconds=s)
        for conv, s in (("torch", 0.004), ("unfold", 0.008), ("triton", 0.002))
    ] + [Row(group="train_step", what="resnet18", kind="float32", contender="triton", backend="native", seconds=1.5)]
    text = shown(lambda console: print_rows(console, rows, on_gpu=False))
    forward, step = (line.split() for line in text.splitlines() if "conv3x3" in line or "resnet18" in line)
    assert forward == ["simplenet", "conv3x3-64", "float32", "2.00", "0.50", "0.25"]
    assert step == ["resnet18", "float32", "1,500.00"]
    assert "target" not in text


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    "extra", [(), ("triton-unfused",), ("flag_gems", "inductor", "a_variant_of_a_student", "another", "one-more")]
)
def test_tables_are_whole_in_80_columns(extra, on_gpu):
    contenders = ("torch", "unfold", "triton", "torch-channels-last", *extra)
    rows = rows_of(*contenders, on_gpu=on_gpu)
    text = shown(lambda console: print_rows(console, rows, on_gpu=on_gpu))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [line for line in text.splitlines() if "conv7x7" in line]
    assert all("simplenet conv7x7-512-s2" in line and "bfloat16" in line for line in lines)
    words = " ".join(lines).split()
    for number, contender in enumerate(contenders):
        if contender != "triton":
            assert f"{(1 + number) / 3:.2f}" in words, contender
    assert ("<= 1.00" in text, "1,234" in text, "98" in words, "16,384" in text) == (on_gpu,) * 4


def test_without_triton_another_is_what_is_divided():
    text = shown(lambda console: print_rows(console, rows_of("unfold", "torch"), on_gpu=False))
    assert [line.split()[-2:] for line in text.splitlines() if "conv7x7" in line] == [["12,345.60", "2.00"]]


@pytest.mark.parametrize("name", ["triton / torch-channels-last", "triton / a_variant_of_a_student", "triton / x"])
def test_headings_hold_the_whole_name(name):
    assert heading(name).replace("\n", "").replace(" ", "") == name.replace(" ", "")
    assert max(map(len, heading(name).splitlines())) <= 9


def test_paired_rows_and_feeding_fit_80_columns():
    row = Paired(
        what="10 steps, triton (interpreter), 32x3x128x128, n = 7", seconds={"not sampled": 1234.5, "one by one": 0.01},
        ratios={"one by one": 1.234},
    )  # fmt: skip
    text = shown(lambda console: console.print(paired_table("attacks on SimpleNet", [row])))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "1.234" in text
    assert "1,234,500.0" in text
    feeding = shown(lambda console: console.print(feeding_table({"cached": 3000.0, "per_image": 300.0})))
    assert [line.split() for line in feeding.splitlines() if "per_image" in line] == [["per_image", "300", "10.00"]]


def test_conditions_tell_what_ran_what_did_not_and_what_it_is_worth():
    rows = rows_of("torch", "triton")
    rows[1] = replace(rows[1], backend="interpreter")
    lines = "\n".join(conditions_lines(rows, {"flag_gems is not installed": 3}, {}, "a CPU", 8, 32))
    for words in ("a CPU", "batch 8, 32 px", "triton interpreter", "skipped: 3 rows: flag_gems is not installed"):
        assert words in lines
    assert "says nothing about a GPU" in lines
    assert "roofline" not in lines
    ahead = {"compiled": 3, "of": 4, "error": "why"}
    on_gpu = "\n".join(conditions_lines(rows_of("triton", on_gpu=True), {}, ahead, "a GPU", 256, 128))
    for words in ("roofline: H100 SXM", "compiled before the first row: 3 of 4 (why)", "target:"):
        assert words in on_gpu
    assert "says nothing" not in on_gpu
