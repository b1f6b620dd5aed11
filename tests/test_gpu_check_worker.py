"""What gpu-check tunes, times and compiles ahead, by fake clocks on the CPU."""

import json
import os
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.backends import flags_frozen

from bench.gpu_check import ahead, chains, memory, operations, parts, steps, worker
from bench.gpu_check.calibrate import calibrate
from bench.gpu_check.chains import OF_CONVOLUTIONS, OF_POOLS, Chain
from bench.gpu_check.operations import OPS, Case, Operands
from bench.gpu_check.steps import CONTENDERS, StepCase
from bench.measure.predict import GPUS
from bench.report_card import calibration
from bench.rows import relative_error
from bench.shapes import Layer
from kernels import runtime, tiles, tuning
from kernels.tiles import Tile
from train.rehearsal import Step

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


@pytest.mark.parametrize("has_gpu", [False, True])
def test_tf32_and_the_search_for_algorithms_are_switched_and_put_back(has_gpu, monkeypatch):
    cudnn = SimpleNamespace(conv=SimpleNamespace(fp32_precision="ieee"), benchmark=False)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with operations.precision_of(case(precision="tf32"), benchmark=True):
        assert (cudnn.conv.fp32_precision, cudnn.benchmark) == ("tf32", has_gpu)
    assert (cudnn.conv.fp32_precision, cudnn.benchmark) == ("ieee", False)


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
    tile = Tile(M=32, N=32, K=16, num_warps=2, num_stages=2)
    ahead.compile_one(partial(operations.launch, case("input_grad", torch.float16), tile), "sm_90")
    (arch, constants), *_ = compiled
    assert arch == "sm_90"
    assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["num_warps"]) == (32, 32, 2)
    assert tiles.candidates is candidates


