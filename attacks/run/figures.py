"""What the attacking command draws."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from attacks.run.subject import Space, Subject
from train.files import atomic_write

RIGHT, WRONG = "tab:green", "tab:red"
INCHES = 1.75  # the side of a picture
LINE = 24  # characters of a caption at that width


def save_figure(file: Path, figure: Figure) -> None:
    with atomic_write(file) as png:
        figure.savefig(png, format="png")


def mean_and_spread(values: Sequence[float]) -> str:
    """"12.3 ± 0.4", the mean and the sample standard deviation; one value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


@torch.no_grad()
def picture_grid(
    subject: Subject, space: Space, y: Tensor, columns: Sequence[tuple[str, Tensor]], *, title: str,
    difference: bool = False,
) -> Figure:
    """A row an image, with its true class at the left; a column for each (title, images (N, 3, S, S) of `space`).

    Under each picture stands what the model takes it for and how sure it is, green where that is right.

    difference      one more column: last less first column, grey where nothing changed, amplified to full contrast
    """
    rows, wide = len(y), len(columns) + difference
    figure = Figure(figsize=(INCHES * wide + 1.1, (INCHES + 0.45) * rows + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False)
    names = [name.replace("_", " ") for name in subject.data.classes]
    for column, (heading, x) in enumerate(columns):
        confidence, predicted = space.model(subject.model)(x).softmax(dim=1).max(dim=1)
        pictures = for_display(space.pixels(x))
        for row in range(rows):
            cell = axes[row, column]
            show(cell, pictures[row])
            right = predicted[row] == y[row]
            caption = f"{names[predicted[row]]} {100 * confidence[row]:.0f}%"
            cell.set_xlabel(textwrap.fill(caption, LINE), fontsize="small", color=RIGHT if right else WRONG)
        axes[0, column].set_title(heading, fontsize="medium")
    if difference:
        change = space.pixels(columns[-1][1]) - space.pixels(columns[0][1])
        factor = 0.5 / max(change.abs().max().item(), 1e-12)
        pictures = for_display(0.5 + factor * change)
        for row in range(rows):
            show(axes[row, -1], pictures[row])
        axes[0, -1].set_title(f"difference × {factor:.3g}", fontsize="medium")
    for row in range(rows):
        axes[row, 0].set_ylabel(textwrap.fill(names[y[row]], 16), fontsize="medium")
    figure.suptitle(title)
    return figure


def show(axes: Axes, picture: Tensor) -> None:
    """picture (S, S, 3) of 0 ... 1, without ticks."""
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def for_display(pixels: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, S, S, 3) on the CPU, cut to 0 ... 1 as a screen would."""
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).float().cpu()


def security_curve(
    axes: Axes, curve: Sequence[tuple[float, float]], others: dict[str, float], *, epsilon: float, label: str,
    colour: str = "tab:blue",
) -> None:
    """Top-1 over epsilon, each epsilon one place further, and single attacks at the one that was asked for."""
    places = range(len(curve))
    axes.plot(places, [top1 for _, top1 in curve], marker="o", color=colour, label=label)
    here = [size for size, _ in curve].index(epsilon)
    for (name, top1), marker in zip(others.items(), "sD^v", strict=False):
        axes.plot([here], [top1], marker=marker, linestyle="none", markersize=7, fillstyle="none",
                  color=colour, label=name)
    axes.set_xticks(places, [f"{size:.3g}" for size, _ in curve], rotation=45)
    axes.set(xlabel="epsilon", ylabel="top-1 (%)", ylim=(0, None))
