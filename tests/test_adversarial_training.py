"""Adversarial training: what each step trains on, and that all else is as without it."""

import copy
import csv
import dataclasses
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import train.loop
from attacks.objective import TARGETS
from train import report
from train.cli import StopRequest
from train.display import Display
from train.loop import Trainer
from train.recipes import RECIPES

# Stochastic depth draws, batch norms keep statistics, and SimpleNet has neither.
MODELS = ("simplenet", "customnet", "simplevit")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def make_trainer(make_trainer):
    """make_trainer("customnet", adversarial="untargeted") -> a Trainer of three steps an epoch."""

    def make(model="simplenet", **changes):
        tiny = dict(
            model=model, image_size=16, batch_size=8, limit_train=24, limit_val=10, lr=0.01, optimizer="sgd",
            init="pytorch" if model == "simplevit" else "kaiming",
        )
        return make_trainer("modern", **(tiny | changes))

    return make


def fit(trainer):
    display = Display(Console(quiet=True), epochs=trainer.settings.epochs, train_images=24, val_images=10, batch_size=8)
    with display:
        trainer.fit(display, StopRequest())


def attack_by_hand(model, x, y, target, *, steps=5, step_size=0.01, epsilon=0.1):
    """(N, C, H, W) by the rule as Madry et al. 2018 write it, for a model in evaluation mode."""
    adv = x.clone()
    for _ in range(steps):
        adv.requires_grad_()
        logits = model(adv)
        if target == "untargeted":
            aim, sign = y, 1
        elif target == "most_likely":
            aim, sign = logits.argmax(1), 1
        else:
            wrong = logits.detach().clone()
            wrong[torch.arange(len(y)), y] = torch.inf
            aim, sign = wrong.argmin(1), -1
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, aim, reduction="sum"), adv)
        adv = (x + (adv.detach() + step_size * sign * gradient.sign() - x).clamp(-epsilon, epsilon)).detach()
    return adv


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", ["simplenet", "customnet"])
def test_a_step_is_one_written_by_hand(model, target, make_trainer):
    """Images attacked in evaluation mode, one training forward on them, gradients and statistics of that alone."""
    changes = dict(clip=None, ema=None, label_smoothing=0.0)
    trainer = make_trainer(model, adversarial=target, adversarial_epsilon=0.03, **changes)
    x, y = next(trainer.feeder.epoch(0))
    clean = x.clone()
    by_hand = copy.deepcopy(trainer.model).eval()
    adv = attack_by_hand(by_hand, x, y, target, epsilon=0.03)
    assert (adv - x).abs().max() == pytest.approx(0.03, rel=1e-4)  # three steps reach it, and the ball holds the rest
    by_hand.train()
    F.cross_entropy(by_hand(adv), y).backward()

    seen = []
    trainer.model.train()
    trainer.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]) if model.training else None)
    trainer.train_step(x, y)
    (trained_on,) = seen
    assert torch.equal(trained_on, adv)
    assert trained_on.stride() == x.stride()
    assert torch.equal(x, clean)  # the feeder's memory is left to the feeder
    for (name, ours), theirs in zip(trainer.model.named_parameters(), by_hand.parameters(), strict=True):
        assert ours.requires_grad
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(trainer.model.named_buffers(), by_hand.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
        if name.endswith("num_batches_tracked"):
            assert ours == 1


def test_every_step_attacks_the_weights_of_that_step(make_trainer):
    trainer, step, matched = make_trainer(adversarial="least_likely"), Trainer.train_step, []

    def checked(x, y):
        expected = attack_by_hand(copy.deepcopy(trainer.model).eval(), x, y, "least_likely")
        seen = []
        handle = trainer.model.register_forward_pre_hook(lambda model, a: seen.append(a[0]) if model.training else None)
        step(trainer, x, y)
        handle.remove()
        matched.append([torch.equal(one, expected) for one in seen])

    trainer.train_step = checked
    fit(trainer)
    assert trainer.average is not None  # of which the images are not made
    assert matched == 3 * [[True]]


@pytest.mark.parametrize(("model", "amp"), [*((model, "off") for model in MODELS), ("customnet", "bf16")])
@pytest.mark.parametrize("nothing", ["adversarial_epsilon", "adversarial_step_size"])
def test_an_attack_of_no_size_trains_to_the_bits_of_the_plain_copy(nothing, model, amp, make_trainer):
    plain = make_trainer(model, epochs=2, amp=amp)
    fit(plain)
    ours = make_trainer(model, epochs=2, amp=amp, adversarial="least_likely", **{nothing: 0.0})
    fit(ours)
    for part in ("model", "evaluated"):
        for name, value in getattr(plain, part).state_dict().items():
            assert torch.equal(getattr(ours, part).state_dict()[name], value), f"{part} {name}"
    assert ours.records.steps == plain.records.steps


@pytest.mark.parametrize("model", MODELS)
def test_an_attack_of_any_size_leaves_batches_order_draws_and_rates_as_they_are(model, make_trainer):
    told = []
    for changes in ({}, {"adversarial": "untargeted"}):
        trainer, step = make_trainer(model, epochs=2, **changes), Trainer.train_step
        batches, states = [], []

        def recorded(x, y, trainer=trainer, step=step, batches=batches):
            batches.append((x.clone(), y.clone()))
            step(trainer, x, y)

        def note_state(model, _args, states=states):
            if model.training:
                states.append(torch.get_rng_state())

        trainer.train_step = recorded
        trainer.model.register_forward_pre_hook(note_state)
        fit(trainer)
        told.append((batches, states, [row["lr"] for row in trainer.records.steps], trainer.model.state_dict()))
    (batches, states, rates, weights), (batches_too, states_too, rates_too, weights_too) = told
    assert len(batches) == len(batches_too) == len(states) == len(states_too) == 6  # one training forward a step
    for (x, y), (x_too, y_too) in zip(batches, batches_too, strict=True):
        assert torch.equal(x, x_too)
        assert torch.equal(y, y_too)
    for state, state_too in zip(states, states_too, strict=True):
        assert torch.equal(state, state_too)
    assert rates == rates_too
    assert any(not torch.equal(value, weights_too[name]) for name, value in weights.items())
    for name, value in weights_too.items():
        if name.endswith("num_batches_tracked"):
            assert value == 6, name


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_on_images_made_in_float32(amp, make_trainer):
    trainer = make_trainer(amp=amp, adversarial="least_likely")
    x, y = next(trainer.feeder.epoch(0))
    adv = attack_by_hand(copy.deepcopy(trainer.model).eval(), x, y, "least_likely")
    seen, dtypes = [], {True: set(), False: set()}
    trainer.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]) if model.training else None)
    trainer.model.head.register_forward_hook(lambda head, _x, logits: dtypes[head.training].add(logits.dtype))
    trainer.model.train()
    trainer.train_step(x, y)
    assert dtypes == {True: {torch.bfloat16 if amp == "bf16" else torch.float16}, False: {torch.float32}}
    assert [torch.equal(trained_on, adv) for trained_on in seen] == [True]
    fit(trainer)


