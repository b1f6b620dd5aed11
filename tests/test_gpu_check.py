"""The gpu-check command, its parts faked: what is run, what is kept of what fails, and what its user is told."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.gpu_check import command, parts
from bench.gpu_check.console import print_summary
from bench.gpu_check.memory import FIGURES
from bench.gpu_check.operations import OPS
from bench.gpu_check.steps import CONTENDERS
from bench.measure.predict import MIB
from train.rehearsal import CONVOLUTIONS

ROOT = Path(__file__).resolve().parent.parent
CONDITIONS = {"device": "NVIDIA H100", "versions": {"torch": "2.14.1", "triton": "3.8.0"}, "commit": None}


def part(name: str, script: str, **changes) -> parts.Part:
    """A part that is a shell script."""
    fake = parts.Part(
        name=name, title=f"the {name}", limit=30, quick_limit=30, read=lambda folder: None,
        command=lambda folder, quick: ["sh", "-c", script],
    )  # fmt: skip
    return replace(fake, **changes)


@pytest.fixture
def check(monkeypatch, run_main, tmp_path):
    """check([part, ...], "--quick") -> (exit code, stdout, stderr, report), as on a machine with a GPU."""
    monkeypatch.setattr(command, "why_no_gpu", lambda: None)
    monkeypatch.setattr(command, "conditions", lambda device: dict(CONDITIONS))
    monkeypatch.setattr(command, "gpu_state", lambda device: {"sm_mhz": 1980})
    monkeypatch.setattr(command, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def run(faked: list[parts.Part], *arguments: object):
        monkeypatch.setattr(parts, "PARTS", tuple(faked))
        code, out, err = run_main(command.main, "--out", "report.json", *arguments)
        file = tmp_path / "report.json"
        return code, out, err, json.loads(file.read_text()) if file.exists() else None

    return run


def test_without_a_gpu_it_is_one_line():
    process = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--quick"], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("bench.gpu_check: error: gpu-check needs a CUDA GPU; none is visible (")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("cuda", "visible", "words"),
    [(None, None, "built without CUDA"), ("13.0", "", "CUDA_VISIBLE_DEVICES is ''"), ("13.0", None, "driver")],
)
def test_why_there_is_no_gpu_is_told(cuda, visible, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert words in command.why_no_gpu()


def test_help_fits_80_columns():
    process = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--help"], cwd=ROOT, env=os.environ | {"COLUMNS": "80"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert max(map(len, process.stdout.splitlines())) <= 80
    for name in ("tests", "tiles", "tuning", "timing", "memory", "sanitizer", "calibration"):
        assert name in process.stdout


def test_all_passed(check):
    code, out, _, report = check([part("first", "exit 0"), part("second", "exit 0")])
    assert code == 0
    assert [outcome["status"] for outcome in report["parts"].values()] == ["passed", "passed"]
    assert report["conditions"]["device"] == "NVIDIA H100"
    assert report["begun"] <= report["ended"]
    for outcome in report["parts"].values():
        assert {"command", "seconds", "limit_s", "gpu_after"} <= set(outcome)
    assert "the first: passed" in out
    assert "report: report.json" in out


def test_a_part_that_fails_is_recorded_with_its_output_and_the_others_go_on(check):
    code, out, _, report = check([part("first", "echo one; echo 'it [broke]' >&2; exit 3"), part("second", "exit 0")])
    assert code == 1
    first = report["parts"]["first"]
    assert (first["status"], first["exit_code"], first["reason"]) == ("failed", 3, "it [broke]")
    assert first["output"] == ["one", "it [broke]"]
    assert report["parts"]["second"]["status"] == "passed"
    assert "the first: failed" in out
    assert "it [broke]" in out


def test_the_report_is_written_after_each_part(check, tmp_path):
    file = tmp_path / "report.json"
    code, _, _, report = check([part("first", "exit 1"), part("second", f"cp {file} {tmp_path / 'meanwhile.json'}")])
    assert code == 1
    meanwhile = json.loads((tmp_path / "meanwhile.json").read_text())
    assert list(meanwhile["parts"]) == ["first"]
    assert list(report["parts"]) == ["first", "second"]


def test_a_part_that_hangs_is_ended_with_all_its_processes_and_what_it_found_is_kept(check, tmp_path):
    rows, pid = tmp_path / "rows.jsonl", tmp_path / "pid"
    script = f"""echo '{{"op": 1}}' >> {rows}; printf '{{"op"' >> {rows}; sleep 60 & echo $! > {pid}; wait"""
    hangs = part("first", script, limit=1, read=lambda folder: parts.read_rows(rows))
    code, _, _, report = check([hangs, part("second", "exit 0")])
    assert code == 1
    first = report["parts"]["first"]
    assert first["status"] == "timed out"
    assert first["found"] == [{"op": 1}]
    assert first["seconds"] < 20
    assert report["parts"]["second"]["status"] == "passed"
    stat = Path("/proc", pid.read_text().strip(), "stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process of the part lives on")


def test_an_interrupted_run_keeps_what_was_done(check):
    code, _, err, report = check([part("first", "exit 0"), part("second", "kill -INT $PPID; sleep 30"), part("x", "")])
    assert code == 2
    assert err == "bench.gpu_check: error: interrupted\n"
    assert {name: outcome["status"] for name, outcome in report["parts"].items()} == {
        "first": "passed", "second": "interrupted",
    }  # fmt: skip


def test_what_is_not_installed_is_told_and_is_no_failure(check):
    missing = part("first", "exit 1", quick_limit=0, missing=lambda folder, quick: "no tool")
    code, out, _, report = check([missing, part("second", "exit 0")], "--quick")
    assert code == 0
    assert report["parts"]["first"] == {"status": "not run", "reason": "no tool", "gpu_after": {"sm_mhz": 1980}}
    assert "no tool" in out


def test_a_quick_run_ends_in_time_and_a_part_it_left_out_is_a_failure(check, monkeypatch):
    monkeypatch.setattr(command, "QUICK_SECONDS", 11)
    code, _, _, report = check([part("first", "sleep 2"), part("second", "exit 0")], "--quick")
    assert code == 1
    assert report["parts"]["first"]["status"] == "passed"
    assert report["parts"]["first"]["limit_s"] == pytest.approx(11, abs=0.1)
    assert report["parts"]["second"]["reason"] == "the 11 s of --quick were used up before it"
    assert report["parts"]["second"]["status"] == "timed out"


def test_parts_may_be_chosen(check):
    _, _, _, report = check([part("first", "exit 1"), part("second", "exit 0")], "--parts", "second")
    assert list(report["parts"]) == ["second"]


@pytest.mark.parametrize("out", ["", "missing/report.json"])
def test_a_report_that_cannot_be_written_is_one_line_before_anything_runs(check, tmp_path, out):
    ran = tmp_path / "ran"
    code, _, err, _ = check([part("first", f"touch {ran}")], "--out", tmp_path / out)
    assert code == 2
    assert err.count("\n") == 1
    assert not ran.exists()


# --- the parts ----------------------------------------------------------------------------------------------------

TESTS = """
import pytest
def test_right(): pass
@pytest.mark.skip("no such thing")
def test_skipped(): pass
def test_wrong(): assert 1 == 2, "two\\nlines"
@pytest.fixture
def broken(): raise ValueError("at set-up")
def test_set_up(broken): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_every_test_is_recorded_as_it_ends(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_this_name")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider",
         "-p", "bench.gpu_check.recorder", "--lines", tmp_path / "lines", "--continue-on-collection-errors", *workers,
         tmp_path / "test_some.py", tmp_path / "test_unreadable.py"],
        cwd=ROOT, capture_output=True, check=False, timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )  # fmt: skip
    found = parts.read_tests(tmp_path / "lines")
    assert {name: found[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 3, "skipped": 1}
    why = {failure["test"].split("::")[-1].split("/")[-1]: failure["why"] for failure in found["failures"]}
    assert why["test_wrong"].startswith("AssertionError: two lines")
    assert "at set-up" in why["test_set_up"]
    assert "nothing_of_this_name" in why["test_unreadable.py"]
    assert found["skips"] == {"no such thing": 1}


def test_the_convolutions_tests_run_on_the_device_and_tiles_apart():
    files = parts.test_files()
    assert {f"tests/test_{name}.py" for name in ("conv2d", "modes", "random_geometry", "swap", "unfold")} <= set(files)
    assert parts.TILE_TESTS not in files
    assert (ROOT / parts.TILE_TESTS).exists()


def test_pytest_goes_without_xdist(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert "-n 8" in " ".join(parts.tests_command(tmp_path, True))
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in parts.tests_command(tmp_path, True)


def test_the_sanitizer_is_found_outside_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    assert parts.no_sanitizer(tmp_path, False) == "compute-sanitizer is not installed"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert str(tool) in parts.sanitizer_command(tmp_path, True)


def test_tables_fit_80_columns():
    tile = {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 4, "parts": 2}
    rows, chosen = [], []
    for name in ("conv7x7-64", "conv1x1-512"):
        for dtype, precision in (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee")):
            for op in OPS:
                row = {"layer": name, "op": op, "dtype": dtype, "precision": precision}
                rows.append(row | {"seconds": 0.0123456, "native_seconds": 0.001, "ratio": 12.3456})
                chosen.append(row | {
                    "trials": [{}] * 12, "tile": tile, "first_seconds": 0.0123456, "best_seconds": 0.00123,
                    "first_over_best": 10.04,
                })  # fmt: skip
    chosen[1] = {name: chosen[1][name] for name in ("layer", "op", "dtype", "precision")} | {"error": "x"}
    chosen[2] = {name: chosen[2][name] for name in ("layer", "op", "dtype", "precision", "tile")}
    rows[3] = {name: rows[3][name] for name in ("layer", "op", "dtype", "precision")} | {"error": "x"}
    types = [("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee")]
    fused = [
        {"chain": name, "layer": layer, "dtype": dtype, "precision": precision, "seconds": 0.0123456, "ratio": 12.3456,
         "ratio_to_unfused": 10.123}
        for name in ("conv_relu", "conv_relu_grad", "bias_grad", "relu_max_pool_grad")
        for layer in ("conv7x7-64", "pool3x3-256")
        for dtype, precision in types
    ]  # fmt: skip
    fused[1] = {name: fused[1][name] for name in ("chain", "layer", "dtype", "precision")} | {"error": "x"}
    trained = [
        {"step": model, "kind": "fp32", "seconds": dict.fromkeys(CONTENDERS, 0.123456), "n": 40,
         "ratio": dict.fromkeys(CONTENDERS, 12.3456)}
        for model in ("simplenet", "resnet18")
    ]  # fmt: skip
    trained[1] = {"step": "resnet18", "kind": "fp32", "error": "x"}
    taken = [
        {"model": model, "conv": conv, "memory": dict.fromkeys(FIGURES, 80_000 * MIB),
         "as_predicted": dict.fromkeys(FIGURES, True) | {"allocated": False}, "ratio": dict.fromkeys(FIGURES, 1.234)}
        for model in ("simplenet", "customnet") for conv in CONVOLUTIONS
    ]  # fmt: skip
    taken[1] = {"model": "simplenet", "conv": "unfold", "error": "out of memory"}
    report = {
        "conditions": CONDITIONS | {"arch": "sm_90"},
        "parts": {
            "tuning": {"found": [{"ahead": {}}, *chosen]}, "timing": {"found": [*rows, *fused, *trained]},
            "memory": {"found": [{"ahead": {}}, *taken]},
        },
    }  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    print_summary(console, report, Path("report.json"))
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "12.35" in text
    assert "128x128x64*2 (8, 4)" in text
    assert "failed" in text
    assert "as predicted: live 7 of 7, allocated 0 of 7, reserved 7 of 7, nvml 7 of 7" in text
    assert "80000" in text
    assert "12346" in text
