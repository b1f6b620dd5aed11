"""saliency: where a model looks, and whether the maps that say so depend on what it has learned."""

import argparse
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from attacks.run.figures import INCHES, LINE, RIGHT, WRONG, for_display, save_figure, show
from attacks.run.hygiene import print_doubts
from attacks.run.kept import progress_bar
from attacks.run.subject import Subject, describe, each_subject, make_space
from attacks.saliency import (
    Method,
    Randomised,
    grad_cam,
    last_convolution,
    layers_and_predictions,
    randomised_parameters,
    rank_correlation,
    reinitialised,
    saliency,
    smooth_grad,
)
from train.cli import UserError, number
from train.devices import one_thread
from train.distributed import World
from train.files import write_json

SHOWN_IMAGES = 6
MOST_IMAGES = 100  # a picture of more is taller than what PNG viewers open
CASCADE_IMAGES, CASCADE_LAYERS = 2, 5
SEEDS = (0, 1)  # of the parameters that the two models without memory get
# Of a map's pixels 1% are drawn at full strength: a gradient's few outliers would leave the rest too pale to see.
FULL = 0.99
OPACITY = 0.65  # of the red at full strength: Grad-CAM may cover all of an image, which must stay visible
# A correlation above it after everything is forgotten speaks against a method: one that ignores the model stays at 1,
# while sound ones come to 0.73 at most, by strides, pooling and borders alone (ResNet18, 64 px). A distance from the
# floor would not do: of a method that ignores the model the floor is 1 too, and Grad-CAM's, whose sums random weights
# turn to either sign in all images at once, lies anywhere within -0.6 and 0.6.
STAYS = 0.9

DESCRIPTION = """\
Draw where a model looks (the input gradient, SmoothGrad and Grad-CAM of the class it predicts, as red patches over some
validation images), and check that these maps depend on what it learned: its layers are randomised one after the other,
and the maps must change."""

EXAMPLES = """
examples:
  python -m attacks.run saliency runs/mine
  python -m attacks.run saliency runs/mine --images 10 --conv torch
  python -m attacks.run saliency runs/a runs/b --out runs/saliency

saliency.png has the maps, saliency-randomised.png what becomes of them as the
model forgets its layers from the output to the input (Adebayo et al. 2018). A
method whose maps then stay as they were explains the image, not the model, and
is told in red. Through the interpreter --conv triton takes minutes; the maps of
--conv torch are the same.
"""


def last_grad_cam(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return grad_cam(model, x, last_convolution(model), labels)


METHODS: dict[str, Method] = {"gradient": saliency, "SmoothGrad": smooth_grad, "Grad-CAM": last_grad_cam}
COLOURS = ("tab:blue", "tab:orange", "tab:green")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictured:
    """The images to explain, and what the model takes them for."""

    x: Tensor
    """(N, 3, S, S), normalised."""
    pixels: Tensor
    """(N, S, S, 3), 0 ... 1, on the CPU."""
    true: list[str]
    """Names of classes, as is `predicted`."""
    predicted: list[str]
    confidence: list[float]
    """In the predicted class, 0 ... 1."""
    labels: Tensor
    """(N,), the predicted classes: what is explained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """One method's maps, as the model came and as it forgets its layers."""

    steps: list[Randomised]
    """The first of the model as it came, the last of one that has forgotten everything."""
    floor: float | None
    """Mean rank correlation of the last maps with those of another model without memory."""

    @property
    def maps(self) -> Tensor:
        """(N, S, S), of the model as it came."""
        return self.steps[0].maps.cpu()

    @property
    def correlations(self) -> list[float | None]:
        """Mean rank correlation with `maps` after each layer forgotten."""
        return [mean(step.correlation) for step in self.steps[1:]]

    def as_json(self) -> dict[str, Any]:
        return {"correlations": self.correlations, "floor": self.floor}


def add_own_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=number(int, above=0, most=MOST_IMAGES), default=SHOWN_IMAGES, metavar="N",
                        help=f"images to explain, evenly over the classes ({SHOWN_IMAGES})")


def run(arguments: argparse.Namespace, console: Console, world: World) -> None:
    if world.is_main:  # too little work to share among processes
        each_subject(arguments, console, world, partial(run_one, images=arguments.images, console=console))


