"""The three convolutions train alike: the same seed gives the same loss curve, to rounding."""

import csv
import json

import pytest

# Relative difference to PyTorch's own convolution, by step. The first loss differs by the rounding of one forward pass.
# After that AdamW divides each gradient by its own size, so one that is nothing but rounding still moves its weight by
# the whole learning rate: differences grow from step to step, and a wrong gradient shows as tens of percent.
TOLERANCE = {1: 1e-5, 2: 1e-3, 3: 1e-3, 4: 3e-3, 5: 3e-3, 6: 3e-3}


def losses(path):
    with open(path, newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_first_steps_agree(train_run, tmp_path):
    for conv in ("torch", "unfold", "triton"):
        settings = ("--epochs", 1, "--batch-size", 16, "--limit-train", 96, "--limit-val", 16, "--device", "cpu")
        assert train_run("simplenet", "--conv", conv, *settings, "--out", conv)[0] == 0
    reference = losses(tmp_path / "torch/steps.csv")
    assert len(reference) == len(TOLERANCE)
    for conv in ("unfold", "triton"):
        for (step, tolerance), ours, theirs in zip(
            TOLERANCE.items(), losses(tmp_path / conv / "steps.csv"), reference, strict=True
        ):
            assert ours == pytest.approx(theirs, rel=tolerance), f"{conv}, step {step}"


@pytest.mark.slow
def test_final_accuracies_agree_within_noise(train_run, tmp_path):
    """On 500 validation images one accuracy of about 60% has a standard deviation of 2.2 points."""
    accuracy = {}
    for conv in ("torch", "unfold", "triton"):
        settings = ("--epochs", 2, "--limit-train", 640, "--limit-val", 500, "--device", "cpu")
        assert train_run("simplenet", "--conv", conv, *settings, "--out", conv)[0] == 0
        accuracy[conv] = json.loads((tmp_path / conv / "summary.json").read_text())["val_top1"]
    assert accuracy["torch"] > 40  # it has learned, so agreement means something
    for conv in ("unfold", "triton"):
        assert accuracy[conv] == pytest.approx(accuracy["torch"], abs=5), accuracy
