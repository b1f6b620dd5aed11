"""The comparing command: python -m train.compare runs"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.compare")

import argparse
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table

from train import writeup
from train.cli import Parser, UserError, make_console, path, printable, run_command
from train.files import atomic_write, make_folder, write_csv
from train.report import describe_backend
from train.runs import IRRELEVANT, Group, Run, crossing_epoch, find_runs, group_runs, read_run, spread

DESCRIPTION = """\
Set finished and unfinished runs side by side: accuracies, the epoch at which train passes validation, speed and
memory, as tables and as a figure of the validation curves. Runs that differ in nothing but --seed become one row.
"""

EXAMPLES = """
examples:
  python -m train.compare runs                           every run in runs
  python -m train.compare runs/a runs/b --out figures    two of them
"""

# Settings that decide which images an accuracy is of.
DATA_SETTINGS = ("data", "image_size", "limit_val")
NAMED = ("model", "conv", "recipe")


def last(column: str) -> Callable[[Run], float]:
    return lambda run: run.column(column)[-1]


# Name in compare.csv -> the figure of one run.
FIGURES: dict[str, Callable[[Run], float]] = {
    "val_top1": last("val_top1"),
    "val_top5": last("val_top5"),
    "best_val_top1": lambda run: max(run.column("val_top1")),
    "gap": lambda run: last("train_top1")(run) - last("val_top1")(run),
    "images_per_s": lambda run: run.images_per_s,
}
CSV_COLUMNS = (
    *NAMED, "settings", "data", "image_size", "finished", "epochs", "n", "seeds",
    *(column for name in FIGURES for column in (name, f"{name}_sd")), "crossing_epoch",
    "backend", "device", "memory_mib", "memory_mib_sd", "memory_kind",
    "writeup_conv", "writeup_epochs", "writeup_top1", "writeup_top5", "writeup_mib", "folders",
)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train.compare",
        usage="python -m train.compare RUN... [--out DIR]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("runs", type=path, nargs="+", metavar="RUN", help="a run folder, or a folder with runs anywhere in it")
    add("--out", type=path, default=Path(), metavar="DIR", help="where compare.png and compare.csv go (default: here)")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    console = make_console()
    runs = [read_run(folder) for folder in find_runs(arguments.runs)]
    begun = [run for run in runs if run.epochs]
    if not begun:
        raise UserError(f"no run in {', '.join(map(str, arguments.runs))} has finished an epoch")
    groups = group_runs(begun)
    names = distinguish(groups)
    make_folder(arguments.out)
    with atomic_write(arguments.out / "compare.png") as file:
        draw(groups, list(map(label_of, groups, names))).savefig(file, format="png")
    write_csv(arguments.out / "compare.csv", CSV_COLUMNS, map(csv_row, groups, names))

    print_tables(console, groups, names)
    for run in runs:
        if not run.epochs:
            console.print(f"left out: {printable(str(run.folder))} has not finished an epoch", soft_wrap=True)
    for line in notes(groups):
        console.print(line)
    console.print(f"written: {arguments.out / 'compare.png'}, {arguments.out / 'compare.csv'}", soft_wrap=True)


# ---------------------------------------------------------------- names


def distinguish(groups: Sequence[Group]) -> list[tuple[str, str, str, str]]:
    """(model, conv, recipe, other settings) of each group; the last has what it takes to tell the groups apart.

    A setting that is off in a group, None, is left out there: the others name theirs.
    """
    facts = [settings_of(group) for group in groups]
    over_all = differing_data(facts)
    names = []
    for fact in facts:
        alike = [
            (group, other) for group, other in zip(groups, facts, strict=True)
            if all(other[name] == fact[name] for name in (*NAMED, *over_all))
        ]
        differing = [name for name in fact if tells_apart(name, alike)]
        shown = [name for name in dict.fromkeys([*over_all, *differing]) if fact[name] is not None]
        names.append((*(fact[name] for name in NAMED), ", ".join(f"{name}={short(fact[name])}" for name in shown)))
    return names


def tells_apart(name: str, alike: Sequence[tuple[Group, dict[str, Any]]]) -> bool:
    """Whether a setting differs among groups, given with their settings_of."""
    if name == "device":  # an unfinished run has told its kind alone, which is another word for a named one's
        kinds = {group.config["device"] for group, _ in alike}
        named = {group.device for group, _ in alike if group.finished}
        return len(kinds) > 1 or len(named) > 1
    return len({repr(settings.get(name)) for _, settings in alike}) > 1


def settings_of(group: Group) -> dict[str, Any]:
    """What can tell a group from another: its settings, with the device by its own name and the epochs as done."""
    settings = {"limit_val": None} | {name: v for name, v in group.config.items() if name not in IRRELEVANT}
    return settings | {"device": group.device, "epochs": epochs_cell(group)}


def differing_data(facts: Sequence[dict[str, Any]]) -> list[str]:
    """Those of DATA_SETTINGS in which the groups differ."""
    return [name for name in DATA_SETTINGS if len({repr(fact[name]) for fact in facts}) > 1]


def short(value: Any) -> str:
    """A path as its last part, as it can be shown."""
    return printable(Path(value).name if isinstance(value, str) and value.startswith("/") else str(value))


def epochs_cell(group: Group) -> str:
    return str(group.epochs) if group.finished else f"{group.epochs}/{group.config['epochs']}"


# ---------------------------------------------------------------- the write-up


def writeup_figures(group: Group) -> writeup.Figures | None:
    """The write-up's row for finished runs on the whole of its data, known by its folder's name or layout."""
    config, root = group.config, Path(group.config["data"])
    as_theirs = (
        (group.runs[0].classes, config["image_size"]) == (writeup.CLASSES, writeup.IMAGE_SIZE)
        and ("miniplaces" in str(root).lower() or all((root / part).is_file() for part in ("train.txt", "val.txt")))
        and config.get("limit_train") is config.get("limit_val") is None
    )
    if not as_theirs:
        return None
    return writeup.figures_for(config["model"], config["conv"], fine_tuned=config.get("weights", "none") != "none")


# ---------------------------------------------------------------- tables


def print_tables(console: Console, groups: Sequence[Group], names: Sequence[tuple[str, ...]]) -> None:
    accuracy, cost = make_table("accuracy on validation images (%)"), make_table("where, how fast, how much memory")
    for header in ("epochs", "n", "top-1", "top-5", "best\ntop-1", "train\npasses", "gap"):
        accuracy.add_column(header, justify="right")
    cost.add_column("convolutions", no_wrap=True)
    kinds = memory_kinds(groups)
    for header in ("images/s", *(f"MiB ({letter})" for letter in kinds.values())):
        cost.add_column(header, justify="right")

    for group, name in zip(groups, names, strict=True):
        cell = name_cell(group, name)
        accuracy.add_row(
            cell, epochs_cell(group), str(len(group.runs)),
            *(figure_cell(group.each(FIGURES[key]), ".2f") for key in ("val_top1", "val_top5", "best_val_top1")),
            crossing_cell(group), figure_cell(group.each(FIGURES["gap"]), "+.1f"),
        )
        memory = {kind: figure_cell(figures, ",.0f") if figures else "-" for kind, figures in group.memory.items()}
        cost.add_row(
            cell, group.backend, figure_cell(group.each(FIGURES["images_per_s"]), ",.1f"),
            *(memory.get(kind, "") for kind in kinds),
        )
        if theirs := writeup_figures(group):
            whose = f"  write-up, {theirs.conv}"
            accuracy.add_row(whose, str(theirs.epochs), "1", f"{theirs.top1:.2f}", f"{theirs.top5:.2f}", style="dim")
            mib = (f"{theirs.mib:,}" if kind == writeup.MEMORY_KIND else "" for kind in kinds)
            cost.add_row(whose, "native", "", *mib, style="dim")
    console.print(accuracy, "", cost, "", sep="\n")
    for kind, letter in kinds.items():
        console.print(f"({letter}) {kind}")
    for place in dict.fromkeys(describe_backend(group.backend, group.device) for group in groups if group.finished):
        console.print(place)


def make_table(title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False,
        padding=(0, 1, 0, 0),  # for 80 columns
    )
    table.add_column("model, conv, recipe", overflow="fold")
    return table


def memory_kinds(groups: Sequence[Group]) -> dict[str, str]:
    """What was measured as memory -> the letter it goes by; figures of different kinds never share a column."""
    kinds = [kind for group in groups for kind in group.memory]
    if any(writeup_figures(group) for group in groups):
        kinds.append(writeup.MEMORY_KIND)
    return {kind: chr(ord("a") + i) for i, kind in enumerate(dict.fromkeys(kinds))}


def name_cell(group: Group, name: tuple[str, ...]) -> str:
    *common, others = name
    lines = [" ".join(common), *others.split(", "), "" if group.finished else "unfinished"]
    return "\n  ".join(line for line in lines if line)


def figure_cell(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean}\n±{format(spread(values), form.lstrip('+'))}"


def crossing_cell(group: Group) -> str:
    """"12", "12..15" over several seeds, "12..-" where some never cross, "-" where none does."""
    never = float("inf")
    epochs = sorted({run.crossing or never for run in group.runs})
    return "..".join("-" if epoch == never else str(epoch) for epoch in dict.fromkeys((epochs[0], epochs[-1])))


def notes(groups: Sequence[Group]) -> list[str]:
    lines = [
        "train passes: the first epoch whose train top-1 is above its val top-1. gap: the former less the latter after "
        "the last epoch, in points. Train accuracy is counted during the epoch, on augmented images."
    ]
    if any(len(group.runs) > 1 for group in groups):
        lines.append("±: standard deviation over n seeds.")
    for group in groups:
        seeds = [run.config["seed"] for run in group.runs]
        if len(set(seeds)) < len(seeds):
            lines.append(f"note: the same seed more than once: {folders(group)}")
        if len(group.memory) > 1:
            lines.append(f"note: memory of different kinds in one row, the first in compare.csv: {folders(group)}")
    if differing_data([settings_of(group) for group in groups]):
        lines.append("warning: these runs were validated on different images: accuracies do not compare.")
    theirs = f"MiniPlaces, {writeup.CLASSES} classes, {writeup.IMAGE_SIZE} px"
    if any(writeup_figures(group) for group in groups):
        lines.append(f"write-up: its figures for {theirs}, one run, one Tesla T4, beside finished runs on all of that.")
    else:
        lines.append(f"The write-up's figures are not shown: they are for {theirs}, all of it.")
    return lines


def folders(group: Group) -> str:
    return ", ".join(printable(str(run.folder)) for run in group.runs)


def csv_row(group: Group, name: tuple[str, ...]) -> dict[str, Any]:
    figures = {key: group.each(figure) for key, figure in FIGURES.items()}
    kind, memory = next(iter(group.memory.items()), (None, []))
    if memory:
        figures["memory_mib"] = memory
    theirs = writeup_figures(group)
    return {
        **dict(zip((*NAMED, "settings"), name, strict=True)),
        "data": group.config["data"],
        "image_size": group.config["image_size"],
        "finished": group.finished,
        "epochs": group.epochs,
        "n": len(group.runs),
        "seeds": " ".join(str(run.config["seed"]) for run in group.runs),
        **{key: f"{statistics.fmean(values):.6g}" for key, values in figures.items()},
        **{f"{key}_sd": f"{spread(values):.6g}" for key, values in figures.items() if len(values) > 1},
        "crossing_epoch": " ".join(str(run.crossing or "-") for run in group.runs),
        "backend": group.backend,
        "device": group.device,
        "memory_kind": kind,
        **{f"writeup_{key}": value for key, value in (asdict(theirs) if theirs else {}).items()},
        "folders": " ".join(str(run.folder) for run in group.runs),
    }


# ---------------------------------------------------------------- the figure

FIGURE_SIZE = (9, 5.5)  # inches, without the legend
LEGEND_WIDTH, TITLE_WIDTH = 56, 80  # characters a line; two columns of a legend in its small type fill the figure


def draw(groups: Sequence[Group], labels: Sequence[str]) -> Figure:
    """Validation top-1 of every group by epoch, its train top-1 dashed, and the epoch at which train passes marked."""
    colours = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
    figure = Figure(figsize=FIGURE_SIZE, dpi=110, layout="constrained")
    axes = figure.subplots()
    for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
        colour = colours[i % len(colours)]
        epochs = range(1, group.epochs + 1)
        marker = "o" if group.epochs == 1 else None  # a line through one point shows nothing
        val, deviation = group.curve("val_top1")
        train, _ = group.curve("train_top1")
        axes.plot(epochs, val, color=colour, marker=marker, label=wrap(label, LEGEND_WIDTH))
        axes.plot(epochs, train, color=colour, marker=marker, linestyle="--", linewidth=1, alpha=0.7)
        if len(group.runs) > 1:
            low, high = ([v + sign * d for v, d in zip(val, deviation, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        if crossing := crossing_epoch(train, val):
            axes.plot(crossing, val[crossing - 1], "D", color=colour, markeredgecolor="black", markersize=7, zorder=3)
    axes.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.suptitle(wrap(title_of(groups), TITLE_WIDTH))
    handles = axes.get_legend_handles_labels()[0]
    keys = {
        "validation": dict(),
        "train": dict(linestyle="--", linewidth=1),
        "train passes validation": dict(linestyle="", marker="D", markeredgecolor="black"),
    }
    if any(len(group.runs) > 1 for group in groups):
        keys["± standard deviation over seeds"] = dict(linewidth=7, alpha=0.2)
    handles += [Line2D([], [], color="black", label=label, **style) for label, style in keys.items()]
    add_legend(figure, handles)
    return figure


def label_of(group: Group, name: Sequence[str]) -> str:
    *common, others = name
    n = f" (n={len(group.runs)})" if len(group.runs) > 1 else ""
    return ", ".join(filter(None, (" ".join(common), others))) + n + ("" if group.finished else ", unfinished")


def wrap(label: str, width: int) -> str:
    """`label` in lines of at most so many characters, broken after commas, and inside a setting that is longer."""
    shown = label.replace("$", r"\$")  # two of them would be mathematics to matplotlib
    breakable = shown.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    lines = textwrap.wrap(breakable, width, break_on_hyphens=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below the axes, in as many columns as fit; the figure grows by its height, so that the axes keep theirs."""

    def make(columns: int) -> Legend:
        return figure.legend(handles=handles, loc="outside lower center", fontsize="small", ncols=columns)

    for columns in range(len(handles), 0, -1):
        legend = make(columns)
        size = legend.get_window_extent()
        if size.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    width, height = FIGURE_SIZE
    figure.set_size_inches(width, height + size.height / figure.dpi)


def title_of(groups: Sequence[Group]) -> str:
    data = {(short(group.config["data"]), group.config["image_size"]) for group in groups}
    if len(data) > 1:
        return "top-1 by epoch, on different data: accuracies do not compare"
    ((name, size),) = data
    return f"top-1 by epoch: {name}, {size} px"


if __name__ == "__main__":
    main()
