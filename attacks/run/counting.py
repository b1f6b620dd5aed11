"""Accuracies under several conditions, as sums that add up over batches and processes, and over several checkpoints."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from train.files import write_csv
from train.meter import Meter

SUMS = 4  # of Meter


def sums_under(conditions: Iterable[Tensor], y: Tensor, classes: int) -> Tensor:
    """(conditions, SUMS) float64: Meter's sums of logits (N, K) under each condition."""
    meter = Meter(classes, y.device)
    return torch.stack([meter.sums_of(logits, y, cross_entropy(logits, y)) for logits in conditions])


def accuracies(sums: Tensor, classes: int) -> dict[str, float]:
    """Of one condition's sums (SUMS,) over all images: top-1 and top-5 in percent."""
    meter = Meter(classes, sums.device)
    meter.sums = sums
    _, top1, top5 = meter.compute()
    return {"top1": top1, "top5": top5}


def together(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the mean and the sample standard deviation of several tables of accuracies, one a checkpoint.

    What a table's row has besides top1 and top5 is the same in all.
    """
    rows = []
    for same in zip(*tables, strict=True):
        row = {name: value for name, value in same[0].items() if name not in ("top1", "top5")}
        for name in ("top1", "top5"):
            values = [one[name] for one in same]
            row |= {name: statistics.mean(values), f"{name}_sd": statistics.stdev(values)}
        rows.append(row | {"n": len(same)})
    return rows


def in_words(row: dict[str, Any]) -> str:
    """Of a row of `together`: "12.3 ± 0.4 / 45.6 ± 0.7"."""
    return " / ".join(f"{row[name]:.1f} ± {row[f'{name}_sd']:.1f}" for name in ("top1", "top5"))


def write_together(out: Path | None, name: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """`name` into --out; without one there is no folder that all checkpoints share."""
    if out is not None:
        write_csv(out / name, tuple(rows[0]), rows)
        console.print(f"written: {out / name}")
