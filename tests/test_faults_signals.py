"""Signals at any moment of a command: it ends soon and says so, what it leaves is whole, and it can be gone on with."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import (
    PHOTOS,
    POLITE,
    ROOT,
    SECONDS_TO_END,
    SHORT_PLAN,
    SHORT_SWEEP,
    SLOW_DECODING,
    TINY,
    cache_bytes,
    decoding,
    leftovers,
    moments,
    one_line,
    require_whole,
    run_whole,
    strike,
    trained_once,
)  # fmt: skip
from same_run import same_run

# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained() -> tuple[Path, float]:
    return trained_once()


def strike_training(server, trained, name, share, between, tmp_path):
    reference, seconds = trained
    folder = tmp_path / "run"
    running = server.start("train.run", *TINY, "--out", "run", folder=tmp_path)
    ended = strike(running, name, between, lambda: running.seconds() >= share * seconds)
    require_whole(tmp_path)
    # No epoch that was told of is lost, and of a stop by request no step.
    saved = torch.load(folder / "last.pt", weights_only=True) if (folder / "last.pt").exists() else {"epoch": 0}
    assert saved["epoch"] >= ended.out.count("\nepoch ")
    if "stopped after step" in ended.err:
        assert name in POLITE or name == "SIGINT-twice"
        with open(folder / "steps.csv", newline="") as file:
            assert saved["step"] == len(list(csv.DictReader(file)))
        assert f"stopped after step {saved['step']}," in ended.err
    again = ("--resume", "run") if (folder / "config.json").exists() else (*TINY, "--out", "run")
    run_whole(server, "train.run", *again, folder=tmp_path)
    require_whole(folder)
    same_run(reference, folder)
    assert not leftovers(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "between"), moments(3, seed=0))
def test_a_training_struck_at_some_moments_loses_nothing(server, trained, name, share, between, tmp_path):
    strike_training(server, trained, name, share, between, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "share", "between"), moments(40, seed=1))
def test_a_training_struck_at_any_moment_loses_nothing(server, trained, name, share, between, tmp_path):
    strike_training(server, trained, name, share, between, tmp_path)


@pytest.mark.parametrize("number", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (5, 9))])
def test_ctrl_c_while_it_saves_after_ctrl_c_leaves_the_files_whole(number, train_run, tmp_path, monkeypatch):
    """The second one at the number-th file that is brought to the disk after the first."""
    arguments = [*TINY[:-1], "4", "--out"]
    assert train_run(*arguments, "whole")[0] == 0
    fsync, replaced = os.fsync, itertools.count(1)

    def interrupting(fd: int) -> None:
        fsync(fd)
        if next(replaced) in (8, 8 + number):  # each saving is of three or four files
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(os, "fsync", interrupting)
        code, _, err = train_run(*arguments, "struck")
        monkeypatch.undo()
        os.chdir(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, err.count("\n")) == (2, 1)
    require_whole(tmp_path / "struck")
    assert not leftovers(tmp_path)
    assert train_run("--resume", "struck")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "struck")


@pytest.mark.soak
@pytest.mark.parametrize(
    "module",
    [
        "train.run", "bench.reproduce", "attacks.run",
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_ctrl_c_while_torch_is_imported_is_one_line(module, share, tmp_path):
    """Importing takes seconds; those that PyTorch's libraries need are the first of it."""
    arguments = ["sweep", "nowhere"] if module == "attacks.run" else ["--out", "/dev/null/run"]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(share)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS_TO_END)
    assert (process.returncode, out, err) == (2, "", f"{module}: error: interrupted\n")


# ---------------------------------------------------------------- the cache of decoded images