def test_images_are_made_of_the_model_and_not_of_its_wrapper(make_trainer, monkeypatch):
    attacked, pgd = [], train.loop.pgd
    monkeypatch.setattr(train.loop, "pgd", lambda model, *a, **k: attacked.append(model) or pgd(model, *a, **k))
    trainer = make_trainer(adversarial="least_likely")
    through = []

    class Wrapper(torch.nn.Module):
        """As DistributedDataParallel and torch.compile wrap it."""

        def __init__(self):
            super().__init__()
            self.module = trainer.model

        def forward(self, x):
            through.append(self.training)
            return self.module(x)

    trainer.forward = Wrapper()
    fit(trainer)
    assert [model is trainer.model for model in attacked] == 3 * [True]
    assert through == 3 * [True]


@pytest.mark.slow
def test_compiled_it_is_close_to_eager_and_compiled_once(make_trainer):
    """Frozen weights and evaluation mode in between are no reason to compile anew."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler for the CPU")
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(compile=compiled, adversarial="least_likely", lr=1e-4)
        fit(trainer)
        losses.append([float(row["loss"]) for row in trainer.records.steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------- the command


def test_a_run_says_what_it_trained_on(train_run, tiny_run, tmp_path):
    code, out, err = train_run(*tiny_run, "--epochs", 1, "--adversarial", "--out", "run")
    assert (code, err) == (0, "")
    assert "adversarial training (5 steps of 0.01, epsilon 0.1, least likely); convolutions native" in out
    (line,) = (line for line in out.splitlines() if line.startswith("│ adversarial training"))
    assert "5 steps of 0.01, epsilon 0.1, least likely" in line
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["adversarial"] == {"target": "least_likely", "steps": 5, "step_size": 0.01, "epsilon": 0.1}
    figure = report.curves(tmp_path / "run", dataclasses.replace(RECIPES["quick"], adversarial="least_likely"))
    assert figure.get_suptitle().endswith("\nadversarial training (5 steps of 0.01, epsilon 0.1, least likely)")
    legend = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["train, adversarial images", "val"]


def test_a_plain_run_says_nothing_of_it(train_run, tiny_run, tmp_path):
    code, out, _ = train_run(*tiny_run, "--epochs", 1, "--out", "run")
    assert code == 0
    assert "adversarial" not in out
    assert json.loads((tmp_path / "run/summary.json").read_text())["adversarial"] is None
    assert "adversarial" not in report.curves(tmp_path / "run", RECIPES["quick"]).get_suptitle()


def test_a_summary_from_before_there_was_adversarial_training_is_shown(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--epochs", 1, "--out", "run")[0] == 0
    path = tmp_path / "run/summary.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "adversarial"}))
    assert train_run("--resume", "run")[0] == 0


def test_flags_reach_the_settings(train_run, tiny_run, tmp_path):
    flags = ("--adversarial-steps", 2, "--adversarial-step-size", 0.5, "--adversarial-epsilon", 0.75)
    code, out, err = train_run(*tiny_run, "--epochs", 1, "--adversarial", "most_likely", *flags, "--out", "run")
    assert (code, err) == (0, "")
    assert "2 steps of 0.5, epsilon 0.75, most likely" in out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert {name: value for name, value in config.items() if name.startswith("adversarial")} == {
        "adversarial": "most_likely", "adversarial_steps": 2, "adversarial_step_size": 0.5, "adversarial_epsilon": 0.75,
    }


def test_accuracies_of_training_are_those_on_the_adversarial_images(train_run, tiny_run, tmp_path):
    """From the same weights one step of a large attack leaves none right that a plain one has, in training alone."""
    assert train_run(*tiny_run, "--epochs", 10, "--out", "first")[0] == 0
    one_step = (*tiny_run, "--init", "first", "--epochs", 1, "--batch-size", 64, "--lr", 1e-6)
    assert train_run(*one_step, "--out", "plain")[0] == 0
    attack = ("--adversarial", "untargeted", "--adversarial-step-size", 0.5, "--adversarial-epsilon", 2)
    assert train_run(*one_step, *attack, "--out", "adversarial")[0] == 0
    (plain,), (ours,) = (rows(tmp_path / name / "metrics.csv") for name in ("plain", "adversarial"))
    assert float(plain["train_top1"]) > 50
    assert float(ours["train_top1"]) < 10
    assert float(ours["val_top1"]) == pytest.approx(float(plain["val_top1"]), abs=10)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adversarial", "most_unlikely"], ["--adversarial", "most_unlikely", "least_likely", "untargeted"]),
        (["--adversarial", "--adversarial-epsilon", "-0.1"], ["--adversarial-epsilon", "-0.1 must be at least 0"]),
        (["--adversarial", "--adversarial-epsilon", "nan"], ["--adversarial-epsilon", "nan"]),
        (["--adversarial", "--adversarial-step-size", "-1"], ["--adversarial-step-size", "-1 must be at least 0"]),
        (["--adversarial", "--adversarial-steps", "0"], ["--adversarial-steps", "0 must be at least 1"]),
        (["--adversarial-steps", "3"], ["--adversarial-steps is for adversarial training: add --adversarial"]),
        (["--adversarial-step-size", "1"], ["--adversarial-step-size is for adversarial training"]),
        (["--adversarial-epsilon", "1"], ["--adversarial-epsilon is for adversarial training"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--a") else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, words, train_run, tmp_path):
    code, out, err = train_run("simplenet", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())
