"""What two trainings that should be one have in common, to the bit."""

import csv
import json
from pathlib import Path

import torch

from train.memory import COLUMNS as MEMORY_COLUMNS


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_measurements(path):
    """metrics.csv but for what depends on the clock and the memory."""
    measured = ("images_per_s", "data_wait_pct", *MEMORY_COLUMNS)
    return [{name: row[name] for name in row if name not in measured} for row in rows(path)]


def flatten(state):
    """Nested states as what == compares to the bit."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {name: flatten(value) for name, value in state.items()}
    return [flatten(value) for value in state] if isinstance(state, list) else state


def same_run(a: Path, b: Path) -> None:
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    for part in ("model", "trained_model", "optimizer", "scaler"):
        assert flatten(first[part]) == flatten(second[part]), part
    assert (a / "steps.csv").read_text() == (b / "steps.csv").read_text()
    assert without_measurements(a / "metrics.csv") == without_measurements(b / "metrics.csv")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    assert summaries[0]["val_top1"] == summaries[1]["val_top1"]
    assert summaries[0]["best_epoch"] == summaries[1]["best_epoch"]
