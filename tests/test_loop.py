"""The training loop: what reaches the model and the optimiser, and what is measured of it."""

import contextlib
import csv
import dataclasses
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import models
from train import batches
from train.cli import StopRequest
from train.data import load_data
from train.display import Display
from train.loop import Trainer
from train.optim import initialise, learning_rate
from train.recipes import RECIPES
from train.report import git_commit
from train.run import one_thread


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer("quick", epochs=2) -> a Trainer of three steps an epoch; keywords replace the recipe's settings."""

    def make(recipe="quick", **changes):
        tiny = {
            "conv": "torch", "device": "cpu", "image_size": 32, "epochs": 1, "batch_size": 4, "limit_train": 12,
            "limit_val": 8, "eval_batch_size": 4,
        }
        settings = dataclasses.replace(RECIPES[recipe], **(tiny | changes))
        data = load_data(
            settings.data, settings.image_size, limit_train=settings.limit_train, limit_val=settings.limit_val,
            console=Console(quiet=True),
        )
        return Trainer(settings, *data, torch.device("cpu"), tmp_path)

    return make


def fit(trainer):
    display = Display(Console(quiet=True), epochs=trainer.settings.epochs, train_images=12, val_images=8, batch_size=4)
    with display:
        trainer.fit(display, StopRequest())


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Large enough that three steps without any one of them end elsewhere.
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("quick", {"lr": 0.01, "weight_decay": 0.5}),
        ("writeup", {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8, "init": "kaiming"}),
    ],
)
def test_three_steps_are_those_of_a_loop_written_by_hand(recipe, changes, make_trainer):
    trainer = make_trainer(recipe, seed=3, **changes)
    fit(trainer)

    settings, data, device = trainer.settings, trainer.train, torch.device("cpu")
    torch.manual_seed(3)
    model = models.build("simplenet", "torch", len(data.classes), 32)
    initialise(model, settings.init)
    if recipe == "quick":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1, weight_decay=0.5)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.8, weight_decay=0.1)
    order = batches.epoch_order(12, seed=3, epoch=0)
    for step, chosen in enumerate(order.split(4)):
        random = batches.generator(3, 0, step)
        pixels, y = batches.train_batch(
            data, chosen, 32, device=device, flip=settings.flip, crop=settings.crop, random=random
        )
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings, 3)
        optimizer.zero_grad()
        F.cross_entropy(model(batches.normalise(pixels, data, torch.contiguous_format)), y).backward()
        optimizer.step()
    expected = model.state_dict()
    for name, weights in trainer.model.state_dict().items():
        assert torch.allclose(weights, expected[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("recipe", ["quick", "writeup"])
def test_the_seed_decides_the_initial_weights(recipe, make_trainer):
    a, b, c = (make_trainer(recipe, seed=seed).model.state_dict() for seed in (5, 5, 6))
    for name in a:
        assert torch.equal(a[name], b[name])
        if name.endswith("weight"):
            assert not torch.equal(a[name], c[name])


def test_the_model_trains_in_training_mode_and_is_validated_in_evaluation_mode(make_trainer):
    trainer, seen = make_trainer(epochs=2), []
    trainer.model.register_forward_hook(lambda model, *_: seen.append((model.training, torch.is_grad_enabled())))
    fit(trainer)
    assert seen == 2 * (3 * [(True, True)] + 2 * [(False, False)])  # three steps, two validation batches


@pytest.mark.parametrize(("flip", "crop"), [(True, False), (False, True)])
def test_the_settings_augmentation_reaches_every_batch(flip, crop, make_trainer, monkeypatch):
    asked, train_batch = [], batches.train_batch

    def record(*arguments, **keywords):
        asked.append((keywords["flip"], keywords["crop"]))
        return train_batch(*arguments, **keywords)

    monkeypatch.setattr(batches, "train_batch", record)
    fit(make_trainer(flip=flip, crop=crop))
    assert asked == 3 * [(flip, crop)]


def test_an_epochs_learning_rate_is_its_last_steps(make_trainer):
    trainer = make_trainer(epochs=2)
    fit(trainer)
    epochs, steps = rows(trainer.folder / "metrics.csv"), rows(trainer.folder / "steps.csv")
    assert len({row["lr"] for row in steps}) > 3
    for row, last in zip(epochs, (steps[2], steps[5]), strict=True):
        assert float(row["lr"]) == pytest.approx(float(last["lr"]), rel=1e-5)


def test_an_epochs_speed_counts_that_epoch_only(make_trainer, monkeypatch):
    trainer = make_trainer(epochs=2)
    now = 0.0

    def tick():
        """Three readings a step: two ticks of 1 s each in the first epoch, of 10 s each in the second."""
        nonlocal now
        now += 10.0 if trainer.epoch else 1.0
        return now

    monkeypatch.setattr(time, "perf_counter", tick)
    fit(trainer)
    speeds = [float(row["images_per_s"]) for row in rows(trainer.folder / "metrics.csv")]
    assert speeds == pytest.approx([4 / 2, 4 / 20])
    assert trainer.timing["total_images"] == 24


@pytest.mark.parametrize(("backend", "inside"), [("interpreter", 1), ("native", 2)])
def test_only_the_interpreter_leaves_pytorch_one_thread_and_gives_the_others_back(backend, inside):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(KeyError), one_thread(backend):
            assert torch.get_num_threads() == inside
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_commit_told_is_the_checkouts():
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert git_commit() in (head.strip(), head.strip() + "+changes")
