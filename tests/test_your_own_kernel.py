"""docs/your-own-kernel.md does what it says: its files, its edits, its commands and the outputs it shows."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import own_kernel
import pytest
import torch
from own_kernel import KERNEL, ROOT, TEST, edited, function_of, source
from reference import assert_matches

import attacks.run.command
import bench.memory.command
import bench.report_card.command
import train.evaluate
import train.run
from kernels import runtime

FOLDERS = ("kernels", "models", "train", "attacks", "bench", "tests")
PARSERS = {
    "attacks.run": attacks.run.command.make_parser,
    "bench.memory": bench.memory.command.make_parser,
    "bench.report_card": bench.report_card.command.make_parser,
    "train.evaluate": train.evaluate.make_parser,
    "train.run": train.run.make_parser,
}
EDITS = [block.text for block in own_kernel.blocks() if block.language == "diff"]
STEM = dict(x_shape=(2, 3, 9, 8), w_shape=(8, 3, 3, 2), stride=2, padding=1)


def page_kernel(edits: int) -> str:
    """The page's file after so many of its edits."""
    text = source(KERNEL)
    for diff in EDITS[:edits]:
        text = edited(text, diff)
    return text


@pytest.fixture
def put(tmp_path, monkeypatch):
    """put(text) -> the Conv2d of that text as kernels/variants/mine.py, until the test ends."""
    return lambda text: own_kernel.install("mine", text, tmp_path, monkeypatch)


@pytest.mark.parametrize("edits", range(len(EDITS) + 1))
def test_the_kernel_is_right_before_and_after_each_edit(put, edits):
    assert_matches(function_of(put(page_kernel(edits))), dtype=torch.float64, **STEM)


@pytest.mark.parametrize(("right", "wrong"), [(" & (w < W)", ""), ("// K_BLOCKS % S", "// K_BLOCKS % R")])
def test_what_the_page_says_that_tests_notice_they_notice(put, right, wrong):
    assert right in source(KERNEL)
    conv2d = function_of(put(source(KERNEL).replace(right, wrong)))
    with pytest.raises(AssertionError, match="is off by"):
        assert_matches(conv2d, dtype=torch.float64, **STEM)


def test_the_second_edit_gives_the_first_tile_back_where_there_are_no_tensor_cores(put):
    half, single = torch.float16, torch.float32
    tiles = []
    for edits in range(len(EDITS) + 1):
        put(page_kernel(edits))
        tiles.append([
            tuple(launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")
            for arch, dtype in (("sm_75", half), ("sm_80", half), ("sm_80", single))
            for launch in runtime.launches_ahead("mine", (4, 64, 8, 8), (64, 64, 3, 3), arch=arch, dtype=dtype)
        ])
    first, wide = (32, 64, 16), (64, 64, 32)
    assert tiles == [[first] * 3, [wide] * 3, [first, wide, first]]


def test_every_command_is_one(put):
    put(source(KERNEL))
    makefile = (ROOT / "Makefile").read_text()
    found = own_kernel.commands()
    assert len(found) > 10
    for command in found:
        program, *arguments = shlex.split(command)
        if program == "python":
            PARSERS[arguments[1]]().parse_args(arguments[2:])  # exits where it does not parse
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        elif program == "rm":
            assert set(arguments) == {KERNEL, TEST}
        elif program == "pytest":
            assert arguments[0] == TEST or (ROOT / arguments[0]).is_dir()
        else:
            assert command == ". .venv/bin/activate"


# The page as its reader follows it, in a copy of the repository. Each of these takes processes that import PyTorch.


@pytest.fixture
def lab(tmp_path) -> Path:
    """A copy of the repository with the page's two files."""
    root = tmp_path / "lab"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "pyproject.toml", root)
    for file in (KERNEL, TEST):
        (root / file).write_text(source(file))
    return root


def run(lab: Path, command: str, *, code: int = 0) -> str:
    """What a command of the page prints, in a terminal of 80 columns."""
    program, *arguments = shlex.split(command)
    words = [sys.executable, *(["-m", "pytest"] if program == "pytest" else []), *arguments]
    # These tests may themselves run on workers of pytest-xdist, where pytest-benchmark measures nothing.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = ours | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=lab, env=environment, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def one_command(pattern: str, index: int = 0) -> str:
    """That of the page's commands which match, in order."""
    return [command for command in own_kernel.commands() if re.search(pattern, command)][index]


def shown_after(command: str, index: int = 0) -> list[str]:
    """Lines of the output that the page shows after a command, without those that are empty."""
    every = own_kernel.blocks()
    places = [i for i, block in enumerate(every) if block.language == "sh" and command in block.text.splitlines()]
    return [line for line in every[places[index] + 1].text.splitlines() if line.strip()]


def change(lab: Path, edits: int) -> None:
    (lab / KERNEL).write_text(page_kernel(edits))


@pytest.mark.slow
def test_the_pages_test_passes(lab):
    (passed,) = shown_after(one_command(f"pytest {TEST}"))
    assert passed in run(lab, one_command(f"pytest {TEST}"))


@pytest.mark.slow
def test_the_report_cards_are_those_shown(lab):
    before, after = one_command("report_card .*--json"), one_command("report_card .*--against")
    first = run(lab, before).splitlines()
    for line in shown_after(before):
        assert line in map(str.rstrip, first)
    change(lab, 1)
    second = run(lab, after).splitlines()
    for line in shown_after(after):
        assert line in map(str.rstrip, second)
    compiles = one_command("pytest .*compiles")
    (failed,) = shown_after(compiles)
    assert failed in run(lab, compiles, code=1)
    change(lab, 2)
    alone = run(lab, after.replace("sm_75 sm_80 sm_90 --against before.json", "sm_80 --json after.json"))
    (loop,) = (block.text for block in own_kernel.blocks() if block.text.startswith("  main loop"))
    assert [line.rstrip() for line in loop.splitlines()] == [
        line.rstrip() for line in alone.splitlines() if line.rstrip() in loop.splitlines()
    ]
    (row,) = json.loads((lab / "after.json").read_text())["rows"]
    assert row["spills"] == 0
    assert "12 passed" in run(lab, compiles)


@pytest.mark.slow
def test_it_is_tried_timed_and_benched(lab):
    (snippet,) = (block.text for block in own_kernel.blocks() if block.mark == "run")
    printed = subprocess.run([sys.executable, "-c", snippet], cwd=lab, capture_output=True, text=True, check=True)
    assert printed.stdout in [block.text for block in own_kernel.blocks() if block.language == "text"]
    told = run(lab, one_command("pytest bench"))
    assert "mine interpreter" in told
    assert "says nothing about a GPU" in told


@pytest.mark.slow
def test_it_trains_as_pytorch_does_and_goes_without_a_trace(lab):
    training = one_command("train.run").replace("--limit-train 512 --limit-val 128", "--limit-train 128 --limit-val 16")
    assert "interpreted on the CPU" in run(lab, training)
    run(lab, training.replace("--conv mine", "--conv torch").replace("runs/mine", "runs/torch"))
    losses = []
    for conv in ("mine", "torch"):
        with open(lab / "runs" / conv / "steps.csv", newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) > 1
    assert "interpreted" in run(lab, one_command("train.evaluate"))
    for file in (KERNEL, TEST):
        (lab / file).unlink()
    assert "there is no kernels/variants/mine.py" in run(lab, one_command("train.evaluate"), code=2)
    assert "top-1" in run(lab, one_command("train.evaluate.*--conv triton"))
