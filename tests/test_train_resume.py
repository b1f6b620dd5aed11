"""Stopping and going on: a run interrupted anywhere ends as it would have ended."""

import contextlib
import fcntl
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
from faults import small_disk
from same_run import rows, same_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.loop
from train.cli import stop_on_signal

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12  # of a tiny run: 3 epochs of 4


@contextlib.contextmanager
def stopping_after(steps: int, in_validation: bool = False):
    """A run inside the block is asked to stop when it has made that many steps."""
    name = "validate" if in_validation else "train_epoch"
    original = getattr(train.loop.Trainer, name)

    class Request:
        def __init__(self, trainer):
            self.trainer = trainer

        def __bool__(self):
            return self.trainer.step == steps

    def with_request(trainer, display, _stop, *others):
        return original(trainer, display, Request(trainer), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop.Trainer, name, with_request)
        yield


@pytest.mark.parametrize(
    ("steps", "in_validation"),
    [
        pytest.param(0, False, id="before-the-first-step", marks=pytest.mark.slow),
        pytest.param(1, False, id="in-the-first-epoch"),
        pytest.param(4, True, id="in-the-first-validation"),
        pytest.param(8, False, id="between-epochs", marks=pytest.mark.slow),
        pytest.param(11, False, id="before-the-last-step", marks=pytest.mark.slow),
        pytest.param(12, True, id="in-the-last-validation", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(steps, in_validation, train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "whole")[0] == 0
    with stopping_after(steps, in_validation):
        code, _, err = train_run(*tiny_run, "--out", "stopped")
    assert code == 2
    assert err == (
        f"train.run: error: stopped after step {steps}, saved in stopped/last.pt; "
        "go on with: python -m train.run simplenet --resume stopped\n"
    )
    assert len(rows(tmp_path / "stopped/steps.csv")) == steps
    assert train_run("simplenet", "--resume", "stopped")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["simplenet", "customnet", "simplevit"])
def test_adversarial_training_resumed_inside_an_epoch_ends_as_uninterrupted(model, train_run, tiny_run, tmp_path):
    run = (model, *tiny_run[1:], "--recipe", "modern", "--epochs", 2, "--limit-train", 48, "--adversarial")
    assert train_run(*run, "--out", "whole")[0] == 0
    for steps, arguments in ((2, (*run, "--out", "cut")), (4, ("--resume", "cut"))):
        with stopping_after(steps):
            code, _, err = train_run(*arguments)
        assert code == 2
        assert f"stopped after step {steps}" in err
    assert train_run("--resume", "cut")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(name, train_run, tiny_run, tmp_path):
    many = (*tiny_run, "--epochs", "15", "--limit-val", "10")
    assert train_run(*many, "--out", "whole")[0] == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "train.run", *many, "--out", str(tmp_path / "stopped")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(name)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert f"go on with: python -m train.run simplenet --resume {tmp_path / 'stopped'}" in err
    assert train_run("--resume", "stopped")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.fixture
def _sigint():
    """Ctrl-C has Python's own effect, even where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint")
def test_a_second_signal_has_its_usual_effect():
    usual = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_lost_terminal_is_a_request_unless_nohup_has_it_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


# A command that saves after every step, so that a kill leaves a position inside an epoch.
SAVING_OFTEN = """
import train.loop, train.run

train.loop.SAVE_EVERY = 0
train.run.main()
"""


def kill_and_resume(launcher: list[str], begin: list[str], folder: Path, kills: list[int]) -> list[int]:
    """Starts a run and SIGKILLs it once it has recorded step kills[0], resumes it up to kills[1], ..., and to its end.

    Returns the steps that last.pt held after each kill.
    """
    script = folder.parent / "saving_often.py"
    script.write_text(SAVING_OFTEN)
    held = []
    for step in [*kills, None]:
        arguments = ["--resume", str(folder)] if (folder / "config.json").exists() else [*begin, "--out", str(folder)]
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), *arguments], cwd=folder.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if step is None:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            return held
        deadline = time.monotonic() + 120
        while recorded(folder) < step:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):  # torchrun first, or it would end the others gently
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        held.append(torch.load(folder / "last.pt", weights_only=True)["step"])
    raise AssertionError


def recorded(folder: Path) -> int:
    """The steps in steps.csv, which is written just before last.pt."""
    return len(rows(folder / "steps.csv")) if (folder / "steps.csv").exists() else 0


def require_progress(held: list[int], kills: list[int], *, steps: int, steps_per_epoch: int) -> None:
    """Each kill fell after its step and before the run's end, some of them inside an epoch."""
    assert all(kill - 1 <= step < steps for kill, step in zip(kills, held, strict=True)), held
    assert any(step % steps_per_epoch for step in held), held


# Everything that has a state: AdamW, a moving average, augmentation, layers that draw (the transformer). The scaled
# loss of fp16 too, for the smallest model alone: a CPU takes its time over fp16.
STATEFUL = ("--ema", "0.9", "--recipe", "modern", "--limit-train", "64", "--limit-val", "20")


@pytest.mark.parametrize(
    ("model", "epochs", "kills"),
    [
        pytest.param("simplenet", 8, [6, 17], id="simplenet", marks=pytest.mark.slow),
        pytest.param("simplevit", 5, [5, 18], id="simplevit", marks=pytest.mark.slow),
        pytest.param("customnet", 5, [1, 7, 10, 19], id="customnet", marks=pytest.mark.soak),
    ],
)
def test_a_run_killed_again_and_again_ends_with_the_weights_of_an_uninterrupted_one(
    model, epochs, kills, train_run, tmp_path
):
    begin = [model, "--conv", "torch", "--device", "cpu", "--epochs", str(epochs), "--batch-size", "16", *STATEFUL]
    begin += ["--amp", "fp16" if model == "simplenet" else "off"]
    assert train_run(*begin, "--out", "whole")[0] == 0
    folder = tmp_path / "killed"
    require_progress(kill_and_resume([], begin, folder, kills), kills, steps=4 * epochs, steps_per_epoch=4)
    same_run(tmp_path / "whole", folder)


@pytest.mark.slow
def test_two_processes_killed_again_and_again_end_with_the_weights_of_uninterrupted_ones(tmp_path):
    begin = ["simplevit", "--conv", "torch", "--device", "cpu", "--epochs", "4", "--batch-size", "16", *STATEFUL]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    kills = [3, 14]
    kill_and_resume(launcher, begin, tmp_path / "whole", [])
    held = kill_and_resume(launcher, begin, tmp_path / "killed", kills)
    require_progress(held, kills, steps=16, steps_per_epoch=4)
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "tables",
    [*(pytest.param(few, marks=pytest.mark.slow) for few in ((), ("steps.csv",))), ("steps.csv", "metrics.csv")],
    ids=str,
)
def test_a_run_killed_before_its_first_checkpoint_starts_from_its_settings(tables, train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "whole")[0] == 0
    (tmp_path / "early").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "early")
    for name in tables:
        header, *_ = (tmp_path / "whole" / name).read_text().splitlines(keepends=True)
        (tmp_path / "early" / name).write_text(header)
    assert train_run("--resume", "early")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "early")


