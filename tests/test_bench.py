"""The benchmark itself: its shapes, its clock, its table, and that it times nothing wrong."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import models
from bench import test_conv
from bench.measure import timer
from bench.rows import Row, ratio_table
from bench.shapes import TIMED, conv_layers, timed_layers

ROOT = Path(__file__).resolve().parent.parent


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
def test_every_layer_to_time_exists(model):
    assert [layer.name for layer in timed_layers(model, 2, 32)] == list(TIMED[model])


def test_a_wrong_result_is_not_timed(monkeypatch):
    class Wrong(torch.nn.Conv2d):
        def _conv_forward(self, *operands):
            return super()._conv_forward(*operands) * 1.001

    monkeypatch.setitem(models.CONVOLUTIONS, "torch", Wrong)
    layer = timed_layers("simplenet", 2, 32)[1]
    timed = []
    for operation in (test_conv.forward, test_conv.input_grad, test_conv.weight_grad):
        with pytest.raises(AssertionError, match="its time means nothing"):
            test_conv.run(operation, layer, "torch", torch.device("cpu"), lambda *row, **rest: timed.append(row))
    assert not timed


def test_a_gradient_row_computes_that_gradient_alone():
    layer = timed_layers("simplenet", 2, 32)[1]
    operands = test_conv.Operands.of(layer, "torch", torch.device("cpu"))
    assert test_conv.input_grad(operands)().shape == layer.x_shape
    assert not operands.module.weight.requires_grad
    operands = test_conv.Operands.of(layer, "torch", torch.device("cpu"))
    assert test_conv.weight_grad(operands)().shape == layer.w_shape
    assert not operands.x.requires_grad


def test_each_convolution_gets_the_same_values_in_its_own_layout():
    layer = timed_layers("simplenet", 2, 32)[1]
    reference = test_conv.Operands.of(layer, "torch", torch.device("cpu"))
    for conv in models.CONVOLUTIONS:
        ours = test_conv.Operands.of(layer, conv, torch.device("cpu"))
        for name in ("x", "dy"):
            assert torch.equal(getattr(ours, name), getattr(reference, name)), (conv, name)
            assert getattr(ours, name).is_contiguous(memory_format=models.memory_format(conv)), (conv, name)
        for name, value in reference.module.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], value), (conv, name)


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


def test_ratios_of_the_table():
    rows = [
        Row(operation="forward", layer="conv3x3-64", conv=conv, backend="native", seconds=seconds)
        for conv, seconds in (("torch", 0.004), ("unfold", 0.008), ("triton", 0.002))
    ] + [Row(operation="train_step", layer="simplenet", conv="triton", backend="compiled", seconds=1.5)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ratio_table(rows))
    forward, step = (line.split() for line in console.export_text().splitlines() if "conv3x3" in line or "step" in line)
    assert forward == ["forward", "conv3x3-64", "4.00", "8.00", "2.00", "0.50", "0.25"]
    assert step == ["train_step", "simplenet", "-", "-", "1,500.00", "-", "-"]


def bench_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # The tests may themselves run on workers of pytest-xdist, where pytest-benchmark measures nothing.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=ours | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_command_labels_rows_and_ends_with_ratios(tmp_path):
    file = tmp_path / "bench.json"
    process = bench_run("--bench-device", "cpu", "-k", "forward and conv1x1", f"--benchmark-json={file}", COLUMNS="80")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {row["name"]: row["extra_info"] for row in json.loads(file.read_text())["benchmarks"]}
    assert set(rows) == {
        "test_forward[torch-native-conv1x1-256]",
        "test_forward[unfold-native-conv1x1-256]",
        "test_forward[triton-interpreter-conv1x1-256]",
    }
    for info in rows.values():
        assert {"device", "versions", "commit", "dtype", "x_shape", "w_shape", "backend", "n"} <= set(info)
        assert info["torch_threads"] == 1
        assert (info["dilation"], info["groups"]) == ([1, 1], 1)
    theirs, ratios = process.stdout.index("benchmark 'forward'"), process.stdout.index("ratios of the same run")
    assert theirs < ratios
    their_table = process.stdout[theirs : process.stdout.index("Legend:")]
    assert "\nforward[triton-interpreter-conv1x1-256]" in their_table
    assert max(map(len, their_table.splitlines())) <= 80
    ours = process.stdout[ratios:]
    assert "/ torch" in ours
    assert "PyTorch threads 1" in ours
    assert "triton: interpreted on a CPU: says nothing about a GPU" in ours
    assert "…" not in process.stdout


def test_a_missing_gpu_is_one_line():
    process = bench_run("--bench-device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in (process.stdout + process.stderr).splitlines() if line]
    assert lines == ["ERROR: --bench-device cuda: PyTorch sees no GPU here"]
