"""What the attacking command draws."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from attacks.run.hygiene import REACH, STEPS, Examination
from attacks.run.subject import Space, Subject
from train.files import atomic_write

RIGHT, WRONG = "tab:green", "tab:red"
INCHES = 1.75  # the side of a picture
LINE = 24  # characters of a caption at that width


def save_figure(file: Path, figure: Figure) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of folders and of classes may have any $
    with atomic_write(file) as png:
        figure.savefig(png, format="png")


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
        axes[0, -1].set_title(f"last less first, × {factor:.3g}", fontsize="medium")
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
    axes: Axes, examination: Examination, space: Space, others: dict[str, float], *, of: str = "",
    colour: str = "tab:blue",
) -> None:
    """Top-1 over epsilon on a logarithmic axis, the clean images at its left end, and single attacks at the epsilon
    that was asked for; `of` says whose it is, where there are several."""
    (_, clean), *attacked = examination.curve
    sizes, top1 = zip(*attacked, strict=True)
    left = sizes[0] / 2  # where the clean images stand
    axes.plot([left, *sizes], [clean, *top1], marker="o", color=colour,
              label=f"{of}untargeted, {STEPS} steps of {REACH / STEPS:g} epsilon")
    for (name, value), marker in zip(others.items(), "sD^v", strict=False):
        axes.plot([examination.epsilon], [value], marker=marker, linestyle="none", markersize=7, fillstyle="none",
                  color=colour, label=f"{of}{name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks([left, *sizes], ["clean", *(f"{size:.3g}" for size in sizes)], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel=f"epsilon ({space.describe()})", ylabel="top-1 (%)")


def grouped_bars(axes: Axes, groups: Sequence[str], bars: dict[str, Sequence[float]], colours: dict[str, str]) -> None:
    """A bar for each name in each group, its height above it; top-1 in percent."""
    width = 0.76 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        places = [n + (i - (len(bars) - 1) / 2) * width for n in range(len(values))]
        drawn = axes.bar(places, values, width, color=colours[name], label=name)
        axes.bar_label(drawn, fmt="%.1f", fontsize="small")
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel="top-1 (%)")
