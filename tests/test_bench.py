"""The benchmark itself: its rows, what they compute, its peers, and the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_case import CPU, SMALL, case

import models
from bench import conftest, peers, test_conv, timing_cases, timing_rounds
from bench.rows import worst_error
from bench.shapes import TIMED, conv_layers, timed_layers
from bench.timing_cases import FUSED, KINDS, OPERATIONS, fused_cases, operation_cases, step_cases, why_not
from bench.timing_rounds import one, rotating

ROOT = Path(__file__).resolve().parent.parent


# --- rows ---------------------------------------------------------------------------------------------------------


def test_shapes_are_the_models():
    layers = conv_layers("simplenet", 256, 128)
    assert [(layer.name, layer.x_shape) for layer in layers] == [
        ("conv7x7-64", (256, 3, 128, 128)),
        ("conv1x1-64", (256, 64, 32, 32)),
        ("conv3x3-64", (256, 64, 32, 32)),
        ("conv1x1-256", (256, 64, 32, 32)),
        ("conv1x1-128", (256, 256, 16, 16)),
        ("conv3x3-128", (256, 128, 16, 16)),
        ("conv1x1-512", (256, 128, 16, 16)),
    ]
    assert (layers[0].stride, layers[0].padding) == ((2, 2), (3, 3))


@pytest.mark.parametrize("model", TIMED)
def test_no_two_layers_of_a_model_have_the_same_label(model):
    labels = [layer.label for layer in conv_layers(model, 2, 64)]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("model", TIMED)
def test_every_layer_to_time_exists(model):
    assert [layer.label for layer in timed_layers(model, 2, 32)] == list(TIMED[model])


@pytest.mark.parametrize(
    ("cases_of", "group"),
    [*((operation_cases, name) for name in OPERATIONS), *((fused_cases, name) for name in FUSED),
     (step_cases, "train_step")],
)  # fmt: skip
def test_a_gpu_and_the_cpu_have_the_same_rows(cases_of, group):
    on_gpu, on_cpu = ([one.label(CPU) for one in cases_of(group, kind)] for kind in ("cuda", "cpu"))
    assert on_gpu == on_cpu
    assert len(set(on_cpu)) == len(on_cpu)


def test_every_layer_has_every_convolution_and_two_have_every_type():
    for operation in OPERATIONS:
        cases = operation_cases(operation, "cpu")
        for model, labels in TIMED.items():
            for label in labels:
                of_layer = [one for one in cases if one.what == f"{model} {label}"]
                contenders = {one.contender for one in of_layer if one.kind == "float32"}
                assert contenders >= {*models.CONVOLUTIONS, "torch-channels-last"}
        kinds = {what: {one.kind for one in cases if one.what == what} for what in {one.what for one in cases}}
        assert sum(found == set(KINDS) for found in kinds.values()) == 2


def test_models_that_fuse_have_a_row_without():
    by_model = {one.model for one in step_cases("train_step", "cpu") if one.contender == "triton-unfused"}
    assert by_model == {"simplenet", "customnet", "resnet18"}


def test_a_registered_convolution_gets_its_rows(monkeypatch):
    monkeypatch.setitem(models.CONVOLUTIONS, "mine", torch.nn.Conv2d)
    for cases in (operation_cases("forward", "cpu"), step_cases("train_step", "cpu")):
        ours, mine = ({(one.what, one.kind) for one in cases if one.contender == name} for name in ("triton", "mine"))
        assert ours == mine
    assert isinstance(test_conv.Operands.of(case("mine"), CPU).module, torch.nn.Conv2d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contender", [*models.CONVOLUTIONS, "torch-channels-last"])
def test_facts_name_all_that_a_time_depends_on(contender, kind):
    facts = case(contender, kind).facts(CPU)
    assert set(facts) == {
        "model", "layer", "conv", "backend", "kind", "dtype", "amp", "precision", "layout", "batch_size", "image_size",
        "x_shape", "w_shape", "stride", "padding", "dilation", "groups",
    }  # fmt: skip
    assert (facts["x_shape"], facts["stride"], facts["groups"]) == ((2, 4, 9, 7), (2, 1), 1)
    assert facts["dtype"] == ("float32" if kind == "tf32" else kind)
    assert facts["precision"] == ("tf32" if kind == "tf32" else "ieee")
    assert json.loads(json.dumps(facts))


def test_what_cannot_run_on_a_cpu_says_why():
    assert why_not(case(), CPU) is None
    assert "tensor cores" in why_not(case(kind="tf32"), CPU)
    steps = {one.model: one for one in step_cases("train_step", "cpu") if one.kind == "fp16 amp"}
    assert why_not(steps["simplenet"], CPU) is None
    assert "slow on a CPU" in why_not(steps["resnet18"], CPU)


# --- peers --------------------------------------------------------------------------------------------------------


def test_peers_that_are_absent_are_told(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "flag_gems" else object())
    assert why_not(case("flag_gems"), CPU) == "flag_gems is not installed"
    assert why_not(case("inductor"), CPU) == "Inductor's Triton convolution needs a GPU"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert why_not(case("flag_gems"), CPU) == "FlagGems needs a GPU"


def test_a_peer_is_called_with_the_layers_geometry(monkeypatch):
    fake = SimpleNamespace(conv2d=lambda x, w, b, *geometry: torch.nn.functional.conv2d(x, w, b, *geometry))
    monkeypatch.setitem(sys.modules, "flag_gems.ops.conv2d", fake)
    monkeypatch.setitem(sys.modules, "flag_gems.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flag_gems", SimpleNamespace())
    timed = []
    for operation in (test_conv.forward, test_conv.step):
        test_conv.run(operation, case("flag_gems"), CPU, lambda calls, row, *, error: timed.append(error))
    assert max(timed) < 1e-5


def test_torchattacks_is_given_our_attack(monkeypatch):
    given = {}
    fake = SimpleNamespace(PGD=lambda model, **options: given.update(options, model=model))
    monkeypatch.setitem(sys.modules, "torchattacks", fake)
    peers.ATTACKS["torchattacks"]("a model", CPU, steps=10, step=0.01, epsilon=0.1)
    assert given == {"model": "a model", "eps": 0.1, "alpha": 0.01, "steps": 10, "random_start": False}


# --- what is timed --------------------------------------------------------------------------------------------------


def test_a_wrong_result_is_not_timed(monkeypatch):
    class Wrong(torch.nn.Conv2d):
        def _conv_forward(self, *operands):
            return super()._conv_forward(*operands) * 1.001

    monkeypatch.setitem(models.CONVOLUTIONS, "torch", Wrong)
    timed = []
    for operation in (test_conv.forward, test_conv.input_grad, test_conv.weight_grad, test_conv.step):
        with pytest.raises(AssertionError, match="its time means nothing"):
            test_conv.run(operation, case(), CPU, lambda *row, **rest: timed.append(row))
    assert not timed


def test_a_gradient_that_is_no_number_is_not_timed():
    """Also where it is not the first result that is wrong."""
    fine = torch.ones(2)
    assert worst_error([fine, fine], [fine, fine]) == 0
    assert math.isnan(worst_error([fine, fine * torch.nan, fine], [fine, fine, fine]))


def test_names_of_peers_are_no_variants():
    assert set(models.PEERS) == set(peers.CONVOLUTIONS)


def test_rows_of_a_variant_that_cannot_be_used_say_why(monkeypatch):
    broken = type("Conv2d", (torch.nn.Conv2d,), {"refusal": "kernels/variants/broken.py: it is broken"})
    monkeypatch.setitem(models.CONVOLUTIONS, "broken", broken)
    assert why_not(case(contender="broken"), CPU) == "kernels/variants/broken.py: it is broken"


def test_a_gradient_row_computes_that_gradient_alone():
    operands = test_conv.Operands.of(case(), CPU)
    assert [part.shape for part in test_conv.input_grad(operands)()] == [SMALL.x_shape]
    assert not operands.module.weight.requires_grad
    operands = test_conv.Operands.of(case(), CPU)
    assert [part.shape for part in test_conv.weight_grad(operands)()] == [SMALL.w_shape]
    assert not operands.x.requires_grad


def test_a_step_is_the_result_and_three_gradients():
    parts = test_conv.step(test_conv.Operands.of(case(), CPU))()
    assert [tuple(part.shape) for part in parts] == [SMALL.geometry.y_shape, SMALL.x_shape, SMALL.w_shape, (8,)]


def test_each_convolution_gets_the_same_values_in_its_own_layout():
    reference = test_conv.Operands.of(case(), CPU)
    for contender in (*models.CONVOLUTIONS, "torch-channels-last"):
        ours = test_conv.Operands.of(case(contender), CPU)
        for name in ("x", "dy"):
            assert torch.equal(getattr(ours, name), getattr(reference, name)), (contender, name)
            assert getattr(ours, name).is_contiguous(memory_format=timing_cases.layout(contender)), (contender, name)
        for name, value in reference.module.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], value), (contender, name)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operands_that_take_turns_give_equal_results_in_memory_of_their_own(operation):
    calls = []
    test_conv.run(getattr(test_conv, operation), case("unfold"), CPU, lambda made, row, *, error: calls.extend(made))
    assert len(calls) == timing_rounds.MOST_COPIES
    flushed = []
    setup = rotating(calls, lambda: flushed.append(True))
    taken = [setup()[0][0] for _ in range(4)]
    assert len(set(map(id, taken))) == 3
    assert taken[3] is taken[0]
    assert len(flushed) == 4
    first, *others = [one(call) for call in taken[:3]]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()


def test_a_row_that_does_not_fit_is_left_out():
    """Not the run, and not as a failure."""
    item = SimpleNamespace(name="test_forward[unfold-native]", fixturenames=[], config=None)
    call = conftest.pytest_runtest_call(item)
    next(call)
    with pytest.raises(pytest.skip.Exception, match="out of GPU memory: unfold-native"):
        call.throw(torch.OutOfMemoryError("CUDA out of memory"))


# --- the command --------------------------------------------------------------------------------------------------


def bench_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # The tests may themselves run on workers of pytest-xdist, where pytest-benchmark measures nothing.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=ours | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A run of one layer's forward by every convolution, and its JSON."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    process = bench_run(
        "--bench-device", "cpu", "-k", "forward and conv3x3-64 and simplenet", f"--benchmark-json={file}", COLUMNS="80"
    )
    return process, file


def test_the_command_labels_rows_and_ends_with_ratios(finished):
    process, file = finished
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {row["name"]: row for row in json.loads(file.read_text())["benchmarks"]}
    labels = {"torch": "native", "unfold": "native", "triton": "interpreter"}
    assert {f"test_forward[{conv}-{label}-simplenet-conv3x3-64-float32]" for conv, label in labels.items()} <= set(rows)
    for row in rows.values():
        info = row["extra_info"]
        assert {"device", "versions", "commit", "kind", "dtype", "x_shape", "w_shape", "backend", "n"} <= set(info)
        assert (info["torch_threads"], info["copies"], row["group"]) == (1, 3, "forward")
        assert info["relative_error"] < 8e-3
        assert row["stats"]["rounds"] == info["n"] >= 3
    assert "Legend:" not in process.stdout, "pytest-benchmark's tables were not asked for"
    ours = process.stdout[process.stdout.index("ratios of the same run") :]
    words = " ".join(ours.split())  # where lines end depends on the processor's name
    assert "PyTorch threads 1" in words
    assert "triton: interpreted on a CPU: says nothing about a GPU" in ours
    for reason in ("flag_gems is not installed", "Inductor's Triton convolution needs a GPU", "tensor cores"):
        assert reason in words, reason
    assert "…" not in process.stdout
    assert max(map(len, ours.splitlines())) <= 80


@pytest.mark.slow
def test_a_regression_fails_the_run_and_pictures_are_drawn(finished, tmp_path):
    _, file = finished
    doctored = json.loads(file.read_text())
    for row in doctored["benchmarks"]:
        row["stats"]["median"] /= 100
    earlier = tmp_path / "0001_earlier.json"
    earlier.write_text(json.dumps(doctored))
    process = bench_run(
        "--bench-device", "cpu", "-k", "forward and torch-native-simplenet-conv3x3-64-float32", "-rs",
        f"--benchmark-compare={earlier}", "--benchmark-compare-fail=median:10%",
        f"--benchmark-histogram={tmp_path}/picture", COLUMNS="80",
    )  # fmt: skip
    said = process.stdout + process.stderr
    assert process.returncode == pytest.ExitCode.TESTS_FAILED
    assert "Performance has regressed" in said
    assert "Traceback" not in said
    assert "benchmark 'forward'" in said, "what it is compared with was asked for"
    assert "ratios of the same run" in said
    assert [path.name for path in tmp_path.glob("*.svg")] == ["picture-forward.svg"]


def test_a_bad_threshold_is_one_line():
    process = bench_run("--benchmark-compare-fail=median:ten%")
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert "argument --benchmark-compare-fail: Could not parse value: 'median:ten%'" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_missing_gpu_is_one_line():
    process = bench_run("--bench-device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in (process.stdout + process.stderr).splitlines() if line]
    assert lines == ["ERROR: --bench-device cuda: PyTorch sees no GPU here"]
