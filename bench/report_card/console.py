"""The card on the console: a table for each GPU and dtype, as wide as the terminal; one row alone is told in full."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.measure.bound import LABEL
from bench.measure.gpus import GPUS
from bench.report_card import words
from bench.report_card.calibration import Calibration
from bench.report_card.card import Row
from bench.report_card.report import Change, Comparison, by_table
from bench.report_card.targets import judge, target_of

MOST_CHANGES = 40
"""Rows of a comparison that are shown; JSON has them all."""


UNCOUNTED = "what a variant executes and asks for is not known; its bound is of useful products and compulsory bytes"


@dataclass(frozen=True, slots=True)
class Column:
    heading: str
    rank: int
    """Where not all fit, those of the highest ranks are left out."""
    cell: Callable[[Row], str]

    def width(self, rows: Sequence[Row]) -> int:
        return max(map(len, [*self.heading.split("\n"), *map(self.cell, rows)]))


COLUMNS = (
    Column("layer", 0, words.shape),
    Column("tile", 4, words.tile),
    Column("warps\nstages", 11, lambda row: f"{row.warps}/{row.stages}"),
    Column("regs", 5, lambda row: str(row.registers)),
    Column("spills", 8, lambda row: str(row.spills)),
    Column("smem\nKiB", 12, lambda row: f"{row.shared_bytes / 1024:.0f}"),
    Column("occupancy\nlimit", 7, words.occupancy),
    Column("programs", 10, lambda row: f"{row.programs:,}"),
    Column("waves", 6, lambda row: words.decimals(row.waves)),
    Column("waste", 13, lambda row: words.percent(row.last_wave_waste)),
    Column("MMAs", 15, lambda row: str(row.tensor_core_instructions)),
    Column("a pass", 16, lambda row: words.decimals(row.multiply_adds_a_pass, 0)),
    Column("/1,000", 1, words.overhead),
    Column("/FMA", 14, words.per_fma),
    Column("loads", 3, words.loads),
    Column("bytes\nx min", 9, words.bytes_by_least),
    Column("bound\nus", 0, lambda row: words.microseconds(row.bound_seconds)),
    Column("by", 2, words.by),
    Column("roof", 2, lambda row: words.percent(row.roofline_share)),
    Column("", 0, lambda row: "x" if judge(row) else "ok"),
)

# (heading in COLUMNS, what it says)
LEGEND = (
    ("waste", "share of the last wave's places that stay empty"),
    ("/1,000", "main loop's other instructions for 1,000 multiply-adds of a warp; u: unrolled, so the whole kernel's"),
    ("loads", "bytes of a thread's global loads there; a: asynchronous copies"),
    ("bytes\nx min", "bytes that all loads and stores ask for, by each operand and the result once"),
    ("bound\nus", "least microseconds that the launches can take, one after another"),
    ("by", "what bounds: tensor cores, FMA units, issue slots, shared memory (smem), DRAM"),
    ("roof", "share of the roofline's speed (useful products, fastest unit, compulsory bytes) that the bound leaves"),
)


def print_card(console: Console, rows: Sequence[Row], calibration: Calibration | None) -> None:
    """Tables, their legend, and how many rows meet their targets."""
    columns = columns_that_fit(rows, console.width, calibration)
    for arch, dtype, of_table in by_table(rows):
        batches = ", ".join(map(str, sorted({row.x_shape[0] for row in of_table})))
        gpu = GPUS[arch]
        console.print(
            f"\n[bold]{gpu.name}[/bold] ({arch}, {gpu.multiprocessors} multiprocessors), {dtype}, batch {batches}"
        )
        console.print(f"[dim]bound: {LABEL}[/dim]")
        console.print(table(of_table, columns))
    print_legend(console, rows, columns, calibration)
    print_verdict(console, rows)


def columns_that_fit(rows: Sequence[Row], width: int, calibration: Calibration | None) -> list[Column]:
    """As many as a terminal of `width` has room for, the most important ones."""
    columns = list(COLUMNS)
    if len({row.x_shape[0] for row in rows}) > 1:
        columns.insert(1, Column("batch", 0, lambda row: str(row.x_shape[0])))
    if calibration and any(calibration.estimate(row) for row in rows):
        estimate = Column("est.\nus", 0, lambda row: estimated(calibration, row))
        columns.insert(next(i for i, column in enumerate(columns) if column.heading == "by"), estimate)
    # A space after each, and one at either edge.
    while len(columns) > 2 and sum(column.width(rows) + 1 for column in columns) + 1 > width:
        columns.remove(max(columns, key=lambda column: column.rank))
    return columns


def estimated(calibration: Calibration, row: Row) -> str:
    seconds = calibration.estimate(row)
    return words.UNKNOWN if seconds is None else words.microseconds(seconds)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Of one GPU and dtype; a section an operation."""
    found = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in columns:
        found.add_column(column.heading, justify="left" if column is columns[0] else "right", no_wrap=True)
    for op in dict.fromkeys(row.op for row in rows):
        found.add_row(f"[bold]{op}[/bold]")
        for row in rows:
            if row.op == op:
                *cells, mark = (escape(column.cell(row)) for column in columns)
                found.add_row(*cells, f"[{'green' if mark == 'ok' else 'red'}]{mark}[/]")
        found.add_section()
    return found


