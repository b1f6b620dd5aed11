"""The tables at the end of a run: ratios of the same run, and on a GPU what the Triton kernels reached."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from bench.measure.predict import MIB
from bench.rows import Row

MAIN = "triton"
"""Whose times are shown, and divided by the others'."""
HEADING_WIDTH = 9
"""Of a column of ratios; longer names are broken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Calls timed in turns."""

    what: str
    """What they do, on which images, by which convolution."""
    seconds: dict[str, float]
    """Medians over the rounds; of the first, which is what is measured, and of the others."""
    ratios: dict[str, float]
    """Of the first to each of the others: medians over the rounds."""


def print_rows(console: Console, rows: Sequence[Row], *, on_gpu: bool) -> None:
    """A table of ratios for each group, of several parts where the contenders are too many for the width."""
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        for table in ratio_tables(console, group, of_group, with_targets=on_gpu):
            console.print(table, "")
        if on_gpu:
            console.print(reached_table(group, of_group), "")


def ratio_tables(console: Console, group: str, rows: Sequence[Row], *, with_targets: bool) -> list[Table]:
    """A line for each layer and type: triton's milliseconds, and its time over the others'.

    Without triton among the rows the first contender takes its place.
    """
    contenders = list(dict.fromkeys(row.contender for row in rows))
    main = MAIN if MAIN in contenders else contenders[0]
    others = [contender for contender in contenders if contender != main]
    targets = {(row.what, row.kind): row.target for row in rows if row.target is not None} if with_targets else {}
    unlimited = console.options.update(width=10**4)
    for most in range(max(1, len(others)), 0, -1):
        parts = [others[start : start + most] for start in range(0, len(others), most)] or [[]]
        tables = [_ratio_table(group, rows, main, part, targets if of_torch(part) else {}) for part in parts]
        if all(Measurement.get(console, unlimited, table).maximum <= console.width for table in tables):
            break
    return tables


def of_torch(contenders: Sequence[str]) -> bool:
    """Whether PyTorch's own convolution is among them, which targets are set by."""
    return any(contender.startswith("torch") for contender in contenders)


def _ratio_table(
    group: str, rows: Sequence[Row], main: str, others: Sequence[str], targets: dict[tuple[str, str], float]
) -> Table:
    seconds = {(row.what, row.kind, row.contender): row.seconds for row in rows}
    table = _table(group)
    backends = dict.fromkeys(row.backend for row in rows if row.contender == main)
    table.add_column("\n".join((main, *backends, "ms")), justify="right", no_wrap=True)
    for other in others:
        table.add_column(heading(f"{main} / {other}"), justify="right", style="bold", no_wrap=True)
    if targets:
        table.add_column("target", justify="right", no_wrap=True)
    for what, kind in _lines(rows):
        time = seconds.get((what, kind, main))
        ratios = [_ratio(time, seconds.get((what, kind, other))) for other in others]
        aim = targets.get((what, kind))
        aims = ([f"<= {aim:.2f}"] if aim is not None else [""]) if targets else []
        table.add_row(what, kind, "-" if time is None else f"{1e3 * time:,.2f}", *ratios, *aims)
    return table


