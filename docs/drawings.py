"""The pictures of how-it-works.md, drawn from the geometry itself: python docs/drawings.py

Coordinates are points (1/72 inch), y downwards. Nothing is placed by measuring text, and text stays text in the files,
so that they come out the same on machines with other fonts.
"""

import argparse
import colorsys
import sys
from collections.abc import Callable, Iterable
from itertools import product
from math import prod
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Line

from bench.shapes import Layer, conv_layers
from kernels.geometry import ConvGeometry
from kernels.runtime import MULTIPROCESSORS, launches_ahead
from train.cli import Parser, run_command
from train.files import atomic_write

PICTURES = Path(__file__).resolve().parent / "pictures"
WIDTH = 504
TEXT = 12  # 9 px on a phone 360 px wide

INK, FAINT, HALO = "#222222", "#8a8a8a", "#d9d9d9"
BLUE, DARK_BLUE, ORANGE, GREEN, PURPLE = "#9fc8ee", "#5b9bd8", "#fbc483", "#a5dba3", "#d5b8ea"
"""x is blue, y and dy are orange, w and dw green, wherever colours are not classes or pixels."""
STRONG = "#c0281c"
FONTS = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}

BATCH, IMAGE = 256, 128
EXAMPLE = ConvGeometry.of((1, 1, 4, 4), (1, 1, 3, 3), padding=1)
TILED = ConvGeometry.of((1, 64, 6, 6), (64, 64, 3, 3), padding=1)
TILE = range(16)
"""The output pixels of the program that implicit-gemm.svg shows: its BLOCK_M rows of the GEMM."""
STRIDED = ConvGeometry.of((1, 1, 8, 8), (1, 1, 3, 3), stride=2, padding=1)
GPU = "sm_80"

Place = tuple[int, int]


# What is drawn, as numbers.


def taps(geometry: ConvGeometry) -> list[Place]:
    """The filter's places (r, s), in the order of the unfolded matrix's columns."""
    return list(product(range(geometry.R), range(geometry.S)))


def pixel_under(geometry: ConvGeometry, output: int, tap: Place) -> Place:
    """The row and column of x that output pixel p*Q + q of the first image reads at a tap, outside x for the halo."""
    g, (p, q), (r, s) = geometry, divmod(output, geometry.Q), tap
    return p * g.SH + r * g.DH - g.PH, q * g.SW + s * g.DW - g.PW


def is_inside(geometry: ConvGeometry, pixel: Place) -> bool:
    return 0 <= pixel[0] < geometry.H and 0 <= pixel[1] < geometry.W


def unfolded(geometry: ConvGeometry) -> list[list[int | None]]:
    """Which pixel h*W + w of a single channel stands where in the unfolded matrix [P*Q, R*S]; None for the halo."""

    def number(pixel: Place) -> int | None:
        return pixel[0] * geometry.W + pixel[1] if is_inside(geometry, pixel) else None

    outputs = range(geometry.P * geometry.Q)
    return [[number(pixel_under(geometry, output, tap)) for tap in taps(geometry)] for output in outputs]


def readers(geometry: ConvGeometry, pixel: Place) -> dict[Place, Place]:
    """The taps that an input pixel meets, each with the output pixel (p, q) that reads it there, inside dy or not."""
    g, (h, w) = geometry, pixel
    found = {}
    for r, s in taps(g):
        (p, rest_h), (q, rest_w) = divmod(h + g.PH - r * g.DH, g.SH), divmod(w + g.PW - s * g.DW, g.SW)
        if rest_h == rest_w == 0:
            found[r, s] = p, q
    return found


def simplenet(name: str) -> Layer:
    """A layer of SimpleNet by its name."""
    return next(layer for layer in conv_layers("simplenet", BATCH, IMAGE) if layer.name == name)


def mib(*extents: int, itemsize: int = 4) -> float:
    """Of so many elements, float32 unless told."""
    return prod(extents) * itemsize / 2**20


def title_of(layer: Layer) -> str:
    """As "3×3, 64→64"."""
    g = layer.geometry
    return f"{g.R}×{g.S}{f'/{g.SH}' if g.SH > 1 else ''}, {g.Ci}→{g.Co}"


# How it is drawn.