def run_one(subject: Subject, folder: Path, *, images: int, console: Console) -> dict[str, Any]:
    with one_thread(subject.backend):
        pictured = picture(subject, images)
        explained = explain(subject, pictured, console)
    layers = [step.layer for step in next(iter(explained.values())).steps[1:]]
    report = subject.conditions() | {
        "images": len(pictured.x), "batch_size": len(pictured.x), "randomised_seeds": SEEDS,
        "pictures": [
            {"true": true, "predicted": predicted, "confidence": confidence}
            for true, predicted, confidence in zip(
                pictured.true, pictured.predicted, pictured.confidence, strict=True
            )
        ],
        "layers": layers, "methods": {name: method.as_json() for name, method in explained.items()},
    }
    report["doubts"] = doubts(report["methods"])
    write_json(folder / "saliency.json", report)
    save_figure(folder / "saliency.png", sheet(subject, pictured, explained))
    save_figure(folder / "saliency-randomised.png", forgetting(subject, pictured, explained, layers))
    print_report(console, report)
    print_doubts(console, report["doubts"])
    names = ("saliency.json", "saliency.png", "saliency-randomised.png")
    console.print(f"written: {', '.join(str(folder / name) for name in names)}")
    return report


# ---------------------------------------------------------------- computing


@torch.no_grad()
def picture(subject: Subject, count: int) -> Pictured:
    """UserError for a model whose logits are no numbers: it predicts nothing that could be explained."""
    x, y = subject.some(count)
    confidence, labels = subject.model(x).softmax(dim=1).max(dim=1)
    if not confidence.isfinite().all():
        raise UserError(f"{subject.file}: the model's logits are not finite; there is nothing to explain")
    names = [name.replace("_", " ") for name in subject.data.classes]
    return Pictured(
        x=x, pixels=for_display(make_space(subject).pixels(x)), true=[names[label] for label in y],
        predicted=[names[label] for label in labels], confidence=confidence.tolist(), labels=labels,
    )


def explain(subject: Subject, pictured: Pictured, console: Console) -> dict[str, Explained]:
    """Each method's maps of the classes predicted, while the model forgets."""
    layers, _ = layers_and_predictions(subject.model, pictured.x)
    # What `randomised_parameters` comes to in the end, without the way there.
    other = reinitialised(subject.model, layers, SEEDS[1]).to(subject.device)
    explained = {}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(METHODS) * (len(layers) + 2))
        for name, method in METHODS.items():
            progress.update(task, description=f"layers forgotten: {name}")
            counted = followed_by(method, partial(progress.advance, task))
            steps = randomised_parameters(subject.model, pictured.x, counted, pictured.labels, seed=SEEDS[0])
            last = counted(other, pictured.x, pictured.labels)
            explained[name] = Explained(steps=steps, floor=mean(rank_correlation(steps[-1].maps, last)))
    return explained


