"""Training: recipes, schedule, metrics, the files of a run, and what happens when it goes wrong."""

import csv
import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train.files
from train import report
from train.meter import Meter
from train.optim import learning_rate
from train.recipes import RECIPES, default_recipe, make_recipe

RUN_FILES = {"config.json", "metrics.csv", "steps.csv", "summary.json", "curves.png", "last.pt", "best.pt"}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- recipes and schedule


def test_writeup_recipe_is_the_writeups():
    recipe = RECIPES["writeup"]
    assert (recipe.optimizer, recipe.momentum, recipe.batch_size) == ("sgd", 0.9, 256)
    assert (recipe.lr, recipe.weight_decay) == (0.1, 1e-4)
    assert (recipe.warmup_epochs, recipe.epochs) == (5, 60)
    assert (recipe.nesterov, recipe.decay_all, recipe.label_smoothing, recipe.clip, recipe.ema) == (
        False, True, 0, None, None,
    )
    assert (recipe.flip, recipe.colour, recipe.rotate, recipe.crop_area, recipe.crop_ratio) == (
        True, 0.15, 15, 0.25, 0.2,
    )
    assert (recipe.init, recipe.flip_tta, recipe.amp) == ("pytorch", False, "off")


def test_writeup_recipe_of_the_transformer_is_the_writeups():
    recipe = make_recipe("writeup", "simplevit", "/photos")
    assert (recipe.optimizer, recipe.epochs, recipe.lr) == ("adamw", 90, 0.01)
    assert (recipe.weight_decay, recipe.clip, recipe.batch_size) == (0.05, 1.0, 256)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("data", ["fashion-mini", "/photos"])
def test_every_model_has_its_recipe_and_resnet_its_pretrained_weights(name, data):
    for model in models.MODELS:
        recipe = make_recipe(name, model, data)
        assert (recipe.model, recipe.recipe) == (model, name)
        assert recipe.weights == ("imagenet" if model == "resnet18" else "none")


def test_modern_fine_tunes_gently_and_trains_resnet_from_scratch_as_the_others():
    tuned, scratch = (make_recipe("modern", "resnet18", "/photos", weights) for weights in ("imagenet", "none"))
    assert (tuned.optimizer, tuned.lr, tuned.nesterov) == ("sgd", 0.01, True)
    assert (scratch.optimizer, scratch.lr, scratch.weights) == ("adamw", 2e-3, "none")


@pytest.mark.parametrize(
    ("data", "device", "recipe"),
    [
        ("fashion-mini", "cpu", "quick"),
        ("fashion-mini", "cuda", "quick"),
        ("/photos", "cpu", "quick"),
        ("/photos", "cuda", "writeup"),
    ],
)
def test_default_recipe(data, device, recipe):
    assert default_recipe(data, device) == recipe


def test_learning_rate_warms_up_per_step_and_comes_down_to_nothing():
    settings, per_epoch = RECIPES["writeup"], 390
    rates = [learning_rate(step, settings, per_epoch) for step in range(60 * per_epoch)]
    warmup = 5 * per_epoch
    assert rates[0] == pytest.approx(0.1 / warmup)
    assert rates[warmup - 1] == rates[warmup] == 0.1
    increments = {round(b - a, 12) for a, b in itertools.pairwise(rates[:warmup])}
    assert len(increments) == 1
    assert all(a > b for a, b in itertools.pairwise(rates[warmup:]))
    middle = (warmup + len(rates)) // 2
    assert rates[middle] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-7


def test_a_short_trial_of_a_long_recipe_still_reaches_its_rate_and_comes_down():
    settings = dataclasses.replace(RECIPES["writeup"], epochs=2)
    rates = [learning_rate(step, settings, 10) for step in range(20)]
    assert max(rates) == 0.1
    assert rates[-1] < 0.01