def sheet(height: float) -> tuple[Figure, Axes]:
    """A white sheet of WIDTH x height points."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def write(axes: Axes, x: float, y: float, words: str, *, at: str = "left", size: float = TEXT, **style) -> None:
    """Lines of words from a baseline down."""
    for line, text in enumerate(words.split("\n")):
        axes.text(x, y + 1.35 * size * line, text, ha=at, va="baseline", fontsize=size, **{"color": INK} | style)


def boxes(axes: Axes, corners: Iterable[tuple[float, float]], width: float, height: float, fill: str, **style) -> None:
    """Equal boxes, as one path: a tenth of the file that single ones make."""
    path = [
        Line([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)], closed=True)
        for x, y in corners
    ]
    if path:
        options = dict(facecolor=fill, edgecolor=INK, linewidth=0.6, clip_on=False) | style
        axes.add_patch(PathPatch(Line.make_compound_path(*path), **options))


def cells(axes: Axes, x: float, y: float, size: float, places: Iterable[Place], fill: str, **style) -> None:
    """Squares of a grid whose cell (row 0, column 0) has its corner at x, y."""
    boxes(axes, [(x + column * size, y + row * size) for row, column in places], size, size, fill, **style)


def in_cell(axes: Axes, x: float, y: float, size: float, place: Place, word: str, **style) -> None:
    row, column = place
    write(axes, x + (column + 0.5) * size, y + (row + 0.5) * size + 4, word, at="center", **{"size": 11} | style)


def outline(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    boxes(axes, [(x, y)], width, height, "none", edgecolor=STRONG, linewidth=2.2)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=INK, shrinkA=0, shrinkB=0))


def padded(geometry: ConvGeometry) -> list[Place]:
    """The pixels of x and of its halo."""
    g = geometry
    return list(product(range(-g.PH, g.H + g.PH), range(-g.PW, g.W + g.PW)))


def shade(geometry: ConvGeometry, pixel: int) -> str:
    """A hue for each image row, lighter from column to column."""
    row, column = divmod(pixel, geometry.W)
    hue = (0.58, 0.10, 0.36, 0.80)[row % 4]
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue, 0.62 - 0.14 * (column % 4), 0.97)
    )


def draw_unfold() -> Figure:
    g, size = EXAMPLE, 26
    figure, axes = sheet(496)
    x, y = 10 + size, 84 + size
    cells(axes, x, y, size, [pixel for pixel in padded(g) if not is_inside(g, pixel)], HALO)
    pixels = {number: divmod(number, g.W) for number in range(g.H * g.W)}
    for number, place in pixels.items():
        cells(axes, x, y, size, [place], shade(g, number))
        in_cell(axes, x, y, size, place, str(number))
    matrix, left, top, height = unfolded(g), 258, 84, 25
    shown = 5  # an output pixel whose window lies inside
    p, q = divmod(shown, g.Q)
    outline(axes, x + (q - g.PW) * size, y + (p - g.PH) * size, g.S * size, g.R * size)
    for row, column in product(range(g.P * g.Q), range(g.R * g.S)):
        number = matrix[row][column]
        corner = left + column * size, top + row * height
        boxes(axes, [corner], size, height, HALO if number is None else shade(g, number))
        word = "0" if number is None else str(number)
        colour = FAINT if number is None else INK
        write(axes, corner[0] + size / 2, corner[1] + 17, word, at="center", size=11, color=colour)
    outline(axes, left, top + shown * height, g.R * g.S * size, height)
    for row in range(g.P * g.Q):
        write(axes, left - 6, top + row * height + 17, f"{row // g.Q},{row % g.Q}", at="right", size=11)
    for column, (r, s) in enumerate(taps(g)):
        write(axes, left + (column + 0.5) * size, top - 6, f"{r},{s}", at="center", size=11)
    write(axes, 10, 22, f"x, {g.H}×{g.W} pixels", weight="bold")
    write(axes, 10, 40, f"with the halo of zeros that\npadding {g.PH} puts around it")
    write(axes, left, 22, f"unfolded: {g.P * g.Q} rows × {g.R * g.S} columns", weight="bold")
    write(axes, left, 40, "a row an output pixel (p,q),\na column a tap (r,s)")
    copies = sum(row.count(shown) for row in matrix)
    write(axes, 10, 270, f"Red: the window of output\npixel ({p},{q}) is one row.")
    corner_copies = sum(row.count(0) for row in matrix)
    write(axes, 10, 318, f"Pixel {shown} lies under {copies}\nwindows: it is in {copies} rows.")
    write(axes, 10, 366, f"Pixel 0, in the corner,\nis in {corner_copies} rows.")
    elements = sum(map(len, matrix))
    words = f"{g.H * g.W} pixels become\n{elements} matrix elements,\n{elements // (g.H * g.W)} times as many."
    write(axes, 10, 414, words)
    return figure


def draw_gemm() -> Figure:
    layer = simplenet("conv3x3-64")
    g = layer.geometry
    M, N, K = g.N * g.P * g.Q, g.Co, g.R * g.S * g.Ci
    scale, tall, middle = 0.3, 120, 130
    wide, narrow = K * scale, N * scale
    x, w, y = 30, 80 + wide, 190 + wide + narrow
    figure, axes = sheet(520)
    write(axes, 10, 22, f"One GEMM: SimpleNet's {title_of(layer)}, {g.N} images, {g.H}×{g.W}", weight="bold")
    boxes(axes, [(x, middle - tall / 2)], wide, tall, BLUE)
    boxes(axes, [(w, middle - wide / 2)], narrow, wide, GREEN)
    boxes(axes, [(y, middle - tall / 2)], narrow, tall, ORANGE)
    write(axes, x + wide / 2, middle - 4, "unfolded x", at="center")
    write(axes, x + wide / 2, middle + 14, f"{M:,} × {K}", at="center")
    write(axes, x + wide / 2, middle - tall / 2 - 8, f"K = R·S·Ci = {K}", at="center")
    write(axes, x - 10, middle, "M", at="right", weight="bold")
    write(axes, (x + wide + w) / 2, middle + 5, "×", at="center", size=18)
    write(axes, w + narrow / 2, middle + 5, "w", at="center")
    write(axes, w + narrow + 10, middle - 60, f"{K} × {N}\n(N = Co)")
    write(axes, w + narrow + 42, middle + 5, "=", at="center", size=18)
    write(axes, y + narrow / 2, middle + 5, "y", at="center")
    write(axes, y + narrow / 2, middle + tall / 2 + 18, f"{M:,} × {N}", at="center")
    write(axes, x, middle + tall / 2 + 18, f"M = N·P·Q = {M:,},\n{M / K:,.0f} times K (not to scale)")
    top = 268
    write(axes, 10, top, f"MiB of x → of x unfolded (float32, {BATCH} images of {IMAGE} px)", weight="bold")
    layers = conv_layers("simplenet", BATCH, IMAGE)
    longest = max(mib(h.N, h.P, h.Q, h.R, h.S, h.Ci) for h in (layer.geometry for layer in layers))
    for line, each in enumerate(layers):
        h, bars = each.geometry, top + 14 + 33 * line
        write(axes, 116, bars + 18, title_of(each), at="right")
        sizes = mib(*h.x_shape), mib(h.N, h.P, h.Q, h.R, h.S, h.Ci)
        for bar, (size, fill) in enumerate(zip(sizes, (DARK_BLUE, BLUE), strict=True)):
            boxes(axes, [(124, bars + 13 * bar)], 300 * size / longest, 13, fill)
        write(axes, 132 + 300 * max(sizes) / longest, bars + 18, f"{sizes[0]:g} → {sizes[1]:g}")
    return figure


def draw_implicit() -> Figure:
    g, size = TILED, 20
    figure, axes = sheet(716)
    inside = [pixel for pixel in padded(g) if is_inside(g, pixel)]
    outside = [pixel for pixel in padded(g) if not is_inside(g, pixel)]
    x, y, out = 10 + size, 90 + size, 300
    reads = {pixel_under(g, output, tap) for output in TILE for tap in taps(g)}
    masked = [pixel for pixel in outside if pixel in reads]
    cells(axes, x, y, size, outside, "white", edgecolor=FAINT)
    cells(axes, x, y, size, inside, "white")
    cells(axes, x, y, size, [pixel for pixel in inside if pixel in reads], BLUE)
    cells(axes, x, y, size, masked, HALO, edgecolor=FAINT)
    for pixel in masked:
        in_cell(axes, x, y, size, pixel, "0", color=FAINT)
    cells(axes, out, y, size, product(range(g.P), range(g.Q)), "white")
    cells(axes, out, y, size, [divmod(output, g.Q) for output in TILE], ORANGE)
    for output in TILE:
        in_cell(axes, out, y, size, divmod(output, g.Q), str(output))
    arrow(axes, (x + (g.W + 1) * size + 16, y + 3 * size), (out - 16, y + 3 * size))
    write(axes, 10, 22, "What one program reads of x", weight="bold")
    write(axes, 10, 40, "blue: pixels of the image\ngrey: halo, masked, counts as 0")
    write(axes, out, 22, "What it computes of y", weight="bold")
    write(axes, out, 40, f"BLOCK_M = {len(TILE)} pixels of y\n(by BLOCK_N channels)")
    top, small = 336, 12
    write(axes, 10, top - 38, "Its loop: tap after tap, all pixels of the tile at once", weight="bold")
    write(axes, 10, top - 20, "(within a tap: channel block after channel block)")
    for number, (r, s) in enumerate(taps(g)):
        left, down = 26 + 164 * s + small, top + 20 + 124 * r + small
        under = [pixel_under(g, output, (r, s)) for output in TILE]
        write(axes, left - small, down - small - 5, f"tap {number}: r={r}, s={s}")
        cells(axes, left, down, small, outside, "white", edgecolor="#eeeeee")
        cells(axes, left, down, small, inside, "white", edgecolor=FAINT)
        cells(axes, left, down, small, [pixel for pixel in under if not is_inside(g, pixel)], HALO)
        cells(axes, left, down, small, [pixel for pixel in under if is_inside(g, pixel)], BLUE)
    return figure


def draw_residues() -> Figure:
    g, size = STRIDED, 20
    figure, axes = sheet(580)
    classes = list(product(*map(range, g.residue_classes)))
    fills = dict(zip(classes, (BLUE, ORANGE, GREEN, PURPLE), strict=True))
    x, y = 10, 70
    for a, b in classes:
        cells(axes, x, y, size, product(range(a, g.H, g.SH), range(b, g.W, g.SW)), fills[a, b])
    write(axes, x, 22, f"dx, {g.H}×{g.W}", weight="bold")
    write(axes, x, 40, "(h mod 2, w mod 2)\nis a pixel's class")
    meets = {(a, b): readers(g, (a + g.SH, b + g.SW)) for a, b in classes}  # of the class's pixel i = j = 1
    filter_x, filter_size = 222, 40
    write(axes, filter_x, 22, f"w, {g.R}×{g.S}", weight="bold")
    write(axes, filter_x, 40, "a tap serves one class")
    for name, found in meets.items():
        cells(axes, filter_x, y, filter_size, found, fills[name])
    for r, s in taps(g):
        in_cell(axes, filter_x, y, filter_size, (r, s), f"{r},{s}")
    aside = 374
    write(axes, aside, 22, "taps to a pixel", weight="bold")
    for line, (name, found) in enumerate(meets.items()):
        boxes(axes, [(aside, y + 26 * line)], 14, 14, fills[name])
        write(axes, aside + 22, y + 26 * line + 12, f"class {name[0]},{name[1]}: {len(found)}")
    total = sum(map(len, meets.values()))
    write(axes, aside, y + 26 * len(classes) + 18, f"together {total} = R·S")
    top, cell = 304, 24
    write(axes, 10, top - 38, f"dy, {g.P}×{g.Q}", weight="bold")
    write(axes, 10, top - 20, "what the pixel i = j = 1 of each class reads, and through which tap")
    for place, (name, found) in enumerate(meets.items()):
        left, down = 10 + 252 * (place % 2), top + 24 + 134 * (place // 2)
        h, w = name[0] + g.SH, name[1] + g.SW
        write(axes, left, down - 8, f"class {name[0]},{name[1]}: dx at ({h},{w})")
        cells(axes, left, down, cell, product(range(g.P), range(g.Q)), "white")
        for tap, pixel in found.items():
            cells(axes, left, down, cell, [pixel], fills[name])
            in_cell(axes, left, down, cell, pixel, f"{tap[0]},{tap[1]}")
    return figure


def draw_split_k() -> Figure:
    layer = simplenet("conv3x3-64")
    g = layer.geometry
    main, second = launches_ahead(
        "weight_grad", layer.x_shape, layer.w_shape, stride=layer.stride, padding=layer.padding,
        dtype=torch.float16, arch=GPU,
    )  # fmt: skip
    tiles, splits = main.grid
    M, N, K, steps, terms = (main.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "STEPS", "TERMS"))
    figure, axes = sheet(466)
    write(axes, 10, 22, f"dw of SimpleNet's {title_of(layer)}, {g.N} images, fp16, tiles of {GPU}", weight="bold")
    write(axes, 10, 42, f"dw has {g.Co} × {g.R * g.S * g.Ci} elements: {tiles} tiles of {M} × {N}, each summed over")
    wide, top = WIDTH - 20, 84
    write(axes, 10, top - 8, f"N·P·Q = {g.N * g.P * g.Q:,} output pixels, cut into {splits} parts:")
    part = wide / splits
    for odd, fill in enumerate((ORANGE, "white")):
        boxes(axes, [(10 + part * number, top) for number in range(odd, splits, 2)], part, 30, fill)
    rest = terms - (splits - 1) * steps
    write(axes, 10, top + 50, f"parts 0 to {splits - 2}: {steps} steps of {K} pixels; part {splits - 1}: {rest}")
    row, box = 200, 74
    shown = (0, 1, 2, None, splits - 1)
    lefts = [10 + (box + 28) * place for place in range(len(shown))]
    write(axes, 10, row - 28, f"First pass: {tiles} × {splits} = {tiles * splits} programs on {MULTIPROCESSORS[GPU]} "
          f"multiprocessors", weight="bold")
    for left, number in zip(lefts, shown, strict=True):
        if number is None:
            write(axes, left + box / 2, row + 34, "…", at="center", size=20)
            continue
        boxes(axes, [(left, row)], box, 56, (ORANGE, "white")[number % 2])
        write(axes, left + box / 2, row + 24, f"part {number}", at="center")
        write(axes, left + box / 2, row + 42, "its sum", at="center")
        arrow(axes, (left + box / 2, row + 56), (left + box / 2, row + 84))
    store = row + 84
    boxes(axes, [(10, store)], wide, 44, GREEN)
    write(axes, WIDTH / 2, store + 18, f"workspace [{splits}, Co, R, S, Ci], fp32", at="center")
    words = f"{mib(splits, *g.w_shape):.2f} MiB; a place of its own for each sum"
    write(axes, WIDTH / 2, store + 35, words, at="center")
    write(axes, 10, store + 78, "Second pass: one fixed order, no atomics", weight="bold")
    line = store + 104
    write(axes, WIDTH / 2, line, f"dw = (…((sum 0 + sum 1) + sum 2) + …) + sum {splits - 1}", at="center", size=14)
    programs, elements = second.grid[0], second.arguments["BLOCK"]
    write(axes, 10, line + 34, f"{programs} programs of {elements} elements. The cut depends on shape,")
    write(axes, 10, line + 50, "tile and device, never on who finishes first: the same bits in every run.")
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "unfold": draw_unfold,
    "gemm": draw_gemm,
    "implicit-gemm": draw_implicit,
    "residue-classes": draw_residues,
    "split-k": draw_split_k,
}


def save(name: str, folder: Path, kind: str = "svg") -> Path:
    """Draws one of DRAWINGS into `folder`; the same bytes each time."""
    path = folder / f"{name}.{kind}"
    with rc_context(FONTS | {"svg.hashsalt": name}), atomic_write(path) as file:
        DRAWINGS[name]().savefig(file, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else None)
    return path


def command(_: argparse.Namespace) -> None:
    PICTURES.mkdir(exist_ok=True)
    for name in DRAWINGS:
        path = save(name, PICTURES)
        sys.stdout.write(f"{path} ({path.stat().st_size / 1000:.0f} kB)\n")


def main(argv: list[str] | None = None) -> None:
    description = "Draws the pictures of docs/how-it-works.md into docs/pictures, from the geometry and the models."
    parser = Parser("python docs/drawings.py", usage="python docs/drawings.py", description=description)
    run_command(parser, command, argv)


if __name__ == "__main__":
    main()
