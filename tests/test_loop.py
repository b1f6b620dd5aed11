"""The training loop: what reaches the model and the optimiser, and what is measured of it."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import models
from train.augment import Augmentation
from train.batches import Feeder, val_batches
from train.cli import StopRequest
from train.devices import one_thread
from train.display import Display
from train.loop import augmentation, predict
from train.optim import initialise, learning_rate
from train.report import git_commit


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
        ("writeup", {"lr": 0.05, "weight_decay": 0.3, "decay_all": False, "nesterov": True, "init": "kaiming"}),
        ("modern", {"lr": 0.01, "weight_decay": 0.5, "label_smoothing": 0.3, "clip": 0.1, "ema": 0.5}),
    ],
    ids=["adamw", "sgd", "nesterov", "modern"],
)
def test_three_steps_are_those_of_a_loop_written_by_hand(recipe, changes, make_trainer):
    trainer = make_trainer(recipe, seed=3, **changes)
    fit(trainer)

    settings, data, device = trainer.settings, trainer.train, torch.device("cpu")
    torch.manual_seed(3)
    model = models.build("simplenet", "torch", len(data.classes), 32).to(memory_format=torch.channels_last)
    initialise(model, settings.init)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [p for name, p in model.named_parameters() if settings.decay_all or name.endswith("weight")]
    others = [p for name, p in model.named_parameters() if not settings.decay_all and name.endswith("bias")]
    groups = [{"params": weights}] + ([{"params": others, "weight_decay": 0}] if others else [])
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1, weight_decay=0.5)
    else:
        optimizer = torch.optim.SGD(
            groups, lr=1, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.nesterov
        )
    feeder = Feeder(
        data, batch_size=4, image_size=32, device=device, memory_format=torch.channels_last,
        augmentation=augmentation(settings), seed=3,
    )
    for step, (x, y) in enumerate(feeder.epoch(0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings, 3)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=settings.label_smoothing).backward()
        if settings.clip:
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            assert norm > settings.clip
            for p in model.parameters():
                p.grad *= settings.clip / norm
        optimizer.step()
        decay = min(settings.ema or 0, (2 + step) / (11 + step))
        for name, value in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    for name, value in model.state_dict().items():
        assert torch.allclose(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(trainer.evaluated.state_dict()[name], average[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_close_to_float32(amp, make_trainer):
    settings = {"epochs": 2, "optimizer": "sgd", "lr": 1e-3, "clip": 1.0, "ema": 0.5}
    losses, dtypes = {}, set()
    for name in ("off", amp):
        trainer = make_trainer(amp=name, **settings)
        if name == amp:
            trainer.model.head.register_forward_hook(lambda _module, _x, y: dtypes.add(y.dtype))
        fit(trainer)
        losses[name] = [float(row["loss"]) for row in rows(trainer.folder / "steps.csv")]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert dtypes == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert losses[amp] != losses["off"]
    assert losses[amp] == pytest.approx(losses["off"], rel=0.1)  # bfloat16 has 8 bits


def test_gradients_are_clipped_without_the_scale_of_fp16(make_trainer):
    """Three steps of SGD whose gradients are longer than the clip: their lengths are the rates times the clip."""
    trainer = make_trainer(amp="fp16", optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.5, clip=0.01)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # the usual one overflows, and skips two steps
    lengths, step = [], trainer.train_step

    def measured(x, y):
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
        step(x, y)
        lengths.append((torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before).norm().item())

    trainer.train_step = measured
    fit(trainer)
    rates = [float(row["lr"]) for row in rows(trainer.folder / "steps.csv")]
    assert lengths == pytest.approx([0.01 * rate for rate in rates], rel=0.01)


def test_what_layers_draw_is_decided_by_the_seed_and_the_place_in_the_training(make_trainer):
    """As a resumed run needs it: the generators' state before is of no account."""
    states = []
    for noise in (1, 2):
        trainer = make_trainer("modern", model="simplevit", init="pytorch", image_size=16, ema=None, epochs=2)
        torch.manual_seed(noise)
        fit(trainer)
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_an_overflow_of_the_scaled_loss_skips_the_step_and_lowers_the_scale(make_trainer):
    trainer = make_trainer(amp="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    fit(trainer)
    assert trainer.scaler.get_scale() < 2.0**40
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["simplenet", "customnet", "simplevit", "resnet18"])
def test_compiled_training_is_close_to_eager_training(model, make_trainer):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler for the CPU")
    changes = {"model": model, "weights": "none", "optimizer": "sgd", "lr": 1e-4, "clip": None, "init": "pytorch"}
    losses = []
    for compiled in (False, True):
        trainer = make_trainer("modern", compile=compiled, **changes)
        fit(trainer)
        losses.append([float(row["loss"]) for row in rows(trainer.folder / "steps.csv")])
        assert not any(name.startswith("_orig_mod") for name in trainer.model.state_dict())
    # The first loss differs by rounding; batch norms over four images amplify it from step to step, and the
    # transformer's stochastic depth draws its rows in another order when compiled.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.1 if model == "simplevit" else 1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if model == "simplenet" else 0.1)