def test_two_processes_do_not_train_in_one_folder(stopped, train_run):
    with open(stopped / "config.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = train_run("--resume", stopped)
    assert (code, err) == (2, f"train.run: error: another process is training in {stopped}\n")


def test_images_exchanged_between_the_two_halves_of_a_run_are_noticed(make_images, train_run, tmp_path):
    data = make_images(tmp_path / "d", {"cat": 12, "dog": 12})
    with stopping_after(2):
        run = ("simplenet", "--conv", "torch", "--device", "cpu", "--data", "d", "--image-size", "16", "--epochs", "2")
        assert train_run(*run, "--batch-size", "4", "--out", "run")[0] == 2
    shutil.copy(data / "cat/003.jpg", data / "cat/004.jpg")
    code, _, err = train_run("--resume", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert f"the images of {data} are not those that run/last.pt was trained on" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "customnet"}, "holds a customnet, not a simplenet"),
        ({"classes": ["a", "b"]}, "has 2 classes, the data 10"),
        ({"classes": list("abcdefghij")}, "class 0 of"),
    ],
)
@pytest.mark.parametrize("flag", ["--resume", "--init"])
def test_a_checkpoint_of_another_model_or_other_classes_is_refused_by_name(
    flag, change, words, stopped, train_run, tiny_run
):
    path = stopped / "last.pt"
    saved = torch.load(path, weights_only=True)
    if "model" in change and flag == "--init":
        saved["settings"]["model"] = change["model"]
    elif "model" in change:  # a run's folder into which a checkpoint of another was copied
        saved["settings"]["model"] = change["model"]
        words = "of other settings"
    else:
        saved |= change
    torch.save(saved, path)
    arguments = ("--resume", stopped) if flag == "--resume" else (*tiny_run, "--init", path, "--out", "new")
    code, _, err = train_run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_init_starts_from_the_weights_of_a_checkpoint(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "first")[0] == 0
    with stopping_after(0):
        assert train_run(*tiny_run, "--seed", "7", "--init", "first/best.pt", "--out", "second")[0] == 2
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("first/best.pt", "second/last.pt"))
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name], value), name


@pytest.fixture
def stopped(train_run, tiny_run, tmp_path):
    """The folder of a run stopped after step 6."""
    with stopping_after(6):
        assert train_run(*tiny_run, "--out", "stopped")[0] == 2
    return tmp_path / "stopped"


def test_temporary_files_of_a_killed_run_are_gone_when_it_goes_on(stopped, train_run):
    (stopped / ".last.pt.1234.tmp").write_bytes(b"half a checkp")
    assert train_run("--resume", stopped)[0] == 0
    assert not list(stopped.glob(".*"))


