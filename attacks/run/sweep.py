"""sweep: the course write-up's table of accuracies under attack, in one pass over the images."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from attacks.pgd import pgd
from attacks.run.counting import SUMS, accuracies, in_words, sums_under, together, write_together
from attacks.run.figures import grouped_bars, picture_grid, save_figure
from attacks.run.hygiene import MANY_ZEROS, examine, print_doubts, print_examination, stood_still
from attacks.run.kept import over_batches
from attacks.run.subject import Subject, describe, each_subject, make_space
from attacks.sweep import WRITEUP, Setting, sweep
from train import writeup
from train.distributed import World
from train.files import write_csv, write_json

TARGETS = ("least_likely", "most_likely")
COLOURS = {"least likely": "tab:blue", "most likely": "tab:orange"}
CELLS = [(setting, target) for setting in WRITEUP for target in TARGETS]
# Whose images are shown: the default, more steps, everything raised.
SHOWN = (WRITEUP[0], WRITEUP[1], WRITEUP[5])
SHOWN_IMAGES = 5

DESCRIPTION = """\
Top-1 and top-5 under six settings (10 or 50 steps of 0.01 or 0.1 in an L-infinity ball of 0.1 or 10) and two targets,
as the course write-up reports them. "least likely" lowers the loss of the least confident label that is wrong, "most
likely" raises that of the most confident one, both chosen anew each step, so that the second may lead back to the true
class: more steps of it are not always a stronger attack. Sizes live in normalised space, where 0.1 is about 5.7 grey
levels of 255, and pixels are not kept within their range. What is done is kept: the same command goes on where it was
interrupted."""

EXAMPLES = """
examples:
  python -m attacks.run sweep runs/simplenet-torch-20260102-030405
  python -m attacks.run sweep runs/seed0 runs/seed1 runs/seed2
  python -m attacks.run sweep best.pt --data ~/miniplaces --limit 1000 --out out

Of several checkpoints the mean and the standard deviation are told as well.
"""


def run(arguments: argparse.Namespace, console: Console, world: World) -> None:
    work = partial(run_one, console=console, check_images=arguments.check_images)
    reports = each_subject(arguments, console, world, work)
    if len(reports) > 1 and world.is_main:
        rows = together(list(map(accuracies_of, reports)))
        print_together(console, rows)
        write_together(arguments.out, "sweep-together.csv", rows, console)


def run_one(subject: Subject, folder: Path, *, console: Console, check_images: int) -> dict[str, Any]:
    conditions = {
        "attack": "L-infinity, epsilon in normalised space, pixels not clamped, no random start",
        **subject.conditions(),
    }
    part = folder / "sweep.part.json"
    key = conditions | {"settings": [asdict(setting) for setting in WRITEUP]}
    sums = torch.tensor(over_batches(subject, part, key, partial(attack_batch, subject), console), dtype=torch.float64)
    if not subject.world.is_main:
        return {}
    report = conditions | figures_of(sums.sum(dim=0), len(subject.data.classes))
    report["doubts"] = doubts(report)
    first = WRITEUP[0]
    examination = examine(
        subject, make_space(subject), epsilon=first.epsilon, images=check_images, console=console,
        reported={
            f"{target.replace('_', ' ')}, {first.num_steps} × {first.step_size:g}": partial(attacked, first, target)
            for target in TARGETS
        },
    )
    report["checks"] = examination.as_json()
    write_json(folder / "sweep.json", report)
    columns = ("num_steps", "step_size", "epsilon", "target", "top1", "top5", "zero_gradient")
    write_csv(folder / "sweep.csv", columns, report["rows"])
    save_figure(folder / "sweep.png", bar_chart(report))
    save_figure(folder / "sweep-samples.png", samples(subject))
    part.unlink(missing_ok=True)
    print_sweep(console, report)
    print_doubts(console, report["doubts"])
    print_examination(console, examination)
    names = ("sweep.json", "sweep.csv", "sweep.png", "sweep-samples.png")
    console.print(f"written: {', '.join(str(folder / name) for name in names)}")
    return report


# ---------------------------------------------------------------- counting


def attack_batch(subject: Subject, x: Tensor, y: Tensor, mine: slice) -> Tensor:
    """(1 + len(CELLS), 5) float64: Meter's sums of the clean images, then of each cell, and sums of zero gradients."""
    x, y = x[mine], y[mine]
    sums = torch.zeros(1 + len(CELLS), SUMS + 1, dtype=torch.float64, device=x.device)
    if not len(x):  # a process whose share of the last batch is none
        return sums
    with torch.no_grad():
        clean = subject.model(x)
    swept = {
        (setting, target): found
        for target in TARGETS
        for setting, found in zip(WRITEUP, sweep(subject.model, x, target, y, settings=WRITEUP), strict=True)
    }
    under = [clean, *(swept[cell].logits for cell in CELLS)]
    sums[:, :SUMS] = sums_under(under, y, len(subject.data.classes))
    sums[1:, SUMS] = torch.stack([swept[cell].zero_gradient.double().sum() for cell in CELLS])
    return sums


def figures_of(sums: Tensor, classes: int) -> dict[str, Any]:
    """What `attack_batch`'s sums over all images say: accuracies in percent, clean and of each cell, and the mean
    share of zero gradients."""
    images = sums[0, SUMS - 1].item()
    return {
        "clean": accuracies(sums[0, :SUMS], classes),
        "rows": [
            asdict(setting) | {"target": target} | accuracies(row[:SUMS], classes)
            | {"zero_gradient": row[SUMS].item() / images}
            for (setting, target), row in zip(CELLS, sums[1:], strict=True)
        ],
    }