@pytest.mark.soak
@pytest.mark.parametrize(("name", "share", "between"), moments(30, seed=4))
def test_a_cache_whose_build_was_struck_at_any_image_ends_with_the_same_bytes(
    server, photos, cached, name, share, between, tmp_path
):
    command, log = decoding(photos), tmp_path / "log"
    running = server.start(*command, folder=tmp_path, setup=SLOW_DECODING)
    ended = strike(running, name, between, lambda: log.exists() and log.stat().st_size >= share * PHOTOS)
    assert ended.code != 0
    require_whole(tmp_path)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run_whole(server, *command, folder=tmp_path, setup=SLOW_DECODING)
    assert cache_bytes(tmp_path) == cached
    # Those that were in hand, one in each thread, are decoded again, and no other.
    assert log.stat().st_size <= PHOTOS + os.cpu_count()


# ---------------------------------------------------------------- the sweep


@pytest.fixture(scope="module")
def swept(server, trained, tmp_path_factory):
    """(what a sweep that nothing disturbed wrote, the processor's seconds it took)"""
    folder = tmp_path_factory.mktemp("swept")
    ended = run_whole(server, *sweep_of(trained), folder=folder, setup=SHORT_SWEEP)
    return folder / "out", ended.seconds


def sweep_of(trained) -> tuple[str, ...]:
    return (
        "attacks.run.command", "sweep", str(trained[0]), "--device", "cpu", "--limit", "10", "--batch-size", "1",
        "--out", "out",
    )  # fmt: skip


def report_of(folder: Path) -> dict:
    """All but the checkout's state, which may change between two sweeps."""
    return json.loads((folder / "sweep.json").read_text()) | {"commit": None}


@pytest.mark.soak
@pytest.mark.parametrize(("name", "share", "between"), moments(20, seed=2))
def test_a_sweep_struck_at_any_moment_ends_with_the_same_table(
    server, trained, swept, name, share, between, tmp_path
):
    reference, seconds = swept
    command = sweep_of(trained)
    running = server.start(*command, folder=tmp_path, setup=SHORT_SWEEP)
    strike(running, name, between, lambda: running.seconds() >= share * seconds)
    require_whole(tmp_path)
    run_whole(server, *command, folder=tmp_path, setup=SHORT_SWEEP)
    require_whole(tmp_path)
    assert (tmp_path / "out/sweep.csv").read_bytes() == (reference / "sweep.csv").read_bytes()
    assert report_of(tmp_path / "out") == report_of(reference)
    assert not (tmp_path / "out/sweep.part.json").exists()


# ---------------------------------------------------------------- the reproduction


REPRODUCE = ("bench.reproduce.command", "--quick", "--device", "cpu", "--out", "out")


@pytest.mark.soak
@pytest.mark.parametrize(("name", "share", "between"), moments(15, seed=3))
def test_a_reproduction_struck_at_any_moment_goes_on(server, name, share, between, tmp_path):
    running = server.start(*REPRODUCE, folder=tmp_path, setup=SHORT_PLAN)
    # Before each of the five stages, in it or after the last; what one writes comes soon after its beginning.
    strike(running, name, between, lambda: running.said()[0].count(" ...") >= round(5 * share))
    require_whole(tmp_path)
    done = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("out/stages/*.json"))]
    run_whole(server, *REPRODUCE, folder=tmp_path, setup=SHORT_PLAN)
    require_whole(tmp_path)
    after = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("out/stages/*.json"))]
    assert [outcome["reason"] for outcome in after] == [None] * 5
    for before, later in zip(done, after, strict=False):
        assert before["reason"] is not None or before == later  # what had ended well was not run again
    assert "stage 4" in (tmp_path / "out/REPORT.md").read_text()


@pytest.mark.slow
def test_ctrl_c_while_a_stage_is_forked_is_not_lost(server, tmp_path):
    """Python ignores what is raised by its own functions around a fork, logging's among them."""
    struck = """
import itertools

forks = itertools.count()
os.register_at_fork(after_in_parent=lambda: next(forks) == 2 and signal.raise_signal(signal.SIGINT))
"""
    told = one_line(server.run(*REPRODUCE, folder=tmp_path, setup=SHORT_PLAN + struck))
    assert told == "interrupted; the same command goes on in out"
    outcomes = [json.loads(file.read_text())["reason"] for file in sorted(tmp_path.glob("out/stages/*.json"))]
    assert outcomes == [None, None, "it was interrupted"]