def print_legend(
    console: Console, rows: Sequence[Row], columns: Sequence[Column], calibration: Calibration | None
) -> None:
    """What the columns shown say."""
    told = Table.grid(padding=(0, 1))
    told.add_column(no_wrap=True, style="dim")
    told.add_column(style="dim")
    headings = {column.heading for column in columns}
    for heading, text in LEGEND:
        if heading in headings:
            told.add_row(heading.replace("\n", " "), text)
    if calibration:
        told.add_row("est. us", escape(calibration.label))
    if not all(row.counted for row in rows):
        told.add_row(words.UNKNOWN, f"{UNCOUNTED}, spread evenly")
    if any(row.from_the_tile for row in rows):
        told.add_row("sm_100", "multiply-adds of UTCHMMA are the tile's: its machine code does not tell them")
    if not {column.heading for column in COLUMNS} <= headings:
        told.add_row("", "a wider terminal shows more columns, --details and --json all")
    console.print(told)


def print_verdict(console: Console, rows: Sequence[Row]) -> None:
    """How many rows meet their targets, and what the others miss."""
    missed = [(row, misses) for row in rows if (misses := judge(row))]
    met = len(rows) - len(missed)
    what_follows = ", these do not:" if missed else ""
    console.print(f"\n[bold]{met} of {len(rows)} rows meet their targets[/bold]{what_follows}")
    for row, misses in missed:
        console.print(escape(f"  {row.arch} {row.op} {row.dtype} {words.shape(row)}: {'; '.join(misses)}"))


def print_details(console: Console, row: Row, calibration: Calibration | None) -> None:
    """All that is known of one row."""
    gpu = GPUS[row.arch]
    console.print(f"\n[bold]{row.op} {escape(words.shape(row))}[/bold], {row.dtype}, {gpu.name} ({row.arch})")
    told = Table.grid(padding=(0, 2))
    told.add_column(no_wrap=True)
    told.add_column()
    for name, text in details(row, calibration):
        told.add_row(f"  {name}", escape(text))
    console.print(told)


