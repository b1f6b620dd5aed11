"""The memory command: its figures, and one line for each mistake."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import memory
from bench.measure import tracker as accounts
from bench.measure.nvml import GpuMemory, NvmlUnavailable
from kernels import runtime

MIB = 2**20


def step(conv: str, batch_size: int = 4, image_size: int = 32) -> memory.Step:
    return memory.Step(model="simplenet", conv=conv, batch_size=batch_size, image_size=image_size)


@pytest.fixture
def memory_run(run_main, monkeypatch):
    """memory_run("simplenet", ...) -> (exit code, stdout, stderr)."""

    def no_gpu():
        raise NvmlUnavailable("no NVML: not in this test")

    monkeypatch.setattr(memory, "find_gpu", no_gpu)
    monkeypatch.setenv("COLUMNS", "100")
    return partial(run_main, memory.main)


@pytest.mark.parametrize("conv", ["torch", "unfold"])
def test_meta_tensors_tell_what_the_cpu_takes(conv):
    on_cpu, on_meta = memory.account(step(conv), "cpu"), memory.account(step(conv))
    assert on_meta.peak == pytest.approx(on_cpu.peak, rel=0.01)
    for category in accounts.CATEGORIES:
        assert on_meta.at_peak[category] == pytest.approx(on_cpu.at_peak[category], rel=0.01), category


def test_a_buffer_inside_a_launcher_shows_up(monkeypatch):
    """64 MiB taken by every forward launch: the tracked figure grows, the prediction was not told and does not."""
    before = {device: memory.account(step("triton"), device).peak for device in ("cpu", "meta")}
    channels_last = runtime.channels_last

    def with_a_buffer(tensor: torch.Tensor, what: str) -> torch.Tensor:
        buffer = runtime.empty((16, 2**20), "test", dtype=torch.float32, device=tensor.device)
        assert buffer.nbytes == 64 * MIB
        return channels_last(tensor, what)

    monkeypatch.setattr(runtime, "channels_last", with_a_buffer)
    after = {device: memory.account(step("triton"), device) for device in ("cpu", "meta")}
    assert after["cpu"].at_peak[accounts.WORKSPACE] >= 64 * MIB
    assert after["cpu"].peak > before["cpu"] + 56 * MIB
    assert after["meta"].peak == before["meta"]


# Bytes by hand, float32, batch 256, 128 px. SimpleNet's parameters, as often again for the momentum:
PARAMETERS = 365_028 * 4
# Kept by autograd when the last ReLU's gradient is made: every ReLU's result, and each pool's with its int64 indices.
RELUS = (64 * 64**2 + 2 * 64 * 32**2 + 256 * 32**2 + 2 * 128 * 16**2 + 512 * 16**2) * 256 * 4
POOLS = (64 * 32**2 + 256 * 16**2) * 256 * (4 + 8)
INPUT = 256 * 3 * 128**2 * 4
LAST = 512 * 16**2 * 256 * 4


def test_peak_of_native_simplenet_by_hand():
    tracker = memory.account(step("torch", 256, 128))
    assert tracker.at_peak[accounts.PARAMETERS] == PARAMETERS
    assert tracker.at_peak[accounts.OPTIMIZER] == PARAMETERS
    assert tracker.at_peak[accounts.GRADIENTS] == (512 * 100 + 100) * 4  # the head's, so far
    assert tracker.at_peak[accounts.SAVED] == pytest.approx(RELUS + POOLS, rel=0.001)
    assert tracker.at_peak[accounts.INPUT] == INPUT + 256 * 8
    # The gradient on both sides of the last ReLU.
    assert tracker.at_peak[accounts.TEMPORARY] == pytest.approx(2 * LAST, rel=0.001)
    assert tracker.peak == sum(tracker.at_peak.values())


def test_peak_of_unfold_simplenet_by_hand():
    """Where the second block's 3x3 weight gradient is made: folded product, fold's storage, unfolded matrix."""
    tracker = memory.account(step("unfold", 256, 128))
    matrix = 256 * (64 * 9) * 32**2 * 4
    dy = 256 * 64 * 32**2 * 4
    dw_of_each_image = 256 * 64 * (64 * 9) * 4
    assert tracker.at_peak[accounts.TEMPORARY] == pytest.approx(3 * matrix + dy + dw_of_each_image, rel=0.001)


def test_outside_its_launchers_the_fused_convolution_keeps_what_nn_conv2d_keeps():
    assert memory.account(step("triton", 256, 128)).at_peak == memory.account(step("torch", 256, 128)).at_peak


def test_report(memory_run):
    code, out, err = memory_run("simplenet", "--batch-size", 8, "--image-size", 32, "--json", "m.json")
    assert (code, err) == (0, "")
    report = json.loads(Path("m.json").read_text())
    assert list(report["convolutions"]) == ["torch", "unfold", "triton"]
    for conv, entry in report["convolutions"].items():
        tracker = memory.account(step(conv, 8, 32))
        assert entry["peak"] == tracker.peak == sum(nbytes or 0 for nbytes in entry["at_peak"].values())
        assert f"{tracker.peak / MIB:,.1f}" in out
        assert entry["writeup_nvidia_smi_mib"] is None  # theirs is of another batch and image size
    assert report["convolutions"]["unfold"]["ratio_to_torch"] > 1
    assert "predicted (accounted on meta tensors; no allocator slack, no CUDA context)" in out
    assert "no measured figure: no NVML: not in this test" in out
    assert report["conditions"]["versions"]["torch"] == torch.__version__


def test_a_peak_without_its_workspaces_is_a_lower_bound(memory_run):
    _, out, _ = memory_run("simplenet", "--batch-size", 8, "--image-size", 32, "--json", "m.json")
    report = json.loads(Path("m.json").read_text())
    entries = report["convolutions"]
    assert {conv: entry["is_lower_bound"] for conv, entry in entries.items()} == {
        "torch": False, "unfold": False, "triton": True,
    }  # fmt: skip
    assert [entry["at_peak"][accounts.WORKSPACE] for entry in entries.values()] == [0, 0, None]

    def row(name: str) -> list[str]:
        return re.search(rf"{name} +(.*)", out)[1].split()

    assert row("workspaces") == ["0.0", "0.0", "not", "known"]
    native, unfold, triton = (memory.mib(entry["peak"]) for entry in entries.values())
    assert row("all together") == [native, unfold, "≥", triton]
    native, unfold, triton = (f"{entry['ratio_to_torch']:.2f}" for entry in entries.values())
    assert row("times torch's") == [native, unfold, "≥", triton]
    assert len(report["notes"]) == 1
    assert "split-K workspaces are not included" in report["notes"][0]
    assert report["notes"][0] in " ".join(out.split())


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_its_terminal_and_fills_it(memory_run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = memory_run("--help")
    assert code == 0
    assert columns - 12 < max(map(len, out.splitlines())) <= columns


def test_the_writeups_figures_stand_as_theirs(memory_run):
    _, out, _ = memory_run("simplenet")
    assert "the write-up's T4*" in out
    assert "3,113" in out
    assert "4,881" in out
    assert "not comparable" in out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_report_fits_its_terminal(memory_run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = memory_run("simplenet")
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out


def test_measured_figures_stand_beside_predicted_ones(memory_run, monkeypatch):
    gpu = GpuMemory(name="Paper GPU", uuid="GPU-0", total=16 * 2**30, used=0, process=None)
    answers = {
        "torch": {"source": "NVML, this process", "nbytes": 3000 * MIB},
        "unfold": {"error": "out of memory"},
    }
    monkeypatch.setattr(memory, "find_gpu", lambda: gpu)
    monkeypatch.setattr(memory, "conditions", lambda device: {})
    monkeypatch.setattr(memory, "measure", lambda step: answers[step.conv])
    code, out, _ = memory_run("simplenet", "--conv", "torch", "unfold")
    assert code == 0
    row = next(line for line in out.splitlines() if "by NVML" in line)
    assert "3,000.0" in row
    assert "out of memory" in row
    assert "measured on Paper GPU: NVML, this process" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["model"], id="no-model"),
        pytest.param(["alexnet"], ["alexnet", "simplenet"], id="unknown-model"),
        pytest.param(["simplenet", "--conv", "fft"], ["--conv", "fft", "triton"], id="unknown-conv"),
        pytest.param(["simplenet", "--conv"], ["--conv"], id="conv-without-value"),
        pytest.param(["simplenet", "--batch-size", "0"], ["--batch-size", "0"], id="zero-batch"),
        pytest.param(["simplenet", "--batch-size", "-5"], ["--batch-size", "-5"], id="negative-batch"),
        pytest.param(["simplenet", "--batch-size", "1e3"], ["--batch-size", "1e3", "whole"], id="not-a-whole-number"),
        pytest.param(["simplenet", "--batch-size", "9" * 30], ["beyond any machine"], id="astronomic-batch"),
        pytest.param(["simplenet", "--image-size", "7"], ["--image-size", "7", "8"], id="tiny-images"),
        pytest.param(["simplenet", "--image-size", "9999999999"], ["beyond any machine"], id="astronomic-images"),
        pytest.param(["simplenet", "--json", "nowhere/m.json"], ["nowhere/m.json"], id="json-in-no-folder"),
        pytest.param(["simplenet", "--json", "."], ["."], id="json-is-a-folder"),
        pytest.param(["resnet18", "--image-size", "16"], ["resnet18", "image size 16"], id="size-of-the-model"),
        pytest.param(["customnet", "--batch-size", "1"], ["customnet, 1 images", "1 value"], id="one-image"),
        pytest.param(["simplenet", "--json", "/proc/m.json"], ["/proc/m.json"], id="json-not-writable"),
    ],
)
def test_mistakes_are_one_line(memory_run, tmp_path, arguments, words):
    code, out, err = memory_run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("bench.memory: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert list(tmp_path.iterdir()) == []
