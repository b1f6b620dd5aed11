"""Disks that are full, read-only or gone, for real: one line that names the file, nothing lost, nothing left behind."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from faults import (
    SHORT_PLAN,
    SHORT_SWEEP,
    STUCK,
    TINY,
    Disk,
    Server,
    leftovers,
    one_line,
    require_whole,
    run_whole,
    small_disk,
    trained_once,
)  # fmt: skip
from same_run import same_run

import train.files
import train.profiling
import train.records
import train.session
from bench.memory import command as memory
from bench.report_card import command as report_card

QUICK = (*TINY, "--epochs", "2")
ONE_ROW = ("--shape", "2,3,8,8,4,3,3", "--arch", "sm_80", "--op", "forward")
NEEDED = 8700  # KiB that a training takes at most; a little less is too little


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", mib=16) as disk:
        yield disk


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained() -> Path:
    """The folder of a run that nothing disturbed."""
    return trained_once()[0]


def fill_training(server: Server, trained: Path, disk: Disk, kib: int) -> None:
    folder = disk.path / "run"
    disk.leave(kib)
    told = one_line(server.run("train.run", *TINY, "--out", folder, folder=disk.path))
    assert told.startswith(str(folder)), told
    assert told.endswith("No space left on device"), told
    assert ".tmp" not in told
    require_whole(disk.path)
    assert not leftovers(disk.path)
    disk.free()
    begun = (folder / "config.json").exists()
    assert begun == (folder / "last.pt").exists() == folder.exists()  # what can be gone on with, or nothing
    run_whole(server, "train.run", *(("--resume", folder) if begun else (*TINY, "--out", folder)), folder=disk.path)
    same_run(trained, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [0, 2600, NEEDED - 100])
def test_a_training_goes_on_after_the_disk_was_full(kib, server, trained, disk):
    fill_training(server, trained, disk, kib)


@pytest.mark.soak
@pytest.mark.parametrize("kib", [*range(0, 32, 4), *range(1200, 1300, 20), *range(1300, NEEDED, 400)])
def test_a_training_goes_on_after_the_disk_was_full_at_any_file(kib, server, trained, disk):
    fill_training(server, trained, disk, kib)


@pytest.mark.parametrize(
    ("module", "name", "told", "kib"),
    [
        pytest.param(train.session, "draw_curves", "curves.png", 40, id="curves"),
        pytest.param(train.session, "write_json", "summary.json", 0, id="summary", marks=pytest.mark.slow),
        pytest.param(
            train.records, "append_events", "events.out.tfevents", 0, id="events", marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_written_last_costs_no_training(module, name, told, kib, train_run, disk, monkeypatch):
    write, folder = getattr(module, name), disk.path / "run"

    def on_a_full_disk(*arguments: object) -> None:
        if not disk.ballast.exists():
            disk.leave(kib)
        write(*arguments)

    monkeypatch.setattr(module, name, on_a_full_disk)
    code, _, err = train_run(*QUICK, "--out", folder)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"train.run: error: {folder / told}")
    assert err.endswith(": No space left on device\n")
    monkeypatch.setattr(module, name, write)
    require_whole(disk.path)
    assert not leftovers(disk.path)
    disk.free()
    assert train_run("--resume", folder)[0] == 0
    assert train_run(*QUICK, "--out", "whole")[0] == 0
    same_run(Path("whole"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [0, 150, *(pytest.param(kib, marks=pytest.mark.soak) for kib in range(16, 200, 16))])
def test_a_profile_that_does_not_fit_is_told_and_not_left_half_written(kib, train_run, disk, monkeypatch):
    write, folder = train.profiling.Profiler._write, disk.path / "run"

    def on_a_full_disk(profiler: train.profiling.Profiler) -> None:
        disk.leave(kib)
        write(profiler)

    monkeypatch.setattr(train.profiling.Profiler, "_write", on_a_full_disk)
    code, _, err = train_run(*QUICK, "--profile", 2, "--out", folder)
    assert (code, err.count("\n")) == (2, 1), err
    names = {0: ["profile.txt"], 150: ["trace.json"]}.get(kib, ["profile.txt", "trace.json"])
    assert any(err.startswith(f"train.run: error: {folder / name}: ") for name in names), err
    require_whole(disk.path)
    assert not leftovers(disk.path)
    disk.free()
    assert train_run("--resume", folder)[0] == 0


@pytest.mark.slow
def test_a_folder_removed_while_it_is_trained_in_is_one_line(server, tmp_path):
    folder = tmp_path / "run"
    command = server.start("train.run", *TINY, "--epochs", "1000", "--out", folder, folder=tmp_path)
    deadline = time.monotonic() + STUCK
    while "epoch 2/" not in command.said()[0]:
        assert time.monotonic() < deadline, command.said()
        time.sleep(0.01)
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    told = one_line(command.end())
    assert told.startswith(f"{folder}/"), told
    assert told.endswith("No such file or directory"), told
    assert not folder.exists()


# ---------------------------------------------------------------- places where nothing can be written


def read_only(disk: Disk) -> None:
    disk.read_only()


def a_file(disk: Disk) -> None:
    (disk.path / "run").touch()


def below_a_file(disk: Disk) -> None:
    (disk.path / "run").symlink_to("ballast/run")
    disk.ballast.touch()


def a_link_to_nowhere(disk: Disk) -> None:
    (disk.path / "run").symlink_to("nowhere")


@pytest.mark.parametrize("harm", [read_only, a_file, below_a_file, a_link_to_nowhere])
@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_trained(harm, flag, train_run, make_images, disk):
    photos = make_images(Path("photos").absolute(), {"cat": 6, "dog": 6})
    harm(disk)
    places = {"--out": Path("run").absolute(), "--cache": Path("cache").absolute()} | {flag: disk.path / "run"}
    before = sorted(disk.path.iterdir())
    code, out, err = train_run(
        *QUICK, "--data", photos, "--image-size", "16", *(one for pair in places.items() for one in pair)
    )
    assert (code, err.count("\n")) == (2, 1), err
    assert str(disk.path / "run") in err
    assert "epoch 1/" not in out
    assert sorted(disk.path.iterdir()) == before
    assert not Path("run").exists()


def test_a_complete_run_is_shown_from_a_read_only_disk(train_run, disk):
    assert train_run(*QUICK, "--out", disk.path / "run")[0] == 0
    disk.read_only()
    code, out, err = train_run("--resume", disk.path / "run")
    assert (code, err) == (0, "")
    assert "is complete" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("train.run", *QUICK),
        pytest.param(("bench.memory.command", "simplenet", "--conv", "torch", "--predict"), marks=pytest.mark.soak),
        pytest.param(("bench.report_card.command", *ONE_ROW), marks=pytest.mark.soak),
    ],
    ids=lambda command: command[0],
)
def test_a_full_stdout_is_one_line(command, server, tmp_path):
    ended = server.run(*command, folder=tmp_path, out="/dev/full")
    assert one_line(ended) == "stdout: No space left on device"
    assert not list(tmp_path.glob("runs/*"))


# ---------------------------------------------------------------- the other commands


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (memory.main, ("simplenet", "--conv", "torch", "--predict")),
        (report_card.main, ONE_ROW),
    ],
    ids=["memory", "report_card"],
)
def test_a_report_that_does_not_fit_leaves_the_one_before(main, arguments, run_main, disk):
    file = disk.path / "report.json"
    assert run_main(main, *arguments, "--json", file)[0] == 0
    before = file.read_bytes()
    disk.leave(0)
    code, _, err = run_main(main, *arguments, "--json", file)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.endswith(f"error: {file}: No space left on device\n")
    assert file.read_bytes() == before
    assert not leftovers(disk.path)


@pytest.mark.soak
@pytest.mark.parametrize("kib", [0, 4, 8, 12, 16, 24, 40, 60, 80, 100, 140, 180])
def test_a_sweep_goes_on_after_the_disk_was_full(kib, server, trained, disk):
    command = ("attacks.run.command", "sweep", trained, "--device", "cpu", "--limit", "10", "--batch-size", "1")
    disk.leave(kib)
    told = one_line(server.run(*command, "--out", disk.path / "out", folder=disk.path, setup=SHORT_SWEEP))
    assert told.startswith(f"{disk.path}/out"), told
    assert told.endswith("No space left on device"), told
    require_whole(disk.path)
    assert not leftovers(disk.path)
    disk.free()
    for out in ("out", "whole"):
        run_whole(server, *command, "--out", out, folder=disk.path, setup=SHORT_SWEEP)
    tables = [(disk.path / out / "sweep.csv").read_bytes() for out in ("out", "whole")]
    assert tables[0] == tables[1]


@pytest.mark.soak
@pytest.mark.parametrize("kib", [0, 4, 8, 12, 16, 24, 32, 40])
def test_a_reproduction_goes_on_after_the_disk_was_full(kib, server, disk):
    command = ("bench.reproduce.command", "--quick", "--device", "cpu", "--out", disk.path / "out")
    disk.leave(kib)
    told = one_line(server.run(*command, folder=disk.path.parent, setup=SHORT_PLAN))
    assert told.startswith(f"{disk.path}/out"), told
    require_whole(disk.path)
    assert not leftovers(disk.path)
    disk.free()
    run_whole(server, *command, folder=disk.path.parent, setup=SHORT_PLAN)
    outcomes = [json.loads(file.read_text()) for file in (disk.path / "out/stages").glob("*.json")]
    assert [outcome["reason"] for outcome in outcomes] == [None] * 5


@pytest.mark.parametrize("kib", [0, 4, 16])
def test_a_cache_that_does_not_fit_leaves_nothing_of_it(kib, train_run, make_images, disk):
    photos = make_images(Path("photos").absolute(), {"cat": 100, "dog": 100})
    run = (*QUICK, "--data", photos, "--image-size", "16", "--cache", disk.path / "cache", "--out")
    disk.leave(kib)
    code, _, err = train_run(*run, "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"cannot keep decoded images in {disk.path / 'cache'}: No space left on device" in err
    assert not list(disk.path.rglob("*.part"))
    require_whole(disk.path)
    disk.free()
    assert train_run(*run, "run")[0] == 0


def test_an_unwritable_file_keeps_its_contents(disk):
    file = disk.path / "a.json"
    train.files.write_json(file, {"a": 1})
    disk.leave(0)
    with pytest.raises(OSError, match="No space left") as told:
        train.files.write_json(file, {"a": "b" * 5000})
    assert told.value.filename == str(file)
    assert json.loads(file.read_text()) == {"a": 1}
    assert sorted(os.listdir(disk.path)) == ["a.json", "ballast"]
