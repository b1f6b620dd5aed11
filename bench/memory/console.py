"""The report on the console: one table over the convolutions, a bar a phase, a tree of the peak, and words."""

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from bench.measure.account import CATEGORIES, INPUT, OPTIMIZER, OUTSIDE, PARAMETERS
from bench.measure.predict import MIB
from bench.memory.colours import COLOURS
from bench.memory.words import in_mib

MOST_BRANCHES = 4
"""Modules of one category in the tree; the others are told in one line."""
LEAST_SHARE = 0.01
"""Of the peak, for a category to have branches."""


def print_report(console: Console, report: dict) -> None:
    entries = report["convolutions"]
    console.print(
        f"[bold]{report['model']}[/bold]: memory of a training step in MiB, batch {report['batch_size']}, "
        f"{report['image_size']} px, {report['dtype']}, the write-up's optimiser"
    )
    console.print(f"{report['label']}; for one {report['gpu']['name']}")
    console.print(figures(report))
    for line in notes(report):
        console.print(line)
    console.print("\n[bold]the peak of each phase[/bold]")
    console.print(bars(entries, console.width))
    for conv, entry in entries.items():
        console.print(tree(conv, entry))
    for told in explanations(report):
        console.print(told)


def figures(report: dict) -> Table:
    entries = report["convolutions"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("at the peak")
    for conv in entries:
        table.add_column(conv, justify="right")

    def row(name: str, cell, *, style: str = "") -> None:
        table.add_row(name, *(cell(entry) for entry in entries.values()), style=style)

    for category in CATEGORIES:
        row(category, lambda entry, category=category: mib(entry["at_peak"][category]))
    table.add_section()
    row("peak, all together", lambda entry: mib(entry["peak"]), style="bold")
    if "torch" in entries:
        row("times torch's", lambda entry: f"{entry['ratio_to_torch']:.2f}")
    table.add_section()
    row("allocated, rounded up", lambda entry: span(entry["allocated"]))
    row("reserved by the allocator", lambda entry: span(entry["reserved"]))
    row("+ CUDA context (assumed)", lambda entry: span(entry["context"]))
    row("= the process in nvidia-smi", lambda entry: span(entry["process"]), style="bold")
    if any(entry["largest_batch"] for entry in entries.values()):
        table.add_section()
        row("largest batch that fits", lambda entry: batches(entry["largest_batch"]))
    if report["measured_on"]:
        table.add_section()
        for name, key in (
            ("measured: tracked peak", "tracked_peak"), ("measured: allocated", "allocated_peak"),
            ("measured: reserved", "reserved_peak"), ("measured: outside of it", "outside_allocator"),
            ("measured by NVML", "nbytes"),
        ):  # fmt: skip
            row(name, lambda entry, key=key: measured_cell(entry["measured"], key))
    if any(entry["writeup_nvidia_smi_mib"] for entry in entries.values()):
        table.add_section()
        row("the write-up's T4*", lambda entry: whole(entry["writeup_nvidia_smi_mib"]), style="dim")
    return table


def notes(report: dict) -> list[str]:
    entries = report["convolutions"].values()
    lines = [f"Assumed: {text}." for text in report["assumptions"].values()]
    if any(entry["largest_batch"] for entry in entries):
        gpu = report["gpu"]
        lines.append(
            f"Fits on one {gpu['name']} ({gpu['total']:,} MiB): surely up to the first number, by the high ends of all "
            "assumptions; perhaps up to the second, by the low ends."
        )
    if any(entry["writeup_nvidia_smi_mib"] for entry in entries):
        lines.append("* the write-up's own reading of nvidia-smi, an average; it stands as theirs.")
    if report["measured_on"]:
        sources = sorted({entry["measured"]["source"] for entry in entries if "source" in entry["measured"]})
        lines.append(f"Measured on {report['measured_on']}: {'; '.join(sources) or 'nothing fitted'}.")
        lines += [f"GPU: {told}." for told in dict.fromkeys(map(describe_gpu, entries)) if told]
    else:
        lines.append(f"Nothing is measured: {report['not_measured_because']}.")
    return [escape(line) for line in lines]


def bars(entries: dict[str, dict], width: int) -> Group:
    """A bar for each phase of each convolution, its length the phase's peak, its colours the categories'."""
    highest = max(entry["peak"] for entry in entries.values())
    names = max(len(name) for entry in entries.values() for name in entry["phases"])
    convs = max(map(len, entries))
    room = max(10, width - names - convs - 14)
    lines = []
    for conv, entry in entries.items():
        for index, (name, phase) in enumerate(entry["phases"].items()):
            line = Text(f"{conv if index == 0 else '':{convs}}  {name:{names}}  ")
            done = drawn = 0
            for category in CATEGORIES:
                done += phase["at_peak"][category]
                cells = round(room * done / highest) - drawn
                line.append("█" * cells, style=COLOURS[category])
                drawn += cells
            line.append(f" {mib(phase['peak'])}")
            lines.append(line)
    legend = Text()
    for category in CATEGORIES:
        legend.append("█ ", style=COLOURS[category])
        legend.append(f"{category}   ")
    return Group(*lines, legend)


def tree(conv: str, entry: dict) -> Tree:
    """What is live at the peak: category, then module and operator, largest first."""
    root = Tree(f"\n[bold]{conv}[/bold]: {mib(entry['peak'])} at the peak, in {escape(entry['peak_is_in'])}")
    for category, nbytes in sorted(entry["at_peak"].items(), key=lambda item: -item[1]):
        if nbytes == 0:
            continue
        branch = root.add(f"[{COLOURS[category]}]{category}[/] {mib(nbytes)} ({nbytes / entry['peak']:.0%})")
        if nbytes < LEAST_SHARE * entry["peak"] or category in (PARAMETERS, OPTIMIZER, INPUT):
            continue
        sums: dict[tuple[str, str], int] = {}
        for storage in entry["live_at_peak"]:
            if storage["category"] == category:
                told = storage["what"] if storage["what"] != category else storage["operator"]
                place = (storage["module"], told)
                sums[place] = sums.get(place, 0) + storage["nbytes"]
        ranked = sorted(sums.items(), key=lambda item: -item[1])
        for (module, told), size in ranked[:MOST_BRANCHES]:
            where = f"{module}: " if module != OUTSIDE and module not in told else ""
            branch.add(escape(f"{mib(size)}  {where}{told}"))
        if others := ranked[MOST_BRANCHES:]:
            branch.add(f"{mib(sum(size for _, size in others))}  {len(others)} more")
    return root


def explanations(report: dict) -> Iterator[RenderableType]:
    """In words: why a convolution's peak is not torch's, and what the write-up's figures leave to explain."""
    for told in report["differences"]:
        ours, theirs, nbytes = told["conv"], told["reference"], told["nbytes"]
        if nbytes == 0 and not told["items"]:
            yield Text.assemble((f"\n{ours} against {theirs}: ", "bold"), "the same bytes at the same moment.")
            continue
        more = "more" if nbytes >= 0 else "less"
        yield Text.assemble(
            (f"\n{ours} against {theirs}: {mib(abs(nbytes))} MiB {more} at the peak. ", "bold"),
            f"Its peak lies in {told['where']}; {theirs}'s in {told['reference_where']}. What it holds there more or "
            f"less than {theirs} at its own:",
        )
        yield listed([(f"{size / MIB:+,.1f}", what) for size, what in told["items"]])
    gaps = [(conv, entry["gap_to_writeup"]) for conv, entry in report["convolutions"].items()]
    if any(gap for _, gap in gaps):
        yield Text("\nWhat the write-up's figures leave to explain (its context and step are not known)", style="bold")
        yield listed([(conv, gap) for conv, gap in gaps if gap])


def listed(lines: list[tuple[str, str]]) -> Table:
    """Two columns without a frame, of which the second may wrap."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, text in lines:
        table.add_row(f"  {name}", Text(text))
    return table


def mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.1f}"


def span(nbytes: list[int]) -> str:
    return in_mib(*nbytes).removesuffix(" MiB")


def whole(figure: int | None) -> str:
    return "-" if figure is None else f"{figure:,}"


def batches(largest: dict | None) -> str:
    if largest is None:
        return "-"
    surely, perhaps = largest["surely"], largest["perhaps"]
    return f"{surely:,}" if surely == perhaps else f"{surely:,}-{perhaps:,}"


def describe_gpu(entry: dict) -> str:
    """What the measurement of one convolution depended on."""
    told = entry["measured"].get("gpu") or {}
    parts = [
        f"driver {told['driver']}" if told.get("driver") else "",
        f"{told['sm_clock_mhz']} MHz" if told.get("sm_clock_mhz") else "",
        f"{told['temperature_c']} °C" if told.get("temperature_c") else "",
        f"held down by {', '.join(told['throttle_reasons'])}" if told.get("throttle_reasons") else "",
    ]
    return ", ".join(part for part in parts if part)


def measured_cell(measured: dict, key: str) -> str:
    return measured.get("error") or mib(measured[key])
