"""The convolutions, ours fused and unfused, train alike: the same seed gives the same loss curve, to rounding."""

import csv
import dataclasses
import json

import pytest

from train.recipes import RECIPES

VARIANTS = {
    "torch": ("--conv", "torch"),
    "unfold": ("--conv", "unfold"),
    "triton": ("--conv", "triton"),
    "triton-unfused": ("--conv", "triton", "--no-fuse"),
}

# Relative difference to PyTorch's own convolution, by step. The first loss differs by the rounding of one forward pass;
# from then on by that of the gradients too, and differences grow from step to step.
# AdamW divides each gradient by its own size: one that is nothing but rounding still moves its weight by the whole
# learning rate, and one that is wrong by a factor changes nothing. SGD moves by the gradient itself and shows that.
TOLERANCE = {
    "adamw": {1: 1e-5, 2: 1e-3, 3: 1e-3, 4: 3e-3, 5: 3e-3, 6: 3e-3},
    "sgd": {1: 1e-5, 2: 1e-4, 3: 1e-4, 4: 1e-4, 5: 1e-4, 6: 1e-4},
}
# Both from the quick recipe's initial weights: with the write-up's, six steps have no gradients to speak of.
RATES = {"adamw": RECIPES["quick"].lr, "sgd": 0.003}


def losses(path):
    with open(path, newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_the_first_steps_agree(optimizer, train_run, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPES["quick"], optimizer=optimizer, lr=RATES[optimizer])
    monkeypatch.setitem(RECIPES, "quick", recipe)
    for conv, flags in VARIANTS.items():
        settings = ("--epochs", 1, "--batch-size", 16, "--limit-train", 96, "--limit-val", 16, "--device", "cpu")
        assert train_run("simplenet", *flags, "--recipe", "quick", *settings, "--out", conv)[0] == 0
        summary = json.loads((tmp_path / conv / "summary.json").read_text())
        assert summary["fused"] == (conv == "triton")
    reference = losses(tmp_path / "torch/steps.csv")
    assert len(reference) == len(TOLERANCE[optimizer])
    for conv in VARIANTS.keys() - {"torch"}:
        for (step, tolerance), ours, theirs in zip(
            TOLERANCE[optimizer].items(), losses(tmp_path / conv / "steps.csv"), reference, strict=True
        ):
            assert ours == pytest.approx(theirs, rel=tolerance), f"{conv}, step {step}"


@pytest.mark.slow
def test_final_accuracies_agree_within_noise(train_run, tmp_path):
    """On 500 validation images one accuracy of about 60% has a standard deviation of 2.2 points."""
    accuracy = {}
    for conv, flags in VARIANTS.items():
        settings = ("--epochs", 2, "--limit-train", 640, "--limit-val", 500, "--device", "cpu")
        assert train_run("simplenet", *flags, *settings, "--out", conv)[0] == 0
        accuracy[conv] = json.loads((tmp_path / conv / "summary.json").read_text())["val_top1"]
    assert accuracy["torch"] > 40  # it has learned, so agreement means something
    for conv in VARIANTS:
        assert accuracy[conv] == pytest.approx(accuracy["torch"], abs=5), accuracy