def test_a_full_disk_shows_itself_before_a_step_is_made(stopped, train_run, tmp_path):
    with small_disk(tmp_path / "disk", mib=32) as disk:
        folder = shutil.copytree(stopped, disk.path / "run")
        disk.leave(0)
        code, out, err = train_run("--resume", folder)
        assert (code, err.count("\n")) == (2, 1)
        assert err.endswith("No space left on device\n")
        assert "going on after step" not in out


def test_rows_beyond_the_checkpoint_are_dropped(stopped, train_run):
    """As after a kill between the writing of the tables and of last.pt."""
    with open(stopped / "steps.csv", "a") as file:
        file.write("7,0.1,99\n8,0.1,99\n")
    with open(stopped / "metrics.csv", "a") as file:
        file.write("2,0.1,9,9,9,9,9,9,9,9,9,9,,\n")
    assert train_run("--resume", stopped)[0] == 0
    steps, epochs = rows(stopped / "steps.csv"), rows(stopped / "metrics.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, STEPS + 1))
    assert all(float(row["loss"]) < 90 for row in steps)
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    assert float(epochs[1]["val_loss"]) != 9
    events = EventAccumulator(str(stopped)).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, STEPS + 1))


def test_events_cut_short_by_a_kill_hide_none_that_follow(stopped, train_run):
    (events,) = stopped.glob("events.*")
    with open(events, "r+b") as file:
        file.truncate(events.stat().st_size - 7)
    assert train_run("--resume", stopped)[0] == 0
    steps = [event.step for event in EventAccumulator(str(stopped)).Reload().Scalars("step/loss")]
    assert steps[-6:] == list(range(STEPS - 5, STEPS + 1))


def test_weights_that_a_run_began_from_are_not_needed_to_go_on(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "first")[0] == 0
    with stopping_after(6):
        assert train_run(*tiny_run, "--init", "first", "--out", "second")[0] == 2
    shutil.rmtree(tmp_path / "first")
    assert train_run("--resume", "second")[0] == 0


def test_images_that_have_moved_are_named_anew(make_images, train_run, tmp_path):
    data = make_images(tmp_path / "d", {"cat": 12, "dog": 12})
    run = ("simplenet", "--conv", "torch", "--device", "cpu", "--data", "d", "--image-size", "16", "--epochs", "2")
    for name in ("whole", "moved"):
        with stopping_after(2) if name == "moved" else contextlib.nullcontext():
            train_run(*run, "--batch-size", "4", "--out", name)
    data.rename(tmp_path / "elsewhere")
    assert train_run("--resume", "moved")[0] == 2
    with stopping_after(5):
        assert train_run("--resume", "moved", "--data", "elsewhere", "--cache", "kept")[0] == 2
    assert train_run("--resume", "moved", "--data", "elsewhere")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "moved")


def test_a_run_that_died_after_its_last_step_gets_its_summary(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "run")[0] == 0
    whole = json.loads((tmp_path / "run/summary.json").read_text())
    for name in ("summary.json", "curves.png"):
        (tmp_path / "run" / name).unlink()
    assert train_run("--resume", "run")[0] == 0
    again = json.loads((tmp_path / "run/summary.json").read_text())
    unchanged = ("epochs", "val_top1", "val_top5", "best_val_top1", "best_epoch", "images_per_s")
    assert {name: again[name] for name in unchanged} == {name: whole[name] for name in unchanged}
    assert (tmp_path / "run/curves.png").exists()


def test_a_complete_run_is_shown_and_left_alone(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "run")[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    code, out, _ = train_run("--resume", "run")
    assert code == 0
    assert "is complete" in out
    assert "val top-1" in out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def remove_checkpoint(folder):
    (folder / "last.pt").unlink()


def truncate_checkpoint(folder):
    contents = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(contents[: len(contents) // 2])


def replace_by_text(folder):
    (folder / "last.pt").write_text("hello")


def replace_by_other_tensors(folder):
    torch.save({"weight": torch.zeros(2)}, folder / "last.pt")


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conv": "unfold"}))


def truncate_config(folder):
    (folder / "config.json").write_text("{")


def rename_setting(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"flavour": "sweet"}))


def remove_everything(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (remove_checkpoint, "no checkpoint"),
        (truncate_checkpoint, "last.pt is damaged"),
        (replace_by_text, "last.pt is damaged"),
        (replace_by_other_tensors, "not a checkpoint of this version"),
        (change_config, "of other settings"),
        (truncate_config, "config.json is damaged"),
        (rename_setting, "config.json is damaged or of another version"),
        (remove_everything, "no run to resume"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(harm, words, stopped, train_run):
    harm(stopped)
    code, _, err = train_run("--resume", stopped)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("train.run: error: ")
    assert words in err


def test_resuming_takes_no_other_settings(stopped, train_run):
    code, _, err = train_run("simplenet", "--resume", stopped, "--lr", "0.5")
    assert (code, err.count("\n")) == (2, 1)
    assert "leave out --lr" in err