@pytest.mark.slow
def test_processes_compile_ahead_and_tell_what_they_could_not(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    good, bad = (partial(operations.launch, case("forward", torch.float16), Tile(M=M, N=32, K=16)) for M in (32, 24))
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
    assert worker.time_all(rows.append, torch.device("cpu"), quick=True) is None
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
    wrong = worker.time_all(rows.append, torch.device("cpu"), quick=True)
    assert "1 rows failed" in wrong
    assert ["seconds" in row for row in rows] == [True, False, True]
    assert "its time means nothing" in rows[1]["error"]


def test_a_calibration_is_made_of_what_was_timed(clock, tmp_path):
    rows = []
    worker.time_all(rows.append, torch.device("cpu"), quick=True)
    lines = [{"ahead": {}}, *(row | {"arch": "sm_80"} for row in rows), {"op": "forward", "error": "not timed"}]
    lines += [{"chain": "conv_relu", "seconds": 1.0}, {"step": "simplenet", "seconds": {}}]
    assert parts.nothing_to_calibrate(tmp_path, False) == "nothing was timed"
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert parts.nothing_to_calibrate(tmp_path, False) is None
    assert "--quick" in parts.nothing_to_calibrate(tmp_path, True)
    calibrate(tmp_path)
    factors = parts.read_calibration(tmp_path)
    assert {op: found["fp32"]["n"] for op, found in factors.items()} == dict.fromkeys(OPS, 1)
    assert calibration.read(tmp_path / parts.CALIBRATION).gpu == "a fake GPU"


# --- chains -------------------------------------------------------------------------------------------------------

POOL = Layer(
    name="pool3x3-8", x_shape=(2, 8, 9, 7), w_shape=(8, 8, 3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1),
    groups=1,
)  # fmt: skip
STEM = Layer(
    name="conv3x3-8", x_shape=(2, 3, 9, 7), w_shape=(8, 3, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
    groups=1,
)  # fmt: skip


def chain(name: str, layer: Layer | None = None, dtype: torch.dtype = torch.float32) -> Chain:
    return Chain(layer=layer or (POOL if name in OF_POOLS else LAYER), name=name, dtype=dtype, precision="ieee")


@pytest.mark.parametrize(
    ("name", "layer"),
    [*((name, None) for name in (*OF_CONVOLUTIONS, *OF_POOLS)), ("conv_relu_grad", STEM)],
)
def test_fused_unfused_and_native_chains_compute_the_same(name, layer):
    one = chain(name, layer)
    operands = chains.Operands.of(one, "cpu")
    exact = chains.native(one, operands.double())
    assert len(exact) == {"conv_relu_grad": 2 if layer is STEM else 3}.get(name, 1)
    for by in (chains.ours, chains.native, *((chains.unfused,) if one.has_unfused else ())):
        found = by(one, operands)
        for result, right in zip(found, exact, strict=True):
            assert result.shape == right.shape
            assert relative_error(result, right) < worker.RELATIVE["float32"], by.__name__


def test_chains_are_those_of_the_timed_layers_and_of_both_pools():
    every = chains.chains("sm_90")
    assert {one.name for one in every} == {*OF_CONVOLUTIONS, *OF_POOLS}
    assert {one.layer.name for one in every if one.name in OF_POOLS} == {"pool3x3-64", "pool3x3-256"}
    assert len([one for one in every if one.name == "conv_relu"]) == 4 * 3
    assert "tf32" not in {one.precision for one in chains.chains("sm_75")}


def launched_ahead(monkeypatch, job) -> list[str]:
    """Names of the kernels; nothing is compiled."""
    seen = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, *_, **__: seen.append(kernel.name))
    ahead.compile_one(job, "sm_90")
    return seen


def test_a_chain_is_compiled_ahead_fused_and_not(monkeypatch):
    seen = launched_ahead(monkeypatch, partial(chains.launch, chain("conv_relu_grad", dtype=torch.float16)))
    assert [name for name in seen if not name.startswith("sum")] == 2 * [
        "input_grad_kernel", "weight_grad_kernel", "bias_grad_kernel",
    ]  # fmt: skip
    pooled = launched_ahead(monkeypatch, partial(chains.launch, chain("relu_max_pool_grad", dtype=torch.float16)))
    assert pooled == ["max_pool_grad_kernel"]


def test_rows_of_chains_have_three_times_and_are_in_no_calibration(clock, monkeypatch):
    every = [chain(name) for name in (*OF_CONVOLUTIONS, *OF_POOLS)]
    monkeypatch.setattr(chains, "chains", lambda arch: every)
    rows = []
    assert worker.time_chains(rows.append, torch.device("cpu"), quick=True) is None
    assert [row["chain"] for row in rows] == [one.name for one in every]
    for row, one in zip(rows, every, strict=True):
        assert "op" not in row
        assert {"seconds", "native_seconds", "ratio", "n", "relative_error"} <= set(row)
        assert ("unfused_seconds" in row) == ("ratio_to_unfused" in row) == one.has_unfused
    json.dumps(rows)


def test_a_wrong_chain_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(chains, "chains", lambda arch: [chain("bias_grad"), chain("relu_max_pool")])
    monkeypatch.setattr(chains, "bias_grad", lambda dy: 1.01 * dy.sum((0, 2, 3)))
    rows = []
    wrong = worker.time_chains(rows.append, torch.device("cpu"), quick=True)
    assert wrong.startswith("1 chains failed, the first: conv3x3-24 bias_grad float32: AssertionError")
    assert ["seconds" in row for row in rows] == [False, True]


# --- training steps -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(clock, monkeypatch) -> None:
    """A training step of SimpleNet on few small images."""
    small = StepCase(model="simplenet", kind="fp32", batch_size=2, image_size=16)
    monkeypatch.setattr(steps, "step_cases", lambda arch: [small])
    monkeypatch.setattr(worker, "QUICK_STEP_ROUNDS", 1)
    steps.exact_gradients.cache_clear()


@pytest.mark.slow
def test_whole_steps_are_timed_by_each_contender_once_their_gradients_are_right(small_steps):
    rows = []
    assert worker.time_steps(rows.append, torch.device("cpu"), quick=True) is None
    (row,) = rows
    assert (row["step"], row["kind"], row["n"]) == ("simplenet", "fp32", 1)
    assert tuple(row["seconds"]) == tuple(row["host_seconds"]) == CONTENDERS
    assert row["ratio"]["torch"] == pytest.approx(row["seconds"]["triton"] / row["seconds"]["torch"])
    assert max(row["relative_error"].values()) < worker.TOLERANCE["step"]
    json.dumps(rows)


def test_a_step_with_wrong_gradients_is_not_timed(small_steps, monkeypatch):
    monkeypatch.setattr(steps, "errors", lambda *_: dict.fromkeys(CONTENDERS, 1e-7) | {"triton": 0.1})
    rows = []
    wrong = worker.time_steps(rows.append, torch.device("cpu"), quick=True)
    assert "the gradients of triton are wrong by 1.0e-01" in wrong
    assert "seconds" not in rows[-1]


def test_contenders_start_from_the_same_weights_and_images_in_their_own_layout():
    small = StepCase(model="simplenet", kind="fp32", batch_size=2, image_size=16)
    made = {name: steps.training(small, name, torch.device("cpu")) for name in CONTENDERS}
    first = made["torch"]
    for one in made.values():
        assert torch.equal(one.x, first.x)
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, first.model.state_dict()[name])
    layouts = {name: one.x.is_contiguous(memory_format=torch.channels_last) for name, one in made.items()}
    assert layouts == dict.fromkeys(CONTENDERS, True) | {"torch": False}


