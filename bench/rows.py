"""What the timed rows share: sizes, how wrong a result may be, and the table of ratios."""

from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table

MODEL = "simplenet"
# (images, pixels) a step. The write-up's on a GPU; on the CPU what lets all rows end within three minutes.
SIZES = {"cuda": (256, 128), "cpu": (32, 32)}
PRECISION = "ieee"  # every convolution multiplies in full float32, as the write-up's T4 did
# ||result - exact|| / ||exact||, exact being float64. A layer: some roundings of float32 (6e-8 each), which grow with
# the square root of the longest sum, 2^20 pixels at most; a step chains seven layers and their ReLUs.
TOLERANCE = {"layer": 1e-5, "step": 1e-4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One timed row."""

    operation: str
    """"forward", "input_grad", "weight_grad" or "train_step"."""
    layer: str
    """A layer's name, or the model's for a whole step."""
    conv: str
    """One of models.CONVOLUTIONS."""
    backend: str
    """"native", "compiled" or "interpreter"."""
    seconds: float
    """Median over the rounds."""


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """||result - exact|| / ||exact||"""
    return ((result.double() - exact).norm() / exact.norm()).item()


def ratio_table(rows: list[Row]) -> Table:
    """A line for each operation and layer: milliseconds by each convolution, and triton's over the others'."""
    seconds = {(row.operation, row.layer, row.conv): row.seconds for row in rows}
    convolutions = list(dict.fromkeys(row.conv for row in rows))
    others = [conv for conv in convolutions if conv != "triton"] if "triton" in convolutions else []
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("operation")
    table.add_column("layer")
    for conv in convolutions:
        table.add_column(f"{conv}\nms", justify="right")
    for conv in others:
        table.add_column(f"triton\n/ {conv}", justify="right", style="bold")
    previous = None
    for operation, layer in dict.fromkeys((row.operation, row.layer) for row in rows):
        if previous not in (None, operation):
            table.add_section()
        times = {conv: seconds.get((operation, layer, conv)) for conv in convolutions}
        ratios = [_ratio(times["triton"], times[conv]) for conv in others]
        shown = ["-" if time is None else f"{1e3 * time:,.2f}" for time in times.values()]
        table.add_row("" if operation == previous else operation, layer, *shown, *ratios)
        previous = operation
    return table


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator and denominator else "-"
