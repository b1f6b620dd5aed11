"""What the timed rows share: sizes, how wrong a result may be, and what is kept of a row for the tables at the end."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

MODEL = "simplenet"
# (images, pixels) a step. The write-up's on a GPU; on the CPU what lets all rows end within three minutes.
SIZES = {"cuda": (256, 128), "cpu": (8, 32)}
PRECISION = "ieee"  # unless a row says otherwise, every float32 is multiplied in full, as the write-up's T4 did
# ||result - exact|| / ||exact||, exact being float64 of the same operands. Of one operation by the type it is computed
# in: in float32 some roundings (6e-8 each), which grow with the square root of the longest sum, 2^20 pixels at most; in
# the others one rounding of the result, or of TF32's operands. A step in float32 chains a model's layers and ReLUs.
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 1e-3, "bfloat16": 8e-3, "step": 1e-4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One timed row."""

    group: str
    """"forward", ..., "conv_relu", ..., "train_step": the table that it stands in."""
    what: str
    """Model and layer, as "simplenet conv3x3-64"; a model of a whole step."""
    kind: str
    """What it is computed in: "float32", "tf32", "float16", "bfloat16" or "fp16 amp"."""
    contender: str
    """Who computed it: one of models.CONVOLUTIONS, "triton-unfused", "torch-channels-last" or a peer."""
    backend: str
    """"native", "compiled" or "interpreter"."""
    seconds: float
    """Median over the rounds."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Of a GPU, by timing_gpu's names; those that are not known are absent."""
    target: float | None = None
    """The most that triton's time may be of native PyTorch's on a GPU, if there is such an aim."""


def worst_error(results: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """The largest `relative_error` of a call's results; NaN if any is."""
    errors = [relative_error(result, right) for result, right in zip(results, exact, strict=True)]
    return torch.tensor(errors, dtype=torch.float64).max().item()


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """||result - exact|| / ||exact||"""
    return ((result.double() - exact).norm() / exact.norm()).item()
