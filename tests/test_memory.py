"""The memory command: its figures, words and pictures, and one line for each mistake."""

import dataclasses
import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

import models
from bench.measure import at_hand
from bench.measure.account import CATEGORIES
from bench.measure.predict import GPUS, MIB, Range
from bench.memory import command, measured
from bench.memory.colours import COLOURS
from bench.memory.console import bars, branches
from bench.memory.figure import timeline
from bench.memory.words import gap_to
from train.rehearsal import CONVOLUTIONS, Step, rehearse

SMALL = ("--batch-size", 8, "--image-size", 32)


@pytest.fixture
def memory_run(run_main, monkeypatch):
    """memory_run("simplenet", ...) -> (exit code, stdout, stderr)."""

    def no_gpu():
        raise at_hand.NoGpu("no NVML: not in this test")

    monkeypatch.setattr(at_hand, "find_gpu", no_gpu)
    monkeypatch.setenv("COLUMNS", "100")
    return partial(run_main, command.main)


@pytest.fixture
def report_of(memory_run):
    """report_of("simplenet", ...) -> (what --json has, stdout)."""

    def run(*arguments: object) -> tuple[dict, str]:
        code, out, err = memory_run(*arguments, "--json", "m.json")
        assert (code, err) == (0, "")
        return json.loads(Path("m.json").read_text()), out

    return run


def row(out: str, name: str) -> list[str]:
    """The cells of a line of the table."""
    return re.search(rf"^ *{re.escape(name)} +(.*)$", out, re.MULTILINE)[1].split()


def shown(nbytes: int) -> str:
    return f"{nbytes / MIB:,.1f}"


def test_the_report_is_the_accounts(report_of):
    report, out = report_of("simplenet", *SMALL)
    entries = report["convolutions"]
    assert list(entries) == list(CONVOLUTIONS)
    for conv, entry in entries.items():
        step = Step(model="simplenet", conv=conv, batch_size=8, image_size=32)
        account = rehearse(step, "sm_75", multiprocessors=40, steps=3)
        assert entry["peak"] == account.peak.nbytes == sum(entry["at_peak"].values())
        assert entry["peak"] == sum(storage["nbytes"] for storage in entry["live_at_peak"])
        assert max(phase["peak"] for phase in entry["phases"].values()) == entry["peak"]
        low, high = entry["reserved"]
        assert entry["peak"] <= low <= high
        assert entry["process"] == [low + entry["context"][0], high + entry["context"][1]]
        assert entry["writeup_nvidia_smi_mib"] is None  # theirs is of another batch and image size
    assert row(out, "peak, all together") == [shown(entry["peak"]) for entry in entries.values()]
    for category in CATEGORIES:
        assert row(out, category) == [shown(entry["at_peak"][category]) for entry in entries.values()]
    ratios = [entry["peak"] / entries["torch"]["peak"] for entry in entries.values()]
    assert row(out, "times torch's") == [f"{ratio:.2f}" for ratio in ratios]
    assert ratios[1] > 1.5
    assert report["conditions"]["versions"]["torch"] == torch.__version__


def test_what_is_predicted_and_assumed_is_said(report_of):
    report, out = report_of("simplenet", *SMALL)
    said = " ".join(out.split())
    assert "predicted: accounted on meta tensors" in said
    assert "for one Tesla T4" in said
    assert "Nothing is measured: no NVML: not in this test." in said
    assert report["not_measured_because"] == "no NVML: not in this test"
    for text in report["assumptions"].values():
        assert text in said
    assert "measured by NVML" not in out


def test_cudnn_is_assumed_of_native_convolutions_alone(report_of):
    assert "cudnn" not in report_of("simplenet", "--conv", "triton", *SMALL)[0]["assumptions"]
    assert "cudnn" in report_of("simplenet", "--conv", "torch", *SMALL)[0]["assumptions"]


def test_words_tell_where_a_difference_comes_from(report_of):
    report, out = report_of("simplenet")
    told = {entry["conv"]: entry for entry in report["differences"]}
    assert told["triton-unfused"]["nbytes"] == 0
    assert told["triton-unfused"]["items"] == []
    assert "triton-unfused against torch: the same to 0.1 MiB, at the same moment." in out
    entries = report["convolutions"]
    for conv in ("unfold", "triton"):
        assert told[conv]["nbytes"] == entries[conv]["peak"] - entries["torch"]["peak"]
        assert sum(nbytes for nbytes, _ in told[conv]["items"]) == told[conv]["nbytes"]
    assert min(told["triton"]["items"])[1] == "saved for backward"  # what fusing is for
    unfold = told["unfold"]
    traps = {words.split(":")[0].split(",")[0]: nbytes for nbytes, words in unfold["items"]}
    matrix = 576 * MIB
    assert traps["the unfolded matrix"] == traps["fold's result"] == traps["matmul's clone of that matrix"] == matrix
    assert unfold["where"].startswith("backward, block2.3")