def test_steps_are_both_models_in_each_type_that_the_gpu_has():
    kinds = [(one.model, one.kind) for one in steps.step_cases("sm_90")]
    assert kinds == [(model, kind) for model in ("simplenet", "resnet18") for kind in ("fp32", "tf32", "fp16")]
    assert "tf32" not in {one.kind for one in steps.step_cases("sm_75")}
    assert {one.amp for one in steps.step_cases("sm_90")} == {None, torch.float16}
    assert len(steps.jobs("sm_90")) == 3 * (7 + 11)


def test_all_that_is_timed_is_compiled_at_once_but_for_what_was_tuned(clock, monkeypatch):
    compiled = []
    monkeypatch.setattr(runtime, "target_for", lambda device: runtime.Target("sm_90", 132))
    monkeypatch.setattr(worker, "compile_all", lambda jobs, arch: compiled.append(len(jobs)) or {})
    for tuned in (False, True):
        worker.compile_timed(lambda row: None, torch.device("cuda"), quick=True, tuned=tuned)
    rest = len(chains.chains("sm_90")) + len(steps.jobs("sm_90"))
    assert compiled == [len(OPS) + rest, rest]


def test_a_layer_with_a_bias_is_compiled_fused_and_not_and_one_without_only_so(monkeypatch):
    for bias, times in ((True, 2), (False, 1)):
        seen = launched_ahead(monkeypatch, partial(steps.launch, LAYER, torch.float16, "ieee", bias=bias))
        assert seen.count("forward_kernel") == seen.count("input_grad_kernel") == times
        assert seen.count("bias_grad_kernel") == (2 if bias else 0)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch) -> dict[str, dict]:
    """measured[convolution]: what a fake GPU says of it; rehearsals are replaced by fixed figures, here."""
    monkeypatch.setattr(memory, "find_gpu", lambda: GPUS["h100"])
    figures = dict(tracked_peak=100, allocated_peak=110, reserved_peak=200, nbytes=1000, outside_allocator=800)
    found = {
        conv: {name: value // share for name, value in figures.items()} | {"source": "NVML, this process"}
        for conv, share in (("torch", 1), ("unfold", 1), ("triton", 2), ("triton-unfused", 1))
    }
    monkeypatch.setattr(memory.measured, "measure", lambda step: found[step.conv])
    told = {"live": 50, "allocated": [50, 60], "reserved": [10, 20], "nvml": [500, 600]}
    monkeypatch.setattr(memory, "predicted", lambda step, gpu: told)
    return found


def test_memory_stands_beside_its_prediction_and_as_a_share_of_pytorchs(measured):
    rows = []
    assert memory.measure_all(rows.append, quick=True) is None
    assert [(row["model"], row["conv"]) for row in rows] == [
        (model, conv) for model in ("simplenet", "resnet18") for conv in ("torch", "triton", "triton-unfused")
    ]
    assert rows[1]["ratio"] == dict.fromkeys(("live", "allocated", "reserved", "nvml"), 0.5)
    assert rows[1]["memory"]["nvml"] == 500
    assert rows[1]["as_predicted"] == {"live": True, "allocated": True, "reserved": False, "nvml": True}
    assert rows[1]["batch_size"] == 256
    json.dumps(rows)


def test_all_models_and_unfold_are_measured_but_by_a_quick_run(measured):
    rows = []
    memory.measure_all(rows.append, quick=False)
    assert len(rows) == 4 * 4
    assert {"unfold", "triton"} <= {row["conv"] for row in rows}


def test_a_step_that_does_not_fit_is_told_and_the_others_are_measured(measured):
    measured["torch"] = {"error": "out of memory"}
    measured["triton"]["nbytes"] = None
    rows = []
    wrong = memory.measure_all(rows.append, quick=True)
    assert wrong == "2 steps not measured, the first: simplenet torch: out of memory"
    assert rows[0]["error"] == "out of memory"
    assert set(rows[1]["ratio"].values()) == {None}
    assert "nvml" not in rows[1]["as_predicted"]


def test_a_prediction_names_what_is_measured():
    found = memory.predicted(Step(model="simplenet", conv="triton", batch_size=4, image_size=16), GPUS["h100"])
    assert set(found) == set(memory.FIGURES)
    assert found["allocated"][0] >= found["live"] > 0
    assert found["nvml"][1] > found["reserved"][1]


# --- tuning -------------------------------------------------------------------------------------------------------


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