def reached_table(group: str, rows: Sequence[Row]) -> Table:
    """A line for each layer and type: what triton reached; its peak, PyTorch's and the process's memory (NVML)."""
    figures = {(row.what, row.kind, row.contender): row.figures for row in rows}
    table = _table(f"{group}, {MAIN} on this GPU")
    table.padding = 0  # nine columns in 80
    for name in ("TFLOP\n/s", "GB/s", "% of\nroof", "host\nms", "peak\nMiB", "torch\nMiB", "NVML\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for what, kind in _lines(rows):
        ours, theirs = (figures.get((what, kind, contender), {}) for contender in (MAIN, "torch"))
        tflops, share, host = (ours.get(name) for name in ("tflops", "roofline_share", "host_seconds"))
        memory = ours.get("peak_bytes"), theirs.get("peak_bytes"), ours.get("nvml_process_bytes")
        table.add_row(
            what, kind, _number(tflops, 1 if (tflops or 0) < 100 else 0), _number(ours.get("gb_per_s")),
            _number(share and 100 * share), "-" if host is None else f"{1e3 * host:.2g}",
            *(_number(_mib(nbytes)) for nbytes in memory),
        )  # fmt: skip
    return table


def paired_table(section: str, rows: Iterable[Paired]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=section, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for name in ("", "ms", "beside", "ms"):
        table.add_column(name, justify="right" if name == "ms" else "left", overflow="fold")
    table.add_column("ratio", justify="right", style="bold", no_wrap=True)
    for row in rows:
        first, *others = row.seconds
        for other in others:
            table.add_row(
                row.what, first, f"{1e3 * row.seconds[first]:,.1f}", other, f"{1e3 * row.seconds[other]:,.1f}",
                f"{row.ratios[other]:.3f}",
            )  # fmt: skip
    return table


def feeding_table(images_per_s: dict[str, float]) -> Table:
    """Images a second by path, and the cached one's over the others'."""
    table = Table(
        box=box.SIMPLE_HEAD, title="feeding, one CPU thread, 128 px",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for name in ("path", "images/s", "cached / this"):
        table.add_column(name, justify="left" if name == "path" else "right", no_wrap=True)
    cached = images_per_s.get("cached")
    for name, speed in images_per_s.items():
        table.add_row(name, f"{speed:,.0f}", _ratio(cached, speed) if name != "cached" else "")
    return table


def conditions_lines(
    rows: Sequence[Row], skips: Mapping[str, int], ahead: Mapping[str, int | str], device: str, images: int, pixels: int
) -> Iterable[str]:
    """What the tables are worth nothing without."""
    if rows:
        backends = ", ".join(dict.fromkeys(f"{row.contender} {row.backend}" for row in rows))
        yield (
            f"medians; ms and triton's time over the others'; {device}, PyTorch threads {torch.get_num_threads()}; "
            f"rows with a type: batch {images}, {pixels} px; {backends}"
        )
    if any(row.target is not None and row.figures for row in rows):
        yield "target: triton's time over PyTorch's, in either layout; at or below it is aimed at, not asserted"
    if sheets := dict.fromkeys(str(row.figures["roofline"]) for row in rows if "roofline" in row.figures):
        yield f"roofline: {', '.join(sheets)}, by its data sheet"
    if any("peak_bytes" in row.figures for row in rows):
        yield "host: to queue a call of triton's; while it is above the time, training waits for Python"
        yield "MiB: a call of triton's or torch's, above what lay there before; the process, buffers included (NVML)"
    if ahead:
        yield f"compiled before the first row: {ahead['compiled']} of {ahead['of']}" + (
            f" ({ahead['error']})" if "error" in ahead else ""
        )
    for reason, count in skips.items():
        yield f"skipped: {count} row{'s' if count > 1 else ''}: {reason}"
    if any(row.backend == "interpreter" for row in rows):
        yield "[bold]triton: interpreted on a CPU: says nothing about a GPU[/bold]"


def heading(name: str) -> str:
    """In lines of at most HEADING_WIDTH, broken where words end; one that is longer is broken anywhere."""
    parts = re.findall(r"[^-_ ]+[-_]?|/", name)
    return "\n".join(textwrap.wrap(" ".join(parts), HEADING_WIDTH)).replace("- ", "-").replace("_ ", "_")


def _table(title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("", overflow="fold")
    table.add_column("type", no_wrap=True)
    return table


def _lines(rows: Sequence[Row]) -> Iterable[tuple[str, str]]:
    return dict.fromkeys((row.what, row.kind) for row in rows)


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator and denominator else "-"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _mib(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / MIB