def test_only_convolutions_that_unfold_are_told_as_such(report_of):
    """SimpleViT multiplies matrices outside of its one convolution too."""
    report, _ = report_of("simplevit", "--conv", "unfold", *SMALL)
    storages = report["convolutions"]["unfold"]["live_at_peak"]
    assert any(storage["operator"] == "aten.mm" for storage in storages)
    assert all(storage["what"] == storage["category"] for storage in storages if storage["module"] != "patch")


def test_the_writeups_figures_stand_as_theirs(report_of):
    report, out = report_of("simplenet")
    assert row(out, "the write-up's T4*") == ["3,113", "4,881", "-", "-"]
    assert "it stands as theirs" in out
    assert "reproduced" not in out
    assert report["convolutions"]["torch"]["gap_to_writeup"].startswith("3,113 less")
    assert report["convolutions"]["triton"]["gap_to_writeup"] is None
    mixed, _ = report_of("simplenet", "--conv", "torch", "--amp", "fp16")  # which is another step than theirs
    assert mixed["convolutions"]["torch"]["writeup_nvidia_smi_mib"] is None


@pytest.mark.parametrize(
    ("theirs", "reserved", "said"),
    [
        pytest.param(1000, (700, 700), "leaves 300 MiB, as a context whose kernels load when first used", id="lazy"),
        pytest.param(3000, (2000, 2000), "leaves 1,000 MiB, as a context with all kernels loaded", id="eager"),
        pytest.param(3000, (2200, 2700), "leaves 300-800 MiB, as a context whose", id="either"),
        pytest.param(3000, (1000, 1000), "2,000 MiB: 700 more than is assumed of any CUDA context", id="unexplained"),
        pytest.param(3000, (2800, 3200), "leaves 0-200 MiB, as a context whose", id="overlap"),
        pytest.param(3000, (3100, 3200), "leaves nothing", id="another-network"),
        pytest.param(3000, (2950, 2950), "as no context would take", id="too-little"),
    ],
)
def test_a_gap_is_held_against_what_contexts_take(theirs, reserved, said):
    assert said in gap_to(theirs, Range(reserved[0] * MIB, reserved[1] * MIB))


def test_another_gpu_has_other_workspaces_and_another_context(report_of):
    of = {gpu: report_of("simplenet", "--conv", "triton", *SMALL, "--gpu", gpu)[0] for gpu in ("t4", "h100")}
    assert of["h100"]["gpu"]["name"] == GPUS["h100"].name
    entries = {gpu: report["convolutions"]["triton"] for gpu, report in of.items()}
    assert entries["h100"]["reserved"] > entries["t4"]["reserved"]
    assert entries["h100"]["context"] == [742 * MIB, 760 * MIB]


def test_mixed_precision_takes_less(report_of):
    full, mixed = (report_of("simplenet", "--conv", "triton", *SMALL, "--amp", amp)[0] for amp in ("off", "fp16"))
    assert mixed["convolutions"]["triton"]["peak"] < full["convolutions"]["triton"]["peak"]
    assert mixed["dtype"] == "float32 with autocast to fp16"


@pytest.mark.slow
def test_the_largest_batch_is_found(report_of, monkeypatch):
    monkeypatch.setitem(GPUS, "t4", dataclasses.replace(GPUS["t4"], total=1000))  # a search in small batches
    report, out = report_of("simplenet", "--conv", "torch", "triton", "--image-size", 32, "--fits", "t4")
    for conv in ("torch", "triton"):
        found = report["convolutions"][conv]["largest_batch"]
        assert 64 < found["surely"] < found["perhaps"] < 4096
    native, fused = (report["convolutions"][conv]["largest_batch"] for conv in ("torch", "triton"))
    assert row(out, "largest batch that fits") == [
        f"{found['surely']:,}-{found['perhaps']:,}" for found in (native, fused)
    ]


@pytest.mark.slow
def test_all_models_stand_in_one_table(memory_run):
    code, out, err = memory_run("all", "--batch-size", 4, "--image-size", 64, "--json", "all.json")
    assert (code, err) == (0, "")
    reports = json.loads(Path("all.json").read_text())["reports"]
    assert [report["model"] for report in reports] == list(models.MODELS)
    rows = [line.split() for line in out.splitlines() if line.split()[:2] and line.split()[-1] == "-"]
    peaks = [shown(entry["peak"]) for report in reports for entry in report["convolutions"].values()]
    assert [row[-3] for row in rows] == peaks