def details(row: Row, calibration: Calibration | None) -> list[tuple[str, str]]:
    loop = "the whole kernel (its loop was unrolled)" if row.unrolled else "main loop"
    target, useful = target_of(row), row.useful_multiply_adds
    found = [
        ("x, w", f"{tuple(row.x_shape)}, {tuple(row.w_shape)}; stride {row.stride}, padding {row.padding}"),
        ("kernel", f"{row.kernel}, tile {words.tile(row)}, {row.warps} warps, {row.stages} stages"),
        ("registers", f"{row.registers} a thread, {row.spills} spill instructions, {row.stack_bytes} bytes of stack"),
        ("occupancy", f"{row.occupancy:.0%}, {row.blocks} blocks a multiprocessor; limit: {row.occupancy_limit}, "
                      f"shared memory {row.shared_bytes:,} bytes a block"),
        ("grid", f"{row.programs:,} programs, {words.decimals(row.waves)} waves, of the last "
                 f"{words.percent(row.last_wave_waste)} empty"),
        (loop, ", ".join(f"{count} {kind}" for kind, count in row.mix.items())),
        ("multiply-adds", f"{row.tensor_core_instructions} tensor core instructions, "
                          f"{words.decimals(row.multiply_adds_a_pass, 0)} multiply-adds of a warp a pass"
                          + (" (the tile's: the code does not tell)" if row.from_the_tile else "")),
        ("overhead", f"{words.decimals(row.overhead)} other instructions for 1,000 multiply-adds of a warp"
                     + ("" if row.others_per_fma is None else f", {row.others_per_fma:.3f} for each FMA")
                     + (f"; target {target.most:.2f}: {target.reason}" if target else "")),
        ("global loads", f"{words.loads(row)} ({'' if row.asynchronous else 'no '}asynchronous copies, "
                         f"{'' if row.tensor_copies else 'no '}TMA)"
                         + ("" if row.copies_in_flight is None else f", {row.copies_in_flight} groups left in flight")),
        ("work", f"{words.whole(row.multiply_adds)} multiply-adds for {useful:,} useful ones"
                 + (f", {row.multiply_adds / useful:.2f} times as many" if row.counted and useful else "")),
        ("bytes", f"{words.whole(row.bytes_requested)} requested, {row.compulsory_bytes:,} compulsory"),
        ("bound", f"{words.microseconds(row.bound_seconds)} us by {row.bound_by} ({LABEL}): "
                  + ", ".join(f"{part} {words.microseconds(took)}" for part, took in row.bound_parts.items())
                  + (f"; busiest multiprocessor {row.quantisation:.2f} times the mean" if row.counted
                     else f"; {UNCOUNTED}")),
        ("roofline", f"{words.microseconds(row.roofline_seconds)} us by {row.roofline_by}, "
                     f"{words.percent(row.roofline_share)} of its speed are left"),
    ]  # fmt: skip
    if row.zero_insertion_multiply_adds and row.multiply_adds:
        less = row.zero_insertion_multiply_adds / row.multiply_adds
        found.insert(-3, (
            "residue classes",
            f"{less:.2f} times less than the {row.zero_insertion_multiply_adds:,} multiply-adds of zero insertion",
        ))  # fmt: skip
    for launch in row.others_launched:
        found.append((
            "beside it",
            f"{launch.kernel}, {launch.programs:,} programs, {launch.registers} registers, {launch.spills} spills, "
            f"{words.microseconds(launch.bound_seconds)} us of the bound",
        ))  # fmt: skip
    if calibration and (estimate := calibration.estimate(row)):
        found.append(("estimate", f"{words.microseconds(estimate)} us; {calibration.label}"))
    return [*found, ("misses", "; ".join(judge(row)) or "nothing")]


def print_comparison(console: Console, compared: Comparison) -> None:
    """Rows that are not what they were, the largest change of the time bound first."""
    worse = sum(change.ratio > 1 for change in compared.changes)
    better = sum(change.ratio < 1 for change in compared.changes)
    console.print(
        f"\n[bold]against {escape(compared.file)}[/bold]: {better} better, {worse} worse by the time bound, "
        f"{len(compared.changes) - better - worse} with other figures alone, {compared.same} the same; "
        f"{compared.only_here} only here, {compared.only_there} only there"
    )
    for change in compared.changes[:MOST_CHANGES]:
        console.print(escape(told(change)), style="green" if change.ratio < 1 else "red" if change.ratio > 1 else "")
    if len(compared.changes) > MOST_CHANGES:
        console.print(f"and {len(compared.changes) - MOST_CHANGES} more")


def told(change: Change) -> str:
    word = "better" if change.ratio < 1 else "worse" if change.ratio > 1 else "other figures"
    figures = "; ".join(f"{name} {figure(old)} -> {figure(new)}" for name, (old, new) in change.figures.items())
    where = f"  {change.arch} {change.op} {change.dtype} {change.shape}: {word}"
    bounds = f"bound {words.microseconds(change.before)} -> {words.microseconds(change.after)} us"
    return f"{where}, {bounds}" + (f"; {figures}" if figures else "")


def figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list):
        is_tile = value and isinstance(value[0], int)
        return ("x" if is_tile else ", ").join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "+".join(sorted(value, key=int, reverse=True)) or "none"
    return words.UNKNOWN if value is None else str(value)
