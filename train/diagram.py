"""A picture of a model's architecture, drawn from the model itself: python -m train.diagram customnet"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.diagram")

import argparse
import itertools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line
from torch import nn

import models
from train.architecture import Layer, is_leaf, skip_of, trace
from train.cli import Parser, UserError, number, path, run_command
from train.files import atomic_write


@dataclass(kw_only=True, eq=False, slots=True)
class Row:
    """A line of the picture: a layer and those that only follow it, or the place where a skip connection ends."""

    layers: list[Layer]
    block: str
    """The part of the model it is drawn in."""
    aside: list[Layer] = field(default_factory=list)
    """For a sum: the layers on its skip connection."""
    tap: Layer | None = None
    """For a sum: the layer after which its skip connection leaves."""


def make_rows(layers: list[Layer], model: nn.Module) -> list[Row]:
    """The rows in their order, without the layers that lie on a skip connection."""
    skips = {layer: skip_of(layer) for layer in layers if layer.kind == "add"}
    aside = set(itertools.chain.from_iterable(on_it for _, on_it in skips.values()))
    uses = [source for layer in layers for source in layer.sources]
    rows: list[Row] = []
    for layer in layers:
        if layer in aside:
            continue
        block = block_of(layer, model)
        follows = rows and layer.kind == "follower" and layer.sources == rows[-1].layers[-1:]
        if follows and rows[-1].block == block and uses.count(layer.sources[0]) == 1:
            rows[-1].layers.append(layer)
        else:
            tap, on_it = skips.get(layer, (None, []))
            rows.append(Row(layers=[layer], block=block, aside=on_it, tap=tap))
    return rows


def block_of(layer: Layer, model: nn.Module) -> str:
    """The child of the model that a layer is in, or its child where it only holds blocks; "" for single layers."""
    if layer.kind == "input":
        return "input"
    first, *rest = layer.path.split(".")
    child = getattr(model, first, None) if first else None
    if child is None or is_leaf(child):
        return ""
    holds_blocks = not any(is_leaf(grandchild) for grandchild in child.children())
    return ".".join([first, *rest[:holds_blocks]])


# Everything below is in inches.
ROW, GAP = 0.3, 0.17  # a row's height, and the room between two for the arrow
HEADER, BETWEEN = 0.32, 0.3  # a block's name, and the room between two blocks
WIDTH, SHAPE = 3.6, 1.1  # a row, and the shape to its right
SUM, SUM_AND = 0.3, 1.2  # the width of a sum, alone and with what follows it
LANE, WIDE_LANE = 0.45, 1.75  # left of the rows, for skip connections; the wide one for those with layers on them
MARGIN, TITLE, GUTTER = 0.25, 0.55, 0.35
ASPECT = 1.5  # of the picture, more or less

COLOURS = {
    "input": "#ffffff", "conv": "#cfe2f7", "linear": "#e2d6f3", "pool": "#d5ecd4", "attention": "#fbe0c4",
    "add": "#ffffff", "follower": "#f6efc6", "other": "#ececec",
}  # fmt: skip
EDGE, FAINT, FRAME, SKIP = "#44546a", "#5f6b7a", "#f5f7fa", "#c0504d"


@dataclass(kw_only=True, slots=True)
class Block:
    """Rows in one frame."""

    name: str
    rows: list[Row]

    @property
    def height(self) -> float:
        return HEADER + len(self.rows) * (ROW + GAP)


def make_blocks(rows: list[Row]) -> list[Block]:
    blocks = []
    for name, group in itertools.groupby(rows, key=lambda row: row.block):
        rows_of = list(group)
        names = dict.fromkeys(layer.path for row in rows_of for layer in row.layers if layer.path)
        blocks.append(Block(name=name or ", ".join(names), rows=rows_of))
    return blocks


def into_columns(blocks: list[Block], lane: float) -> list[list[Block]]:
    """The blocks in as many columns, of about the same height, as come closest to ASPECT."""

    def off(columns: list[list[Block]]) -> float:
        width = len(columns) * (lane + WIDTH + SHAPE + GUTTER)
        return abs(math.log(width / (max(map(height_of, columns)) + TITLE) / ASPECT))

    return min((fill(blocks, number) for number in range(1, 7)), key=off)


def height_of(column: list[Block]) -> float:
    return sum(block.height + BETWEEN for block in column)


def fill(blocks: list[Block], most: int) -> list[list[Block]]:
    """The blocks in order in at most so many columns, as low as they can be to within 2%."""
    height = height_of(blocks) / most
    while True:
        columns: list[list[Block]] = [[]]
        for block in blocks:
            if columns[-1] and height_of([*columns[-1], block]) > height:
                columns.append([])
            columns[-1].append(block)
        if len(columns) <= most:
            return columns
        height *= 1.02


def draw(model: nn.Module, layers: list[Layer], title: str) -> Figure:
    rows = make_rows(layers, model)
    lane = WIDE_LANE if any(row.aside for row in rows) else LANE
    columns = into_columns(make_blocks(rows), lane)
    pitch = lane + WIDTH + SHAPE + GUTTER
    width = len(columns) * pitch - GUTTER + 2 * MARGIN
    height = max(map(height_of, columns)) - BETWEEN + TITLE + 2 * MARGIN
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(MARGIN, MARGIN + 0.12, title, fontsize=13, fontweight="bold", va="center", color=EDGE)

    middles: dict[Row, tuple[float, float]] = {}
    for index, column in enumerate(columns):
        left, top = MARGIN + index * pitch, MARGIN + TITLE
        for block in column:
            frame(axes, left, top, lane + WIDTH + SHAPE, block.height, block.name)
            for line, row in enumerate(block.rows):
                middles[row] = (left + lane + WIDTH / 2, top + HEADER + (GAP + ROW) / 2 + line * (ROW + GAP))
            top += block.height + BETWEEN
    for row, middle in middles.items():
        draw_row(axes, row, *middle)
    for before, after in itertools.pairwise(rows):
        flow(axes, middles[before], middles[after], lane)
    for row in rows:
        if row.tap is not None:
            tapped = next(i for i, other in enumerate(rows) if row.tap in other.layers)
            skip(axes, row, middles[rows[tapped + 1]], middles[row], lane)
    return figure


def frame(axes: Axes, left: float, top: float, width: float, height: float, name: str) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((left, top), width, height, boxstyle=style, facecolor=FRAME, edgecolor="#c5ccd6", linewidth=0.8)
    )
    axes.text(left + 0.1, top + 0.15, name, fontsize=9, fontweight="bold", va="center", color=FAINT)


def draw_row(axes: Axes, row: Row, x: float, y: float) -> None:
    first, *others = row.layers
    left, right = x - WIDTH / 2, x + WIDTH / 2
    followers = ", ".join(layer.label for layer in others)
    if first.kind == "add":
        box(axes, x, y, sum_width(row), "add", f"+, {followers}" if followers else "+")
    else:
        box(axes, x, y, WIDTH, first.kind, "")
        axes.text(left + 0.1, y, first.label, fontsize=9, va="center", zorder=4)
        axes.text(right - 0.1, y, followers, fontsize=8, va="center", ha="right", color=FAINT, zorder=4)
    axes.text(right + 0.08, y, " × ".join(map(str, row.layers[-1].shape)), fontsize=8, va="center", color=FAINT)


def sum_width(row: Row) -> float:
    return SUM if len(row.layers) == 1 else SUM_AND


def box(axes: Axes, x: float, y: float, width: float, kind: str, text: str, height: float = ROW) -> None:
    """A rounded box around (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=COLOURS[kind], edgecolor=EDGE, linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    axes.text(x, y, text, fontsize=8, ha="center", va="center", linespacing=1.35, zorder=4)


def flow(axes: Axes, start: tuple[float, float], end: tuple[float, float], lane: float) -> None:
    """The arrow from one row to the next; to the head of the next column along the gutter between them."""
    (x0, y0), (x1, y1) = start, end
    y0, y1 = y0 + ROW / 2, y1 - ROW / 2
    if x0 == x1:
        arrow(axes, [(x0, y0), (x1, y1)])
    else:
        gutter = x1 - WIDTH / 2 - lane - GUTTER / 2
        below, above = y0 + GAP / 2 + 0.1, y1 - HEADER - GAP - 0.05
        arrow(axes, [(x0, y0), (x0, below), (gutter, below), (gutter, above), (x1, above), (x1, y1)])


def skip(axes: Axes, row: Row, after_tap: tuple[float, float], total: tuple[float, float], lane: float) -> None:
    """The skip connection that leaves above the row at `after_tap` and ends in the sum at `total`."""
    (x, y0), (_, y1) = after_tap, total
    y0 -= ROW / 2 + GAP * 0.6
    side = x - WIDTH / 2 - lane / 2
    arrow(axes, [(x, y0), (side, y0), (side, y1), (x - sum_width(row) / 2, y1)], colour=SKIP)
    if row.aside:
        text = "\n".join(layer.label.replace(", ", "\n") for layer in row.aside)
        height = 0.14 + 0.16 * len(text.splitlines())
        box(axes, side, (y0 + y1) / 2, lane - 0.25, row.aside[0].kind, text, height)


def arrow(axes: Axes, points: list[tuple[float, float]], colour: str = EDGE) -> None:
    """An arrow along `points` with rounded corners."""
    vertices, codes = [points[0]], [Line.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [towards(corner, before), corner, towards(corner, after)]
        codes += [Line.LINETO, Line.CURVE3, Line.CURVE3]
    line = Line([*vertices, points[-1]], [*codes, Line.LINETO])
    axes.add_patch(
        FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.2, zorder=2, shrinkB=0)
    )


def towards(start: tuple[float, float], end: tuple[float, float], radius: float = 0.12) -> tuple[float, float]:
    """The point `radius` away from `start` on the way to `end`, at most half way."""
    share = min(0.5, radius / max(math.dist(start, end), 1e-9))
    return (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train.diagram",
        usage="python -m train.diagram MODEL [options]",
        description="Draw a model's layers, the shapes between them and its skip connections, as the model itself "
        "tells them when it is run.",
    )
    add = parser.add_argument
    add("model", choices=list(models.MODELS), help="what to draw")
    add("--conv", choices=list(models.CONVOLUTIONS), default="torch", help="which convolution (default: torch)")
    add("--image-size", type=number(int, least=8, most=4096), default=128, metavar="N", help="side in pixels (128)")
    classes = number(int, above=0, most=10**6)
    add("--num-classes", type=classes, default=100, metavar="N", help="classes to tell apart (100)")
    add("--out", type=path, metavar="FILE.png", help="the picture (default: MODEL.png)")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(f"{arguments.model}.png")
    if out.suffix != ".png":
        raise UserError(f"--out {out}: pictures are PNG; name a file that ends in .png")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    size, classes = arguments.image_size, arguments.num_classes
    try:
        with torch.device("meta"):
            model = models.build(arguments.model, arguments.conv, classes, size)
    except ValueError as error:
        raise UserError(str(error)) from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    title = f"{arguments.model}: {parameters:,} parameters, images of {size} × {size}, {classes} classes"
    figure = draw(model, trace(model, size), title)
    with atomic_write(out) as file:
        figure.savefig(file, format="png", dpi=130)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