def test_without_torch_the_first_convolution_is_the_reference(report_of):
    report, out = report_of("simplenet", "--conv", "unfold", "triton", *SMALL)
    assert report["reference"] == "unfold"
    (told,) = report["differences"]
    assert (told["conv"], told["reference"]) == ("triton", "unfold")
    ratio = report["convolutions"]["triton"]["peak"] / report["convolutions"]["unfold"]["peak"]
    assert row(out, "times unfold's") == ["1.00", f"{ratio:.2f}"]


def test_bars_are_as_long_as_peaks_and_have_letters_without_colours(report_of):
    report, _ = report_of("simplenet", "--conv", "unfold", "--batch-size", 64)
    entry = report["convolutions"]["unfold"]
    lines = [line.plain for line in bars({"unfold": entry}, 100, with_letters=True).renderables]
    for line, (name, phase) in zip(lines, entry["phases"].items(), strict=False):
        bar = line.split(name)[1].split()[0]
        assert len(bar) == pytest.approx(66 * phase["peak"] / entry["peak"], abs=1)
        shares = {category: bar.count(category[0].upper()) / len(bar) for category in CATEGORIES if len(bar) > 30}
        for category, share in shares.items():
            assert share == pytest.approx(phase["at_peak"][category] / phase["peak"], abs=0.04), (name, category)
    assert [line.split()[0] for line in lines[-1].split("   ") if line.strip()] == ["P", "G", "O", "I", "S", "T", "W"]


def test_the_tree_has_what_matters_and_sums_the_rest(report_of):
    report, _ = report_of("customnet", "--conv", "torch", "--batch-size", 64)
    entry = report["convolutions"]["torch"]
    found = {category: (nbytes, lines) for category, nbytes, lines in branches(entry)}
    nbytes, lines = found["saved for backward"]
    assert nbytes == entry["at_peak"]["saved for backward"]
    assert re.fullmatch(r"[\d,.]+  \d+ more", lines[-1])
    told = sum(float(line.split()[0].replace(",", "")) for line in lines)
    assert told == pytest.approx(nbytes / MIB, abs=0.05 * len(lines))


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_its_terminal_and_fills_it(memory_run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = memory_run("--help")
    assert code == 0
    assert columns - 12 < max(map(len, out.splitlines())) <= columns


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "asked"), [(80, ("--fits", "t4")), (120, ())], ids=["80", "120"])
def test_report_fits_its_terminal(memory_run, monkeypatch, columns, asked):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setitem(GPUS, "t4", dataclasses.replace(GPUS["t4"], total=4000))
    _, out, _ = memory_run("simplenet", *asked)
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out


def test_pictures_and_histories_are_written(memory_run):
    code, _, err = memory_run("simplenet", *SMALL, "--timeline", "t.png")
    assert (code, err) == (0, "")
    with Image.open("t.png") as picture:
        assert picture.width > 900
    code, _, err = memory_run("simplenet", "--conv", "unfold", *SMALL, "--snapshot", "s.pickle")
    assert (code, err) == (0, "")
    history = pickle.loads(Path("s.pickle").read_bytes())
    events = history["device_traces"][0]
    names = {frame["name"] for event in events for frame in event["frames"]}
    assert {"aten.im2col", "block2.3", "saved for backward", "optimizer state"} <= names
    assert any("predicted" in name for name in names)


def test_the_timeline_is_the_account():
    account = rehearse(Step(model="simplenet", conv="unfold", batch_size=8, image_size=32), "sm_75")
    figure = timeline({"unfold": account}, "title")
    highest = max(collection.get_paths()[0].vertices[:, 1].max() for collection in figure.axes[0].collections)
    assert highest == pytest.approx(account.peak.nbytes / MIB)
    (marker,) = (line for line in figure.axes[0].lines if line.get_marker() == "v")
    assert marker.get_xydata()[0] == pytest.approx([account.peak.index - account.start, account.peak.nbytes / MIB])
    drawn = {
        collection.get_label(): to_hex(collection.get_facecolor()[0]) for collection in figure.axes[0].collections
    }
    assert drawn == COLOURS
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"forward", "backward", "optimizer step"} <= set(texts)
    assert any(text.startswith(f"{account.peak.nbytes / MIB:,.0f} MiB") for text in texts)


def test_measured_figures_stand_beside_predicted_ones(memory_run, monkeypatch):
    gpu = dataclasses.replace(GPUS["h100"], name="Paper GPU")
    answers = {
        "torch": {
            "source": "NVML, this process", "nbytes": 3000 * MIB, "allocated_peak": 1600 * MIB,
            "reserved_peak": 2300 * MIB, "tracked_peak": 1523 * MIB, "outside_allocator": 700 * MIB,
        },
        "unfold": {"error": "out of memory"},
    }
    monkeypatch.setattr(at_hand, "find_gpu", lambda: gpu)
    monkeypatch.setattr("bench.memory.report.conditions", lambda device: {})
    monkeypatch.setattr(measured, "measure", lambda step: answers[step.conv])
    code, out, _ = memory_run("simplenet", "--conv", "torch", "unfold", *SMALL)
    assert code == 0
    for name, figure in (
        ("measured: tracked peak", "1,523.0"), ("measured: allocated", "1,600.0"), ("measured: reserved", "2,300.0"),
        ("measured: outside of it", "700.0"), ("measured by NVML", "3,000.0"),
    ):  # fmt: skip
        assert row(out, name) == [figure, "out", "of", "memory"]
    assert "Measured on Paper GPU: NVML, this process." in " ".join(out.split())


