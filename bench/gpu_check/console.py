"""What gpu-check tells meanwhile and at its end; the report has every figure."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.gpu_check.parts import NOT_RUN, PASSED, Part

STYLES = {PASSED: "green", NOT_RUN: "yellow"}
MOST_SHOWN = 5


def print_part(console: Console, part: Part, outcome: dict[str, Any]) -> None:
    """One line as soon as a part has ended, and the first things that went wrong."""
    status = outcome["status"]
    seconds = f" in {outcome['seconds']:.0f} s" if "seconds" in outcome else ""
    console.print(f"{part.title}: [{STYLES.get(status, 'bold red')}]{status}[/]{seconds}{counted(outcome)}")
    if "reason" in outcome:
        console.print(f"  {escape(outcome['reason'])}")
    found = outcome.get("found")
    for failure in (found or {}).get("failures", [])[:MOST_SHOWN] if isinstance(found, dict) else []:
        console.print(f"  {escape(failure['test'])}\n    {escape(failure['why'][:200])}")


def counted(outcome: dict[str, Any]) -> str:
    found = outcome.get("found")
    if isinstance(found, dict) and "passed" in found:
        return ": " + ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped"))
    if isinstance(found, dict) and "convolutions" in found:
        return f": {found['convolutions']} convolutions, {found['summary'] or 'no summary'}"
    if isinstance(found, list):
        return f": {sum('op' in row for row in found)} rows"
    return ""


def print_summary(console: Console, report: dict[str, Any], file: Path) -> None:
    """The tables of times, and where and how they were taken."""
    found = {name: outcome.get("found") for name, outcome in report["parts"].items()}
    for title, rows, table_of in (
        ("\nAutotuning: the first choice beside the best candidate, in ms", found.get("tuning"), tuning_table),
        ("\nTimes in ms, and ours / cuDNN's (below 1: ours is faster)", found.get("timing"), timing_table),
    ):
        if rows:
            console.print(title)
            console.print(table_of([row for row in rows if "op" in row]))
    where = report["conditions"]
    versions = where["versions"]
    console.print(
        f"{where['device']} ({where['arch']}), torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {where['commit'] or 'unknown'}"
    )
    console.print(f"report: {file}", soft_wrap=True)


def tuning_table(rows: list[dict[str, Any]]) -> Table:
    """A line a case: candidates, the first one's time, the best one's, and their quotient."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("layer", "operation", "type"):
        table.add_column(name)
    for name in ("of", "first", "best", "first\n/ best"):
        table.add_column(name, justify="right")
    table.add_column("best tile (warps, stages)")
    previous = None
    for row in rows:
        if previous not in (None, row["layer"]):
            table.add_section()
        previous = row["layer"]
        line = [row["layer"], row["op"], kind(row)]
        if "error" in row:
            table.add_row(*line, "", "", "", "", "[red]failed[/]")
        elif "trials" not in row:
            table.add_row(*line, "1", "", "", "", tile_name(row["tile"]))
        else:
            first, ratio = row["first_seconds"], row["first_over_best"]
            table.add_row(
                *line, str(len(row["trials"])), milliseconds(first), milliseconds(row["best_seconds"]),
                f"{ratio:.2f}" if ratio else "-", tile_name(row["tile"]),
            )  # fmt: skip
    return table


def timing_table(rows: list[dict[str, Any]]) -> Table:
    """A line a layer and operation, with two columns for each type."""
    kinds = list(dict.fromkeys(map(kind, rows)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer")
    table.add_column("operation")
    for name in kinds:
        table.add_column(f"{name}\nms", justify="right")
        table.add_column("/\ncuDNN", justify="right", style="bold")
    by_place = {(row["layer"], row["op"], kind(row)): row for row in rows}
    previous = None
    for layer, op in dict.fromkeys((row["layer"], row["op"]) for row in rows):
        if previous not in (None, layer):
            table.add_section()
        cells = []
        for name in kinds:
            row = by_place.get((layer, op, name), {})
            cells += [milliseconds(row.get("seconds")), f"{row['ratio']:.2f}" if "ratio" in row else "-"]
        table.add_row("" if layer == previous else layer, op, *cells)
        previous = layer
    return table


def kind(row: dict[str, Any]) -> str:
    """ "fp16", "bf16", "tf32", "fp32"."""
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return "tf32" if row["precision"] == "tf32" else short[row["dtype"]]


def tile_name(tile: dict[str, Any]) -> str:
    """ "128x64x32 (4, 3)", or "128x64x32*2 (4, 3)" where a step multiplies two blocks of terms."""
    parts = f"*{tile['parts']}" if tile.get("parts", 1) > 1 else ""
    return f"{tile['M']}x{tile['N']}x{tile['K']}{parts} ({tile['num_warps']}, {tile['num_stages']})"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"