def attacked(setting: Setting, target: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, K), the logits of what one attack makes of x (N, C, H, W), whose true labels are y."""
    (swept,) = sweep(model, x, target, y, settings=(setting,))
    return swept.logits


def accuracies_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows without what differs from checkpoint to checkpoint besides accuracies; the clean one last."""
    names = ("num_steps", "step_size", "epsilon", "target")
    rows = [{name: row[name] for name in (*names, "top1", "top5")} for row in report["rows"]]
    return [*rows, {**dict.fromkeys(names, ""), "target": "clean", **report["clean"]}]


# ---------------------------------------------------------------- can it be believed


def doubts(report: dict[str, Any]) -> list[str]:
    """Signs in the table itself that an accuracy under attack is an artefact, in words; none of a healthy model.

    After Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 3.1.
    """
    found = []
    image = 100 / report["images"]  # one image, in percent
    for target in TARGETS:
        rows = [row for row in report["rows"] if row["target"] == target]
        name = target.replace("_", " ")
        first, more_steps, _, far, larger, largest = rows
        zeros = max(row["zero_gradient"] for row in rows)
        if zeros > MANY_ZEROS:
            found.append(f"{name}: {stood_still(zeros)}")
        # Rounding may turn a few images that lie on the border, which is no sign of anything.
        if abs(first["top1"] - far["top1"]) > max(0.5, 2 * image):
            found.append(
                f"{name}: 10 steps of 0.01 give {far['top1']:.2f}% with epsilon 10 and {first['top1']:.2f}% with 0.1, "
                "though they reach neither"
            )
        if target == "most_likely":  # turns against its own success: from a wrong class it may lead back
            continue
        for stronger, what in ((more_steps, "50 steps"), (larger, "epsilon 10"), (largest, "50 steps and epsilon 10")):
            if stronger["top1"] > first["top1"] + max(1.0, 2 * image):
                found.append(
                    f"{name}: {what} leave more right ({stronger['top1']:.2f}%) than the weaker attack "
                    f"({first['top1']:.2f}%)"
                )
    return found


# ---------------------------------------------------------------- what is shown


def beside(report: dict[str, Any]) -> bool:
    """Whether the write-up's figures are of the same task: SimpleNet, its 100 classes, its image size."""
    return (report["model"], report["classes"], report["image_size"]) == (
        "simplenet", writeup.CLASSES, writeup.IMAGE_SIZE,
    )


def make_table(title: str, *, compared: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("steps", "step size", "epsilon"):
        table.add_column(column, justify="right")
    for target in TARGETS:
        table.add_column(target.replace("_", " "), justify="right")
        if compared:
            table.add_column("write-up", justify="right", style="dim")
    return table


def print_sweep(console: Console, report: dict[str, Any]) -> None:
    compared, rows = beside(report), dict(zip(CELLS, report["rows"], strict=True))
    table = make_table("accuracy under attack: top-1 / top-5 (%)", compared=compared)
    for setting in WRITEUP:
        numbers = (setting.num_steps, setting.step_size, setting.epsilon)
        cells = []
        for target in TARGETS:
            row = rows[setting, target]
            cells.append(f"{row['top1']:.2f} / {row['top5']:.2f}")
            if compared:
                cells.append("{:.2f} / {:.2f}".format(*writeup.UNDER_ATTACK[numbers][target]))
        table.add_row(*(f"{value:g}" for value in numbers), *cells)
    console.print(table)
    clean = report["clean"]
    console.print(f"clean: {clean['top1']:.2f} / {clean['top5']:.2f}. {describe(report)} {report['attack']}.")


def print_together(console: Console, rows: list[dict[str, Any]]) -> None:
    """Mean and spread of several checkpoints' figures, those of the clean images last."""
    *cells, clean = rows
    table = make_table(f"top-1 / top-5 (%) of {clean['n']} checkpoints: mean ± standard deviation", compared=False)
    for i, setting in enumerate(WRITEUP):
        of_targets = cells[i * len(TARGETS) : (i + 1) * len(TARGETS)]
        table.add_row(
            str(setting.num_steps), f"{setting.step_size:g}", f"{setting.epsilon:g}", *map(in_words, of_targets)
        )
    console.print(table)
    console.print(f"clean: {in_words(clean)}")


def bar_chart(report: dict[str, Any]) -> Figure:
    """Top-1 by setting, a bar for each target, the clean accuracy as a line."""
    figure = Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    grouped_bars(
        axes, [f"{s.num_steps} × {s.step_size:g}\nepsilon {s.epsilon:g}" for s in WRITEUP],
        {
            target.replace("_", " "): [row["top1"] for row in report["rows"] if row["target"] == target]
            for target in TARGETS
        },
        COLOURS,
    )
    clean = report["clean"]["top1"]
    axes.axhline(clean, color="black", linestyle="--", linewidth=1, label=f"clean, {clean:.1f}%")
    axes.set(ylim=(0, 1.15 * max(clean, *(row["top1"] for row in report["rows"]), 1)))
    axes.legend()
    name = Path(report["data"]).name
    figure.suptitle(
        f"{report['model']} under attack: {report['images']:,} images, {name}, {report['image_size']} px\n"
        "steps × step size, L-infinity, sizes in normalised space, pixels not clamped", fontsize="medium",
    )
    return figure


def samples(subject: Subject) -> Figure:
    """A few images, clean and under the settings of SHOWN, least likely."""
    x, y = subject.some(SHOWN_IMAGES)
    space = make_space(subject)
    columns = [("clean", x)]
    for setting in SHOWN:
        adversarial = pgd(subject.model, x, "least_likely", y, **asdict(setting))
        columns.append((f"{setting.num_steps} × {setting.step_size:g}, epsilon {setting.epsilon:g}", adversarial))
    return picture_grid(
        subject, space, y, columns, difference=True,
        title=f"{subject.settings.model}, least likely; {space.describe()}",
    )
