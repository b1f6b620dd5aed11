"""The rooflines: each GPU's, with the speed that the bound leaves each row."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.measure.bound import LABEL
from bench.measure.gpus import GPUS
from bench.report_card.card import DTYPES, FUSED, OPERATIONS, Row
from train.files import atomic_write

MARKS = dict(zip((*OPERATIONS, *FUSED), "os^Dpv", strict=True))
SIZES = dict(zip((*OPERATIONS, *FUSED), (9, 6, 5, 9, 6, 5), strict=True))
"""Hollow and of several sizes, so that operations with the same figures are all seen."""
VARIANTS_MARK, VARIANTS_SIZE = "*", 9
LINES = dict(zip(DTYPES, ("-", "--", "-.", ":", (0, (1, 3))), strict=True))
COLOURS = {
    "DRAM": "#1f77b4", "tensor cores": "#2ca02c", "FMA units": "#17becf", "issue": "#d62728",
    "shared memory": "#daa520",
}  # fmt: skip


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Writes the picture as a PNG."""
    with atomic_write(path) as file:
        rooflines(rows).savefig(file, format="png", dpi=110)


def rooflines(rows: Sequence[Row]) -> Figure:
    """One panel a GPU. FLOP are those of useful products, two each; bytes are the compulsory ones."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    figure = Figure(figsize=(1.6 + 4.6 * len(archs), 5), layout="constrained")
    figure.suptitle(f"speed that the time bound leaves: {LABEL}", fontsize=10)
    panels = figure.subplots(1, len(archs), squeeze=False)[0]
    for axes, arch in zip(panels, archs, strict=True):
        draw_panel(axes, arch, [row for row in rows if row.arch == arch])
    panels[0].set_ylabel("TFLOP/s")
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(6, 3 * len(archs))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def draw_panel(axes: Axes, arch: str, rows: Sequence[Row]) -> None:
    gpu = GPUS[arch]
    rows = [row for row in rows if row.useful_multiply_adds and row.bound_seconds]  # others have no speed
    intensities = [2 * row.useful_multiply_adds / row.compulsory_bytes for row in rows]
    ends = min(intensities, default=10) / 3, max(intensities, default=10) * 3
    for name in dict.fromkeys(row.dtype for row in rows):
        top = 2 * gpu.peak(*DTYPES[name])
        knee = min(max(top / gpu.bandwidth, ends[0]), ends[1])
        places = [ends[0], knee, ends[1]]
        heights = [min(top, gpu.bandwidth * place) / 1e12 for place in places]
        axes.plot(places, heights, color="black", linewidth=1, linestyle=LINES[name], label=f"roofline, {name}")
    for row, intensity in zip(rows, intensities, strict=True):
        speed = 2 * row.useful_multiply_adds / row.bound_seconds / 1e12
        colour = COLOURS.get(row.bound_by, "grey")
        style = dict(color=colour, markersize=SIZES.get(row.op, VARIANTS_SIZE), fillstyle="none", linestyle="none")
        axes.plot([intensity], [speed], MARKS.get(row.op, VARIANTS_MARK), **style)
    for op in dict.fromkeys(row.op for row in rows):
        axes.plot([], [], MARKS.get(op, VARIANTS_MARK), color="black", fillstyle="none", linestyle="none", label=op)
    for by in dict.fromkeys(row.bound_by for row in rows):
        axes.plot([], [], "o", color=COLOURS.get(by, "grey"), linestyle="none", label=f"bound by {by}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a compulsory byte", title=f"{gpu.name} ({arch})", xlim=ends)
    axes.title.set_fontsize(9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