@pytest.mark.parametrize("classes", [2, 4, 5, 10])
def test_meter_counts_as_the_definition_does(classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(60, classes), torch.randint(classes, (60,))
    meter = Meter(classes, torch.device("cpu"))
    for part in (slice(0, 50), slice(50, 60)):  # batches of unequal size weigh by their images
        meter.update(logits[part], labels[part], torch.nn.functional.cross_entropy(logits[part], labels[part]))
    ranked = logits.argsort(descending=True)
    loss, top1, top5 = meter.compute()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert top1 == pytest.approx(100 * (ranked[:, 0] == labels).float().mean().item())
    assert top5 == pytest.approx(100 * (ranked[:, :5] == labels[:, None]).any(1).float().mean().item())


# ---------------------------------------------------------------- a whole run


@pytest.fixture
def finished(train_run, tiny_run, tmp_path):
    """(run folder, stdout) of a tiny run."""
    code, out, err = train_run(*tiny_run, "--out", "run")
    assert (code, err) == (0, "")
    return tmp_path / "run", out


def test_a_run_leaves_the_files_of_the_contract_and_no_others(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == RUN_FILES


def test_tables_have_the_columns_of_the_contract(finished):
    folder, _ = finished
    epochs, steps = rows(folder / "metrics.csv"), rows(folder / "steps.csv")
    assert list(epochs[0]) == [
        "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5",
        "images_per_s", "data_wait_pct",
        "memory_mean_mib", "memory_peak_mib", "allocated_peak_mib", "reserved_peak_mib",
    ]
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    assert list(steps[0]) == ["step", "lr", "loss"]
    assert [int(row["step"]) for row in steps] == list(range(1, 13))
    for row in epochs:
        assert all(0 <= float(row[name]) <= 100 for name in row if "top" in name or "pct" in name)
        assert float(row["train_top5"]) >= float(row["train_top1"])
    mean = sum(float(row["loss"]) for row in steps[8:]) / 4
    assert float(epochs[2]["train_loss"]) == pytest.approx(mean, rel=1e-4)


def test_summary_says_what_ran_where(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    wanted = {"model": "simplenet", "conv": "torch", "backend": "native", "data": "fashion-mini", "epochs": 3}
    assert {name: summary[name] for name in wanted} == wanted
    assert summary["seed"] == 0
    assert summary["val_top1"] == float(rows(folder / "metrics.csv")[-1]["val_top1"])
    assert summary["device"].startswith("CPU")
    assert summary["memory"]["kind"] == "mean resident set of the process (CPU)"
    assert summary["memory"]["mib"] > 100  # torch alone is more
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["images_per_s"] > 0
    assert "commit" in summary


def test_curves_are_a_picture(finished):
    folder, _ = finished
    with Image.open(folder / "curves.png") as image:
        image.load()
        assert image.size[0] > 800


@pytest.mark.parametrize(
    ("steps", "labels"), [(1, ["each step"]), (99, ["each step"]), (100, ["each step", "mean of 2"])]
)
def test_the_loss_is_smoothed_only_over_two_steps_or_more(steps, labels):
    axes = Figure().subplots()
    report.draw_losses(axes, list(range(steps)), [float(i) for i in range(steps)])
    assert [line.get_label() for line in axes.lines] == labels


def test_events_hold_every_step_and_epoch(finished):
    folder, _ = finished
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("epoch/val_top1")] == [4, 8, 12]
    value = events.Scalars("step/loss")[-1].value
    assert value == pytest.approx(float(rows(folder / "steps.csv")[-1]["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_checkpoints_rebuild_the_model_with_weights_only_loading(finished, name):
    folder, _ = finished
    saved = torch.load(folder / name, weights_only=True)
    model = models.build(saved["settings"]["model"], "torch", len(saved["classes"]), saved["settings"]["image_size"])
    model.load_state_dict(saved["model"])
    assert saved["classes"][0] == "T-shirt/top"


def test_best_is_the_epoch_with_the_highest_top1(finished):
    folder, _ = finished
    accuracies = [float(row["val_top1"]) for row in rows(folder / "metrics.csv")]
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["val_top1"] == pytest.approx(max(accuracies))
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))


def test_without_a_terminal_each_epoch_is_one_plain_line(finished):
    _, out = finished
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch ")] == [f"epoch {n}/3" for n in (1, 2, 3)]
    assert "\r" not in out
    assert "\x1b" not in out
    assert len(lines) < 20
    assert "native PyTorch on CPU" in out


def test_the_seed_decides_the_run(train_run, tiny_run, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert train_run(*tiny_run, "--seed", seed, "--out", name)[0] == 0
    a, b, c = ((tmp_path / name / "steps.csv").read_text() for name in "abc")
    assert a == b
    assert a != c


def test_the_default_folder_is_under_runs(train_run, tiny_run, tmp_path):
    for _ in range(2):  # twice within a second must not collide
        assert train_run(*tiny_run, "--epochs", "1")[0] == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("simplenet-torch-2") for name in folders)


def test_top5_of_few_classes_is_told_honestly(train_run, make_images, tmp_path):
    make_images(tmp_path / "d", {"train/cat": 8, "train/dog": 8, "val/cat": 4, "val/dog": 4})
    where = ("--data", "d", "--image-size", "16", "--device", "cpu", "--out", "r")
    code, out, _ = train_run("simplenet", "--conv", "torch", "--epochs", "1", *where)
    assert code == 0
    assert "of 2 classes the right one is always among five" in out
    assert json.loads((tmp_path / "r/summary.json").read_text())["val_top5_counts"] == 2
    assert json.loads((tmp_path / "r/config.json").read_text())["data"] == str(tmp_path / "d")


# ---------------------------------------------------------------- when it goes wrong


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_run, train_run, tmp_path, monkeypatch
):
    forward = models.SimpleNet.forward
    calls = []

    def explode_in_the_second_epoch(self, x):
        calls.append(1)
        return forward(self, x) * (math.inf if len(calls) == 7 else 1)  # 4 steps, 1 validation batch, 2 steps

    monkeypatch.setattr(models.SimpleNet, "forward", explode_in_the_second_epoch)
    code, _, err = train_run(*tiny_run, "--out", "run")
    assert code == 2
    assert err.count("\n") == 1
    assert "the loss became nan at step 6 with learning rate" in err
    assert "last.pt holds step 4" in err
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert not (tmp_path / "run/summary.json").exists()


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    train.files.write_json(path, {"value": 1})

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for target in (path, tmp_path / "b.json"):
        with pytest.raises(OSError, match="No space left") as error:
            train.files.write_json(target, {"value": 2})
        assert error.value.filename == str(target)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_created_once(tmp_path):
    path = tmp_path / "a.json"
    train.files.create_json(path, {"value": 1})
    with pytest.raises(FileExistsError):
        train.files.create_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        pytest.param("1m", set(), id="no-checkpoint-and-no-folder"),
        pytest.param("3m", {"best.pt", "last.pt"}, id="last.pt-from-before-the-first-step"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(size, kept, train_run, tiny_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        code, _, err = train_run(*tiny_run, "--out", disk / "run")
        assert code == 2
        assert err.count("\n") == 1
        assert "No space left on device" in err
        assert (disk / "run").exists() == bool(kept)
        names = {path.name for path in (disk / "run").glob("*")}
        assert names & {"best.pt", "last.pt", "summary.json"} == kept
        assert not any(name.endswith(".tmp") for name in names)
        for name in kept:
            torch.load(disk / "run" / name, weights_only=True)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_validation_loss_that_is_no_number_is_no_success(tiny_run, train_run, tmp_path, monkeypatch):
    forward = models.SimpleNet.forward
    broken = lambda self, x: forward(self, x) * (1 if self.training else math.nan)  # noqa: E731
    monkeypatch.setattr(models.SimpleNet, "forward", broken)
    code, _, err = train_run(*tiny_run, "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "the validation loss became nan at step 4" in err
    assert not (tmp_path / "run/best.pt").exists()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tiny_run, train_run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run_folder.time.strftime", lambda *_: "now")
    for seed in (0, 1):
        assert train_run(*tiny_run, "--epochs", 1, "--seed", seed)[0] == 0
    summaries = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json")}
    seeds = {name: summary["seed"] for name, summary in summaries.items()}
    assert seeds == {"simplenet-torch-now": 0, "simplenet-torch-now-2": 1}


def test_a_run_folder_among_class_folders_is_refused(make_images, train_run, tmp_path):
    data = make_images(tmp_path / "flowers", {"rose": 6, "tulip": 6})
    code, _, err = train_run("simplenet", "--conv", "torch", "--data", data, "--out", data / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "would lie among the class folders" in err
    assert not (data / "run").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"batch_size": 0}, "run/config.json is damaged or of another version: batch_size is 0"),
        ({"model": "alexnet"}, "last.pt is of other settings than run/config.json names"),
        ({"seed": 1}, "last.pt is of other settings than run/config.json names"),
        ({"image_size": "32"}, "run/config.json is damaged or of another version: image_size is '32'"),
    ],
    ids=str,
)
def test_a_config_changed_by_hand_is_refused_when_resuming(damage, words, tiny_run, train_run, tmp_path):
    assert train_run(*tiny_run, "--epochs", 1, "--out", "run")[0] == 0
    (tmp_path / "run/summary.json").unlink()
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    code, _, err = train_run("--resume", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_a_device_that_is_none_is_refused_when_resuming(tiny_run, train_run, tmp_path):
    assert train_run(*tiny_run, "--epochs", 1, "--out", "run")[0] == 0
    (tmp_path / "run/summary.json").unlink()
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "tpu"}))
    assert train_run("--resume", "run")[::2] == (2, "train.run: error: no device is called 'tpu'\n")


@pytest.mark.parametrize(
    ("name", "contents"),
    [("summary.json", "{"), ("summary.json", "[]"), ("steps.csv", ""), ("metrics.csv", "epoch;lr\n1;2\n")],
)
def test_a_damaged_file_of_a_run_is_named_when_resuming(name, contents, tiny_run, train_run, tmp_path):
    assert train_run(*tiny_run, "--epochs", 1, "--out", "run")[0] == 0
    if name != "summary.json":
        (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run" / name).write_text(contents)
    code, _, err = train_run("--resume", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert f"run/{name} is damaged" in err


def test_ctrl_c_while_torch_is_still_being_imported_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-m", "train.run", "simplenet"],
        cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "train.run: error: interrupted\n")


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "summary.json", "metrics.csv"])
def test_a_folder_with_a_file_of_a_run_is_refused_and_left_as_it_is(name, tiny_run, train_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    code, _, err = train_run(*tiny_run, "--epochs", 1, "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "run already holds a run" in err
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(name, "precious")]