def followed_by(method: Method, action: Callable[[], None]) -> Method:
    def call(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        maps = method(model, x, labels)
        action()
        return maps

    return call


def mean(correlation: Tensor) -> float | None:
    """Over the images that have one: a constant map, as Grad-CAM's may be, has no ranks. None where no image has."""
    value = correlation.nanmean().item()
    return None if math.isnan(value) else value


def doubts(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Signs that a method's maps do not show what the model learned."""
    found = []
    for name, figures in methods.items():
        last = figures["correlations"][-1]
        if all(value is None for value in figures["correlations"]):
            found.append(f"{name}: no map has ranks to correlate, as maps that are 0 everywhere")
        elif last is not None and last > STAYS:
            found.append(f"{name}: the maps stay as they were (rank correlation {last:.2f}) when the model has "
                         "forgotten everything: they explain the image, not the model")
    return found


# ---------------------------------------------------------------- what is shown


def print_report(console: Console, report: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="rank correlation with the maps of the model as it is")
    table.add_column("method")
    for column in (f"{report['layers'][0]} forgotten", "all forgotten", "floor"):
        table.add_column(column, justify="right")
    for name, figures in report["methods"].items():
        first, last = figures["correlations"][0], figures["correlations"][-1]
        stays = last is not None and last > STAYS
        table.add_row(name, in_words(first), Text(in_words(last), "bold red" if stays else ""),
                      in_words(figures["floor"]))
    console.print(table)
    console.print(
        "Maps of the predicted classes; means over the images. Layers are randomised from the output to the "
        f"input; the floor is what two models with no layer left have in common. {describe(report)}"
    )


def in_words(correlation: float | None) -> str:
    return "-" if correlation is None or math.isnan(correlation) else f"{correlation:z.2f}"


def red_over(pictures: Tensor, maps: Tensor, *, opacity: float = OPACITY) -> Tensor:
    """pictures (N, S, S, 3) of 0 ... 1 with each map (N, S, S) as red patches over it; where it is 0, the picture."""
    top = maps.flatten(1).quantile(FULL, dim=1)
    top = torch.where(top > 0, top, maps.flatten(1).amax(1))[:, None, None]  # of a map of a few pixels
    alpha = opacity * torch.where(top > 0, maps / top, 0).clamp(0, 1)[..., None]  # (N, S, S, 1)
    return (1 - alpha) * pictures + alpha * torch.tensor([1.0, 0.0, 0.0])


def sheet(subject: Subject, pictured: Pictured, explained: dict[str, Explained]) -> Figure:
    """A row an image: itself, its true class at the left and the predicted one below, and each method's map over it."""
    rows, columns = len(pictured.x), 1 + len(explained)
    figure = Figure(figsize=(INCHES * columns + 1.1, (INCHES + 0.3) * rows + 1.1), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    axes[0, 0].set_title("image", fontsize="medium")
    for row in range(rows):
        cell, right = axes[row, 0], pictured.true[row] == pictured.predicted[row]
        show(cell, pictured.pixels[row])
        cell.set_ylabel(textwrap.fill(pictured.true[row], 16), fontsize="medium")
        caption = f"{pictured.predicted[row]} {100 * pictured.confidence[row]:.0f}%"
        cell.set_xlabel(textwrap.fill(caption, LINE), fontsize="small", color=RIGHT if right else WRONG)
    for column, (name, method) in enumerate(explained.items(), start=1):
        axes[0, column].set_title(heading(name, subject.model), fontsize="medium")
        maps = method.maps
        patched = red_over(pictured.pixels, maps)
        for row in range(rows):
            show(axes[row, column], patched[row])
            if not maps[row].any():
                axes[row, column].set_xlabel("0 everywhere", fontsize="small")
    figure.suptitle(
        f"{subject.settings.model}: where it looks for the class that it predicts\n"
        "(left: the true class; below: the predicted one; redder: more)", fontsize="medium",
    )
    return figure


def heading(name: str, model: nn.Module) -> str:
    """A method's name, and for Grad-CAM the layer it looks into."""
    if METHODS[name] is not last_grad_cam:
        return name
    layer = last_convolution(model)
    if is_patch_embedding(model, layer):
        return f"{name}\nof the patch embedding:\nit shows little"
    return f"{name} of\n{next(path for path, module in model.named_modules() if module is layer)}"


def is_patch_embedding(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a model's last convolution cuts the image into patches, and is the only one."""
    alone = sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 1
    return alone and layer.kernel_size == layer.stride


def forgetting(subject: Subject, pictured: Pictured, explained: dict[str, Explained], layers: list[str]) -> Figure:
    """Correlations along the layers forgotten, above the first method's maps of some images at a few of them."""
    rows = min(CASCADE_IMAGES, len(pictured.x))
    name, method = next(iter(explained.items()))
    chosen = sorted({round(place) for place in torch.linspace(1, len(layers), CASCADE_LAYERS).tolist()})
    width = max(1.5 * (2 + CASCADE_LAYERS), 0.24 * len(layers) + 2)
    heights = [5, 2 * rows + 0.4]  # inches
    figure = Figure(figsize=(width, sum(heights)), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    curves(above.subplots(), layers, explained)
    white = torch.ones_like(pictured.pixels)
    columns = [("image", pictured.pixels), ("as trained", red_over(white, method.maps, opacity=1))]
    columns += [
        (f"{layers[place - 1]}\nforgotten", red_over(white, method.steps[place].maps.cpu(), opacity=1))
        for place in chosen
    ]
    axes = below.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize="small")
        for row in range(rows):
            show(axes[row, column], pictures[row])
    for row in range(rows):
        axes[row, 0].set_ylabel(textwrap.fill(pictured.true[row], 16), fontsize="medium")
        for column, place in enumerate(chosen, start=2):
            value = in_words(method.steps[place].correlation[row].item())
            axes[row, column].set_xlabel(f"correlation {value}", fontsize="small")
    below.suptitle(f"{name}: maps of the class predicted at first", fontsize="medium")
    figure.suptitle(
        f"{subject.settings.model}: do the maps depend on what it learned? Means over {len(pictured.x)} images of "
        f"{Path(subject.settings.data).name}", fontsize="medium",
    )
    return figure


def curves(axes: Axes, layers: list[str], explained: dict[str, Explained]) -> None:
    """Mean correlations over the layers forgotten, and each method's floor in dashes."""
    for (name, method), colour in zip(explained.items(), COLOURS, strict=False):
        known = [math.nan if (value := mean(step.correlation)) is None else value for step in method.steps]
        axes.plot(range(len(known)), known, marker="o", markersize=4, color=colour, label=name)
        if method.floor is not None:
            axes.axhline(method.floor, linestyle="--", linewidth=1, color=colour)
    axes.plot([], [], linestyle="--", linewidth=1, color="grey", label="floors: what two models without memory share")
    axes.set_xticks(range(len(layers) + 1), ["as trained", *layers], rotation=90, fontsize="small")
    axes.set(xlabel="layer forgotten last, from the output to the input", ylabel="rank correlation with the maps\n"
             "of the model as trained", ylim=(min(-0.1, axes.get_ylim()[0]), 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(explained) + 1, frameon=False)
