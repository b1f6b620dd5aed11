"""The report on the console: one table over the convolutions, a bar a phase, a tree of the peak, and words."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from bench.measure.account import CATEGORIES, INPUT, OPTIMIZER, OUTSIDE, PARAMETERS
from bench.measure.predict import DRIVERS_SHARE, MIB, Range, in_mib
from bench.memory.colours import COLOURS

TRAFFIC = "bytes that a training step moves to and from DRAM,"
MOST_BRANCHES = 6
"""Modules of one category in the tree; the others are told in one line."""
LEAST_SHARE = 0.01
"""Of the peak, for a category or a module to have a line."""


def print_report(console: Console, report: dict) -> None:
    """All that is known of one model."""
    entries = report["convolutions"]
    print_heading(console, [report])
    console.print(figures(report))
    for line in notes([report]):
        console.print(line)
    console.print("\n[bold]the peak of each phase[/bold]")
    console.print(bars(entries, console.width, with_letters=console.color_system is None))
    told: dict[str, list] = {}
    for conv, entry in entries.items():
        same = next((other for other, lines in told.items() if lines == branches(entry)), None)
        told[conv] = branches(entry)
        if same:
            console.print(f"\n[bold]{conv}[/bold]: {mib(entry['peak'])} at the peak, the same as with {same}")
        else:
            console.print(tree(conv, entry))
    for text in explanations(report):
        console.print(text)


def print_overview(console: Console, reports: Sequence[dict]) -> None:
    """A line for each model and convolution."""
    print_heading(console, reports)
    has_batches = any(entry["largest_batch"] for report in reports for entry in report["convolutions"].values())
    measured = reports[0]["measured_on"]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("model", "conv"):
        table.add_column(name)
    columns = ["live at\nthe peak", "the process,\npredicted"]
    columns += ["largest\nbatch"] if has_batches else []
    columns += ["measured\nby NVML"] if measured else []
    for name in [*columns, "the write-\nup's T4*"]:
        table.add_column(name, justify="right")
    for report in reports:
        for conv, entry in report["convolutions"].items():
            cells = [mib(entry["peak"]), span(entry["process"])]
            cells += [batches(entry["largest_batch"])] if has_batches else []
            cells += [measured_cell(entry["measured"], "nbytes")] if measured else []
            first = conv == next(iter(report["convolutions"]))
            table.add_row(report["model"] if first else "", conv, *cells, whole(entry["writeup_nvidia_smi_mib"]))
        table.add_section()
    console.print(table)
    for line in notes(reports):
        console.print(line)


def print_traffic(console: Console, report: dict) -> None:
    """What one model's step moves, a line for each kind of operator."""
    entries = report["convolutions"]
    print_heading(console, [report], TRAFFIC)
    table = table_of("what moves it", entries)

    def row(name: str, cell: Callable[[dict], str], *, style: str = "") -> None:
        table.add_row(name, *(cell(entry) for entry in entries.values()), style=style)

    for name in next(iter(entries.values()))["rows"]:
        if any(entry["rows"][name] for entry in entries.values()):
            row(name, lambda entry, name=name: mib(entry["rows"][name]) if entry["rows"][name] else "-")
    table.add_section()
    row("all together", lambda entry: mib(entry["total"]), style="bold")
    if len(entries) > 1:
        row(f"times {report['reference']}'s", lambda entry: f"{entry['ratio']:.2f}")
    if any(entry["launchers_buffers"] for entry in entries.values()):
        table.add_section()
        row("of it: launchers' buffers", lambda entry: mib(entry["launchers_buffers"]), style="dim")
    console.print(table)
    print_traffic_notes(console, report)


