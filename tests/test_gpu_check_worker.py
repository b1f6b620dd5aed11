"""What gpu-check tunes, times and compiles ahead, by fake clocks on the CPU."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch.backends import flags_frozen

from bench.gpu_check import ahead, operations, parts, worker
from bench.gpu_check.calibrate import calibrate
from bench.gpu_check.operations import OPS, Case, Operands
from bench.report_card import calibration
from bench.rows import relative_error
from bench.shapes import Layer
from kernels import runtime, tiles, tuning
from kernels.tiles import Tile

LAYER = Layer(
    name="conv3x3-24", x_shape=(2, 20, 9, 7), w_shape=(24, 20, 3, 3), stride=(2, 1), padding=(1, 1), dilation=(1, 1),
    groups=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _flags_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own test material, where the same process has imported it, forbids to set cuDNN's flags."""
    monkeypatch.setitem(flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)


def case(op: str = "forward", dtype: torch.dtype = torch.float32, precision: str = "ieee") -> Case:
    return Case(layer=LAYER, op=op, dtype=dtype, precision=precision)


@pytest.mark.parametrize("op", OPS)
def test_both_convolutions_compute_the_same_operation(op):
    operands = Operands.of(case(op), "cpu")
    ours, native = operations.ours(case(op), operands), operations.native(case(op), operands.double())
    assert ours.shape == native.shape
    assert relative_error(ours, native) < worker.RELATIVE["float32"]


def test_tf32_and_the_search_for_algorithms_are_switched_and_put_back():
    conv, cudnn = torch.backends.cudnn.conv, torch.backends.cudnn
    before = conv.fp32_precision, cudnn.benchmark
    with operations.precision_of(case(precision="tf32"), benchmark=True):
        assert (conv.fp32_precision, cudnn.benchmark) == ("tf32", True)
    assert (conv.fp32_precision, cudnn.benchmark) == before


def test_cases_are_the_models_and_quick_ones_a_part_of_them():
    every, quick = (operations.cases("sm_90", quick=quick) for quick in (False, True))
    assert len(every) == 7 * 3 * 4
    assert set(quick) < set(every)
    assert "tf32" not in {case.precision for case in operations.cases("sm_75", quick=True)}


def test_the_tile_asked_for_is_compiled_ahead(monkeypatch):
    compiled = []
    launch = runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *a, **k: compiled.append((a[1].name, k)) or launch(*a, **k))
    candidates = tiles.candidates
    ahead.compile_one(case("input_grad", torch.float16), Tile(M=32, N=32, K=16, num_warps=2, num_stages=2), "sm_90")
    (arch, constants), *_ = compiled
    assert arch == "sm_90"
    assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["num_warps"]) == (32, 32, 2)
    assert tiles.candidates is candidates


@pytest.mark.slow
def test_processes_compile_ahead_and_tell_what_they_could_not(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    good = (case("forward", torch.float16), Tile(M=32, N=32, K=16))
    bad = (case("forward", torch.float16), Tile(M=24, N=32, K=16))
    found = ahead.compile_all([good, good, bad], "sm_90")
    assert (found["compiled"], found["of"], found["processes"]) == (2, 3, 3)
    assert found["error"]


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the host's clock instead of CUDA's events."""
    monkeypatch.setattr(worker, "EventTime", time.perf_counter)
    monkeypatch.setattr(worker, "Flush", lambda device: lambda: None)
    monkeypatch.setattr(worker, "cases", lambda arch, quick: [case(op) for op in OPS])
    monkeypatch.setattr(worker, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a fake GPU")


def test_rows_of_times_hold_what_a_calibration_asks_for(clock):
    rows = []
    assert worker.time_all(rows.append, torch.device("cpu"), quick=True, compiled=True) is None
    assert [row["op"] for row in rows] == list(OPS)
    for row in rows:
        assert {"arch", "gpu", "op", "dtype", "precision", "x_shape", "w_shape", "stride", "padding", "dilation",
                "groups", "seconds", "native_seconds", "n", "tile"} <= set(row)  # fmt: skip
        assert row["ratio"] == pytest.approx(row["seconds"] / row["native_seconds"])
    json.dumps(rows)


def test_a_wrong_result_is_not_timed_and_the_other_rows_are(clock, monkeypatch):
    right = worker.ours
    monkeypatch.setattr(worker, "ours", lambda c, o: right(c, o) * (1.01 if c.op == "input_grad" else 1))
    rows = []
    wrong = worker.time_all(rows.append, torch.device("cpu"), quick=True, compiled=True)
    assert "1 rows failed" in wrong
    assert ["seconds" in row for row in rows] == [True, False, True]
    assert "its time means nothing" in rows[1]["error"]


def test_a_calibration_is_made_of_what_was_timed(clock, tmp_path):
    rows = []
    worker.time_all(rows.append, torch.device("cpu"), quick=True, compiled=True)
    lines = [{"ahead": {}}, *(row | {"arch": "sm_80"} for row in rows), {"op": "forward", "error": "not timed"}]
    assert parts.nothing_to_calibrate(tmp_path, False) == "nothing was timed"
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert parts.nothing_to_calibrate(tmp_path, False) is None
    assert "--quick" in parts.nothing_to_calibrate(tmp_path, True)
    calibrate(tmp_path)
    factors = parts.read_calibration(tmp_path)
    assert {op: found["fp32"]["n"] for op, found in factors.items()} == dict.fromkeys(OPS, 1)
    assert calibration.read(tmp_path / parts.CALIBRATION).gpu == "a fake GPU"


@pytest.fixture
def tuned(clock, monkeypatch):
    """Candidates by a fake GPU's clock: three tiles, the second of which is twice as fast as the first."""
    monkeypatch.setattr(worker, "compile_all", lambda jobs, arch: {"compiled": len(jobs)})
    tried = tuple(Tile(M=M, N=64, K=32) for M in (128, 64, 32))
    monkeypatch.setattr(tiles, "candidates", lambda *_: tried)
    made = []
    key = SimpleNamespace()

    def launch(case, operands):
        trials = [tuning.Trial(tile=tile, seconds=s) for tile, s in zip(tried[:2], (2e-3, 1e-3), strict=True)]
        trials.append(tuning.Trial(tile=tried[2], seconds=None, error=made_error[0]))
        made.append(tuning.Choice(key=key, tile=tried[1], origin="timed", trials=tuple(trials)))

    made_error = [None]
    monkeypatch.setattr(worker, "ours", launch)
    monkeypatch.setattr(tuning, "record", lambda: tuple(made))
    return made_error


def test_tuning_tells_how_far_the_first_choice_is_from_the_best(tuned):
    rows = []
    tuned[0] = "OutOfResources: shared memory"
    wrong = worker.tune(rows.append, torch.device("cpu"), quick=True)
    assert wrong.startswith("3 wrong, the first: conv3x3-24 forward: Tile(M=32")
    assert rows[0] == {"ahead": {"compiled": 9}}
    assert [row["first_over_best"] for row in rows[1:]] == [2.0] * 3
    json.dumps(rows)


def test_a_launcher_that_does_not_tune_is_told(tuned, monkeypatch):
    monkeypatch.setattr(worker, "ours", lambda case, operands: None)
    wrong = worker.tune(lambda row: None, torch.device("cpu"), quick=True)
    assert wrong == "the launcher of forward did not tune, though there are 3 candidates"
