"""What gpu-check tells meanwhile and at its end; the report has every figure."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.gpu_check.parts import NOT_RUN, PASSED, Part
from bench.measure.predict import MIB

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
        return f": {sum('ahead' not in row for row in found)} rows"
    return ""


def print_summary(console: Console, report: dict[str, Any], file: Path) -> None:
    """The tables of times, and where and how they were taken."""
    found = {name: outcome.get("found") for name, outcome in report["parts"].items()}
    for title, part, key, table_of in (
        ("Autotuning: the first choice beside the best candidate, in ms", "tuning", "op", tuning_table),
        ("Times in ms, and ours / cuDNN's (below 1: ours is faster)", "timing", "op", timing_table),
        ("Fused chains in us, and ours / PyTorch's, ours / ours unfused", "timing", "chain", chain_table),
        ("Training steps in ms, and triton / the others", "timing", "step", step_table),
        ("Memory of training steps in MiB at the peak, and / torch's", "memory", "model", memory_table),
    ):
        rows = [row for row in found.get(part) or [] if key in row]
        if rows:
            console.print(f"\n{title}")
            console.print(table_of(rows))
            if part == "memory":
                console.print(predictions_met(rows))
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


CHAINS = {
    "conv_relu": "conv+bias+ReLU", "conv_relu_grad": "its gradients", "bias_grad": "bias gradient",
    "relu_max_pool": "ReLU+max-pool", "relu_max_pool_grad": "its gradient",
}  # fmt: skip


def chain_table(rows: list[dict[str, Any]]) -> Table:
    """A section a chain, a line a layer, with three columns for each type."""
    kinds = list(dict.fromkeys(map(kind, rows)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("chain, layer", no_wrap=True)
    for name in kinds:
        table.add_column(f"{name}\nus", justify="right")
        table.add_column("/\ntorch", justify="right", style="bold")
        table.add_column("/ un-\nfused", justify="right")
    by_place = {(row["chain"], row["layer"], kind(row)): row for row in rows}
    for chain in dict.fromkeys(row["chain"] for row in rows):
        table.add_row(f"[bold]{CHAINS[chain]}[/]")
        for layer in dict.fromkeys(row["layer"] for row in rows if row["chain"] == chain):
            cells = []
            for name in kinds:
                row = by_place.get((chain, layer, name), {})
                seconds = row.get("seconds")
                cells += ["-" if seconds is None else f"{1e6 * seconds:.0f}", ratio(row.get("ratio"))]
                cells.append(ratio(row.get("ratio_to_unfused")))
            table.add_row(f"  {layer}", *cells)
        table.add_section()
    return table


def step_table(rows: list[dict[str, Any]]) -> Table:
    """A line a model and type: each contender's time, and triton's over it."""
    contenders = list(dict.fromkeys(name for row in rows for name in row.get("seconds", {})))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model")
    table.add_column("type")
    for name in contenders:
        table.add_column(name.replace("-", "\n"), justify="right")
        if name != "triton":
            table.add_column("triton\n/ it", justify="right", style="bold")
    table.add_column("n", justify="right")
    for row in rows:
        cells = []
        for name in contenders:
            cells.append(milliseconds(row.get("seconds", {}).get(name)))
            if name != "triton":
                cells.append(ratio(row.get("ratio", {}).get(name)))
        table.add_row(row["step"], row["kind"], *cells, str(row.get("n", "-")))
    return table


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """A section a model, a line a convolution, with two columns for each figure."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model, convolution", no_wrap=True)
    figures = figures_of(rows)
    for name in figures:
        table.add_column({"nvml": "NVML"}.get(name, name), justify="right")
        table.add_column("/", justify="right", style="bold")
    for model in dict.fromkeys(row["model"] for row in rows):
        table.add_row(f"[bold]{model}[/]")
        for row in rows:
            if row["model"] == model:
                cells = []
                for name in figures:
                    nbytes = row.get("memory", {}).get(name)
                    cells += ["-" if nbytes is None else f"{nbytes / MIB:.0f}", ratio(row.get("ratio", {}).get(name))]
                table.add_row(f"  {row['conv']}", *cells)
        table.add_section()
    return table


def predictions_met(rows: list[dict[str, Any]]) -> str:
    """How many of each figure lie where they were predicted."""
    told = []
    for name in figures_of(rows):
        known = [row["as_predicted"][name] for row in rows if name in row.get("as_predicted", {})]
        told.append(f"{name} {sum(known)} of {len(known)}")
    return f"as predicted: {', '.join(told)}"


def figures_of(rows: list[dict[str, Any]]) -> list[str]:
    """live, allocated, reserved, nvml"""
    return list(dict.fromkeys(name for row in rows for name in row.get("memory", {})))


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


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