def test_a_compiler_that_is_missing_is_one_line(train_run, tiny_run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    code, _, err = train_run(*tiny_run, "--compile", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "--compile: torch.compile cannot compile here" in err


def test_validation_is_on_the_mean_of_an_image_and_its_mirror_image():
    x = torch.randn(2, 3, 4, 4)
    model = lambda x: x[:, :, 0, 0]  # noqa: E731
    assert torch.equal(predict(model, x, flip=True), (x[:, :, 0, 0] + x[:, :, 0, 3]) / 2)
    assert torch.equal(predict(model, x, flip=False), x[:, :, 0, 0])


def test_the_moving_average_is_what_is_validated_and_kept(make_trainer):
    trainer = make_trainer("modern", ema=0.5, lr=0.01)
    fit(trainer)
    saved = torch.load(trainer.folder / "last.pt", weights_only=True)
    model = models.build("simplenet", "torch", 10, 32).eval()
    model.load_state_dict(saved["model"])
    right = seen = 0
    for x, y in val_batches(
        trainer.val, batch_size=8, image_size=32, device=torch.device("cpu"), memory_format=torch.contiguous_format
    ):
        right, seen = right + int((predict(model, x, flip=True).argmax(1) == y).sum()), seen + len(y)
    assert float(rows(trainer.folder / "metrics.csv")[-1]["val_top1"]) == pytest.approx(100 * right / seen)
    assert any(not torch.equal(value, saved["trained_model"][name]) for name, value in saved["model"].items())


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


def test_the_settings_augmentation_reaches_the_batches(make_trainer):
    trainer = make_trainer("writeup", rotate=3.0, colour=0.1)
    assert trainer.feeder.augmentation == Augmentation(
        flip=True, colour=0.1, rotate=3.0, crop_area=0.25, crop_ratio=0.2
    )
    assert make_trainer("quick").feeder.augmentation == Augmentation(
        flip=False, colour=0.0, rotate=0.0, crop_area=None, crop_ratio=0.0
    )


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


def test_profiling_counts_the_operators_of_training_steps_alone(train_run, tiny_run, tmp_path):
    """Four steps an epoch: after two to warm up, six are profiled, and a validation in between is not."""
    code, out, err = train_run(*tiny_run, "--profile", 6, "--out", "run")
    assert (code, err) == (0, "")
    assert "6 training steps by operator" in out
    trace = json.loads((tmp_path / "run/trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::conv2d") == 6 * 7
    assert names.count("aten::cross_entropy_loss") == 6
    table = (tmp_path / "run/profile.txt").read_text()
    assert "aten::convolution_backward" in table


def test_a_profile_of_more_steps_than_there_are_is_refused(train_run, tiny_run, tmp_path):
    code, _, err = train_run(*tiny_run, "--profile", 11, "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "--profile 11: of this run's 12 steps the first 2 are not profiled" in err
    assert not (tmp_path / "run").exists()


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