def print_traffic_overview(console: Console, reports: Sequence[dict]) -> None:
    """What each model's step moves, all together."""
    print_heading(console, reports, TRAFFIC)
    table = table_of("all together", reports[0]["convolutions"])
    for report in reports:
        entries = report["convolutions"].values()
        table.add_row(report["model"], *(mib(entry["total"]) for entry in entries))
        if len(entries) > 1:
            table.add_row(f"  times {report['reference']}'s", *(f"{entry['ratio']:.2f}" for entry in entries))
        table.add_section()
    console.print(table)
    print_traffic_notes(console, reports[0])


def print_traffic_notes(console: Console, report: dict) -> None:
    for line in report["notes"]:
        console.print(escape(line))


def print_heading(console: Console, reports: Sequence[dict], what: str = "memory of a training step") -> None:
    first = reports[0]
    console.print(
        f"[bold]{', '.join(report['model'] for report in reports)}[/bold]: {what} in MiB, batch "
        f"{first['batch_size']}, {first['image_size']} px, {first['dtype']}, the write-up's optimiser"
    )
    console.print(f"{first['label']}; for one {first['gpu']['name']}")


def table_of(rows: str, convs: Iterable[str]) -> Table:
    """Without rows yet: a column for their names, and one for each convolution; all four fit 80 characters."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column(rows)
    for conv in convs:
        table.add_column(conv.replace("-", "-\n"), justify="right")
    return table


def figures(report: dict) -> Table:
    """The table over the convolutions."""
    entries = report["convolutions"]
    table = table_of("at the peak", entries)

    def row(name: str, cell: Callable[[dict], str], *, style: str = "") -> None:
        table.add_row(name, *(cell(entry) for entry in entries.values()), style=style)

    for category in CATEGORIES:
        row(category, lambda entry, category=category: mib(entry["at_peak"][category]))
    table.add_section()
    row("peak, all together", lambda entry: mib(entry["peak"]), style="bold")
    if len(entries) > 1:
        row(f"times {report['reference']}'s", lambda entry: f"{entry['ratio']:.2f}")
    table.add_section()
    row("allocated, rounded up", lambda entry: span(entry["allocated"]))
    row("reserved by the allocator", lambda entry: span(entry["reserved"]))
    row("+ CUDA context (see below)", lambda entry: span(entry["context"]))
    row("= process in nvidia-smi", lambda entry: span(entry["process"]), style="bold")
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


def notes(reports: Sequence[dict]) -> list[str]:
    """What stands under a table: assumptions, and where measured figures come from or why there are none."""
    first = reports[0]
    entries = [entry for report in reports for entry in report["convolutions"].values()]
    assumptions = {name: text for report in reports for name, text in report["assumptions"].items()}
    lines = [f"Assumed: {text}." for text in assumptions.values()]
    if any(entry["largest_batch"] for entry in entries):
        gpu = first["gpu"]
        share = "{:g}-{:g}% of it assumed".format(*DRIVERS_SHARE)
        kept = share if gpu["kept"] is None else f"{gpu['kept']:,} MiB"
        lines.append(
            f"Fits on one {gpu['name']} ({gpu['total']:,} MiB, of which its driver keeps some: {kept}), if nobody else "
            "uses it: surely up to the first number, by the least favourable ends of what is assumed above for current "
            "PyTorch; perhaps up to the second, by the most favourable."
        )
    if any(entry["writeup_nvidia_smi_mib"] for entry in entries):
        lines.append("* the write-up's own reading of nvidia-smi, an average; it stands as theirs.")
    if first["measured_on"]:
        sources = sorted({entry["measured"]["source"] for entry in entries if "source" in entry["measured"]})
        lines.append(f"Measured on {first['measured_on']}: {'; '.join(sources) or 'nothing fitted'}.")
        lines += [f"GPU: {told}." for told in dict.fromkeys(map(describe_gpu, entries)) if told]
    else:
        lines.append(f"Nothing is measured: {first['not_measured_because']}.")
    return [escape(line) for line in lines]


def bars(entries: dict[str, dict], width: int, *, with_letters: bool) -> Group:
    """A bar for each phase of each convolution, its length the phase's peak, its colours the categories'.

    `with_letters` draws them of the categories' first letters, where there are no colours.
    """
    glyphs = {category: category[0].upper() if with_letters else "█" for category in CATEGORIES}
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
                line.append(glyphs[category] * cells, style=COLOURS[category])
                drawn += cells
            line.append(f" {mib(phase['peak'])}")
            lines.append(line)
    legend = Text()
    for category in CATEGORIES:
        legend.append(f"{glyphs[category]} ", style=COLOURS[category])
        legend.append(f"{category}   ")
    return Group(*lines, legend)


def tree(conv: str, entry: dict) -> Tree:
    """What is live at the peak: category, then module and operator, largest first."""
    place = escape(entry["peak_is_in"])
    root = Tree(f"\n[bold]{conv}[/bold]: {mib(entry['peak'])} at the peak, when this was taken last: {place}")
    for category, nbytes, lines in branches(entry):
        branch = root.add(f"[{COLOURS[category]}]{category}[/] {mib(nbytes)} ({nbytes / entry['peak']:.0%})")
        for line in lines:
            branch.add(escape(line))
    return root


def branches(entry: dict) -> list[tuple[str, int, list[str]]]:
    """Category, bytes, and a line for each module and operator that matter, of the peak; largest first."""
    found = []
    for category, nbytes in sorted(entry["at_peak"].items(), key=lambda item: -item[1]):
        if nbytes < LEAST_SHARE * entry["peak"]:
            continue
        sums: dict[str, int] = {}
        for storage in entry["live_at_peak"]:
            if storage["category"] == category and category not in (PARAMETERS, OPTIMIZER, INPUT):
                told = storage["what"] if storage["what"] != category else storage["operator"]
                is_named = storage["module"] == OUTSIDE or storage["module"] in told
                place = told if is_named else f"{storage['module']}: {told}"
                sums[place] = sums.get(place, 0) + storage["nbytes"]
        ranked = sorted(sums.items(), key=lambda item: -item[1])
        shown = [(place, size) for place, size in ranked[:MOST_BRANCHES] if size >= LEAST_SHARE * entry["peak"]]
        lines = [f"{mib(size)}  {place}" for place, size in shown]
        if others := ranked[len(shown) :]:
            lines.append(f"{mib(sum(size for _, size in others))}  {len(others)} more")
        found.append((category, nbytes, lines))
    return found


def explanations(report: dict) -> Iterator[RenderableType]:
    """In words: why a convolution's peak is not the reference's, and what the write-up's figures leave to explain."""
    for told in report["differences"]:
        ours, theirs, nbytes = told["conv"], told["reference"], told["nbytes"]
        if all(mib(abs(size)) == "0.0" for size in (nbytes, *(size for size, _ in told["items"]))):
            yield Text.assemble((f"\n{ours} against {theirs}: ", "bold"), "the same to 0.1 MiB, at the same moment.")
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


def describe_gpu(entry: dict) -> str:
    """What the measurement of one convolution depended on."""
    told = entry["measured"].get("gpu") or {}
    parts = [
        f"driver {told['driver']}" if told.get("driver") else "",
        f"{told['sm_clock_mhz']} MHz" if told.get("sm_clock_mhz") else "",
        f"held down by {', '.join(told['throttle_reasons'])}" if told.get("throttle_reasons") else "",
        told.get("unavailable", ""),
    ]
    return ", ".join(part for part in parts if part)


def mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.1f}"


def span(nbytes: list[int]) -> str:
    return in_mib(Range(*nbytes)).removesuffix(" MiB")


def whole(figure: int | None) -> str:
    return "-" if figure is None else f"{figure:,}"


def batches(largest: dict | None) -> str:
    if largest is None:
        return "-"
    return "-".join(dict.fromkeys(f"{largest[name]:,}" for name in ("surely", "perhaps")))


def measured_cell(measured: dict, key: str) -> str:
    if "error" in measured:
        return measured["error"]
    return "not known" if measured[key] is None else mib(measured[key])