def test_predict_measures_nothing(memory_run, monkeypatch):
    monkeypatch.setattr(at_hand, "find_gpu", lambda: pytest.fail("looked for a GPU"))
    code, out, _ = memory_run("simplenet", *SMALL, "--predict")
    assert code == 0
    assert "Nothing is measured: --predict." in out


def test_live_follows_real_steps(memory_run):
    code, out, err = memory_run(
        "simplenet", "--conv", "torch", *SMALL, "--live", "--steps", 3, "--json", "live.json"
    )
    assert (code, err) == (0, "")
    seen = json.loads(Path("live.json").read_text())
    step = Step(model="simplenet", conv="torch", batch_size=8, image_size=32)
    peak = rehearse(step, "cpu").peak.nbytes
    assert seen["peak"] == peak
    assert seen["witness"] == "resident set, CPU"
    assert list(seen["phases"]) == ["forward", "backward", "optimizer step"]
    assert set(seen["recording"]["phases"]) == {"set-up", "forward", "backward", "optimizer step", "rest"}
    assert seen["recording"]["phases"]["backward"]["stretches"] == 3
    assert out.count("\nstep ") + out.startswith("step ") == 3
    assert row(out, "backward")[0] == shown(peak)
    assert "on CPU" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["model"], id="no-model"),
        pytest.param(["alexnet"], ["alexnet", "simplenet"], id="unknown-model"),
        pytest.param(["simplenet", "--conv", "fft"], ["--conv", "fft", "triton"], id="unknown-conv"),
        pytest.param(["simplenet", "--conv"], ["--conv"], id="conv-without-value"),
        pytest.param(["simplenet", "--gpu", "voodoo"], ["--gpu", "voodoo", "t4"], id="unknown-gpu"),
        pytest.param(["simplenet", "--fits", "t4", "--gpu", "l4"], ["--fits t4", "--gpu l4"], id="two-gpus"),
        pytest.param(["simplenet", "--amp", "fp8"], ["--amp", "fp8", "bf16"], id="unknown-precision"),
        pytest.param(["simplenet", "--predict", "--live"], ["--live", "--predict"], id="predict-and-live"),
        pytest.param(["simplenet", "--live"], ["--live", "--conv"], id="live-of-all"),
        pytest.param(["simplenet", "--live", "--conv", "torch", "--fits", "t4"], ["--fits", "--live"], id="live-fits"),
        pytest.param(
            ["simplenet", "--live", "--conv", "torch", "--batch-size", str(10**9)], ["not enough memory"],
            id="live-of-too-many-images",
        ),
        pytest.param(["simplenet", "--steps", "3"], ["--steps", "--live"], id="steps-without-live"),
        pytest.param(["simplenet", "--snapshot", "s.pickle"], ["--snapshot", "--conv"], id="snapshot-of-all"),
        pytest.param(["simplenet", "--batch-size", "0"], ["--batch-size", "0"], id="zero-batch"),
        pytest.param(["simplenet", "--batch-size", "-5"], ["--batch-size", "-5"], id="negative-batch"),
        pytest.param(["simplenet", "--batch-size", "1e3"], ["--batch-size", "1e3", "whole"], id="not-a-whole-number"),
        pytest.param(["simplenet", "--batch-size", "9" * 30], ["beyond the largest number"], id="astronomic-batch"),
        pytest.param(["simplenet", "--image-size", "7"], ["--image-size", "7", "8"], id="tiny-images"),
        pytest.param(["simplenet", "--image-size", "9999999999"], ["beyond any machine"], id="astronomic-images"),
        pytest.param(["simplenet", "--json", "nowhere/m.json"], ["nowhere/m.json"], id="json-in-no-folder"),
        pytest.param(["simplenet", "--json", "."], ["--json", "."], id="json-is-a-folder"),
        pytest.param(["simplenet", "--json", "f", "--timeline", "./f"], ["f", "written over"], id="one-file-for-two"),
        pytest.param(["all", "--timeline", "t.png"], ["--timeline", "all"], id="timeline-of-all"),
        pytest.param(["simplenet", "--timeline", "nowhere/t.png"], ["--timeline"], id="timeline-in-no-folder"),
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
