"""robust: what adversarial training is worth, beside a copy that is trained as long on clean images."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.objective import TARGETS
from attacks.run.figures import mean_and_spread, save_figure, security_curve
from attacks.run.hygiene import Examination, examine, print_examination
from attacks.run.kept import over_batches
from attacks.run.subject import Subject, describe, each_subject, load_subject, make_space
from attacks.run.sweep import beside
from attacks.sweep import Setting, sweep
from train import checkpoint, writeup
from train.cli import number
from train.distributed import World
from train.files import read_csv, write_csv, write_json
from train.meter import Meter
from train.recipes import Settings
from train.run_folder import METRICS
from train.session import train_in

COPIES = ("plain", "adversarial")
CONDITIONS = ("clean", *TARGETS)
STEPS, STEP_SIZE = 10, 0.01  # of the attacks at the end: the write-up gives none, these are its defaults
COLOURS = {"plain": "tab:blue", "adversarial": "tab:orange"}

DESCRIPTION = """\
Train two copies of a pre-trained model some epochs more, one on adversarial images made on the fly and one on the clean
images in the same order with the same augmentation, and attack both. Says what either withstands, what the adversarial
epochs cost, and whether the figures can be believed."""

EXAMPLES = """
examples:
  python -m train.run simplenet --data ~/miniplaces --epochs 30 --out runs/pre
  python -m attacks.run robust runs/pre
  python -m attacks.run robust runs/pre0 runs/pre1 runs/pre2 --out runs/robust

Both copies start from the checkpoint's weights and train with its recipe,
whose schedule begins anew; they are ordinary run folders. The attacks at the
end take 10 steps of 0.01 in a ball of --epsilon, on the weights after the last
epoch. An interrupted command goes on where it was. Of several checkpoints
(seeds, say) the mean and the standard deviation are told as well.
"""


def add_own_options(parser: argparse.ArgumentParser) -> None:
    add, whole, size = parser.add_argument, number(int, above=0), number(float, above=0)
    add("--epochs", type=whole, default=10, metavar="N", help="further epochs of each copy (10)")
    add("--target", choices=TARGETS, default="least_likely", help="of the images trained on (least_likely)")
    add("--steps", type=whole, default=5, metavar="N", help="steps that make them (5)")
    add("--step-size", type=size, default=0.01, metavar="X", help="of a step, in normalised space (0.01)")
    add("--epsilon", type=size, default=0.1, metavar="X", help="radius of the ball, also at the end (0.1)")


def run(arguments: argparse.Namespace, console: Console, world: World) -> None:
    work = partial(run_one, arguments=arguments, console=console)
    reports = each_subject(arguments, console, world, work)
    if len(reports) > 1 and world.is_main:
        print_together(console, reports)


def run_one(pretrained: Subject, folder: Path, *, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    world = pretrained.world
    folder = folder if arguments.out else folder / "robust"
    report = {
        "attack": {"num_steps": STEPS, "step_size": STEP_SIZE, "epsilon": arguments.epsilon, "precision": "float32"},
        "training": {
            "epochs": arguments.epochs, "target": arguments.target, "num_steps": arguments.steps,
            "step_size": arguments.step_size, "epsilon": arguments.epsilon,
        },
        "pretrained": pretrained.conditions(), "copies": {},
    }
    examinations = {}
    for name in COPIES:
        run_folder = folder / name
        train_in(run_folder, settings_of_copy(pretrained, name, arguments), console, world)
        subject = load_subject(run_folder / checkpoint.LAST, arguments, console, world)
        setting = Setting(num_steps=STEPS, step_size=STEP_SIZE, epsilon=arguments.epsilon)
        part = folder / f"{name}.part.json"
        key = subject.conditions() | {"attack": report["attack"]}
        sums = over_batches(subject, part, key, partial(attack_batch, subject, setting), console)
        if not world.is_main:
            continue
        examinations[name] = examine(
            subject, make_space(subject), epsilon=arguments.epsilon, images=arguments.check_images, console=console
        )
        report["copies"][name] = {
            **accuracies(torch.tensor(sums, dtype=torch.float64).sum(dim=0), len(subject.data.classes)),
            "seconds_per_epoch": seconds_per_epoch(run_folder), "checks": examinations[name].as_json(),
            "conditions": subject.conditions(),
        }
    if not world.is_main:
        return {}
    write_json(folder / "robust.json", report)
    write_csv(folder / "robust.csv", ("copy", "under", "top1", "top5"), csv_rows(report))
    save_figure(folder / "robust.png", draw(report, examinations))
    for name in COPIES:
        (folder / f"{name}.part.json").unlink(missing_ok=True)
    print_report(console, report)
    for name, examination in examinations.items():
        print_examination(console, examination, of=f"the {name} copy")
    console.print(f"written: {', '.join(str(folder / f'robust.{kind}') for kind in ('json', 'csv', 'png'))}")
    return report


def settings_of_copy(pretrained: Subject, name: str, arguments: argparse.Namespace) -> Settings:
    """The checkpoint's own, from its weights on; the copies' differ in what they see alone.

    Validated on all images: --limit is of those attacked, and another one finds the copies trained.
    """
    settings = replace(
        pretrained.trained, data=pretrained.settings.data, conv=pretrained.settings.conv, epochs=arguments.epochs,
        start_from=str(pretrained.file.absolute()), weights="none", device=pretrained.device.type, adversarial=None,
    )
    if name == "plain":
        return settings
    return replace(
        settings, adversarial=arguments.target, adversarial_steps=arguments.steps,
        adversarial_step_size=arguments.step_size, adversarial_epsilon=arguments.epsilon,
    )


def seconds_per_epoch(folder: Path) -> float:
    """Measured, of the training steps alone: the mean over the epochs."""
    steps = [float(row["images_per_s"]) for row in read_csv(folder / METRICS)]
    images = checkpoint.load(folder / checkpoint.LAST)["timing"]["total_images"]
    return sum(images / len(steps) / speed for speed in steps) / len(steps)


# ---------------------------------------------------------------- counting


def attack_batch(subject: Subject, setting: Setting, x: Tensor, y: Tensor, mine: slice) -> Tensor:
    """(len(CONDITIONS), 4) float64: Meter's sums."""
    x, y, classes = x[mine], y[mine], len(subject.data.classes)
    sums = torch.zeros(len(CONDITIONS), 4, dtype=torch.float64, device=x.device)
    if not len(x):
        return sums
    meter = Meter(classes, x.device)
    with torch.no_grad():
        under = {"clean": subject.model(x)}
    for target in TARGETS:
        (swept,) = sweep(subject.model, x, target, y, settings=(setting,))
        under[target] = swept.logits
    return torch.stack([meter.sums_of(logits, y, cross_entropy(logits, y)) for logits in under.values()])


def accuracies(sums: Tensor, classes: int) -> dict[str, dict[str, float]]:
    """{condition: {"top1", "top5"}}, in percent."""
    found = {}
    for name, row in zip(CONDITIONS, sums, strict=True):
        meter = Meter(classes, sums.device)
        meter.sums = row
        _, top1, top5 = meter.compute()
        found[name] = {"top1": top1, "top5": top5}
    return found


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"copy": copy, "under": under, **report["copies"][copy][under]} for copy in COPIES for under in CONDITIONS
    ]


# ---------------------------------------------------------------- what is shown


def make_table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("copy")
    for name in CONDITIONS:
        table.add_column(name.replace("_", " "), justify="right")
    return table


def print_report(console: Console, report: dict[str, Any]) -> None:
    table = make_table("clean and under attack: top-1 / top-5 (%)")
    for name in COPIES:
        copy = report["copies"][name]
        table.add_row(name, *(f"{copy[under]['top1']:.2f} / {copy[under]['top5']:.2f}" for under in CONDITIONS))
        if beside(report["pretrained"]):
            clean, attacked = ("{:.2f} / {:.2f}".format(*pair) for pair in writeup.HARDENED[name])
            table.add_row("write-up", clean, attacked, "", "", style="dim")
    console.print(table)
    attack, training = report["attack"], report["training"]
    plain, adversarial = (report["copies"][name]["seconds_per_epoch"] for name in COPIES)
    console.print(
        f"{training['epochs']} further epochs each; the adversarial copy's on images of {training['num_steps']} steps "
        f"of {training['step_size']:g}, epsilon {training['epsilon']:g}, {training['target'].replace('_', ' ')}. At "
        f"the end {attack['num_steps']} steps of {attack['step_size']:g}, epsilon {attack['epsilon']:g}, float32. "
        f"Started from: {describe(report['pretrained'])}"
    )
    console.print(
        f"An adversarial epoch took {adversarial:.3g} s, a plain one {plain:.3g} s: {adversarial / plain:.2f} times as "
        f"long (measured, training steps alone, {report['pretrained']['device']})."
    )


def print_together(console: Console, reports: list[dict[str, Any]]) -> None:
    """Mean and spread of several checkpoints' figures."""
    table = make_table(f"top-1 (%) of {len(reports)} checkpoints: mean ± standard deviation")
    for name in COPIES:
        table.add_row(
            name, *(mean_and_spread([report["copies"][name][under]["top1"] for report in reports])
                    for under in CONDITIONS)
        )  # fmt: skip
    gains = [
        [report["copies"]["adversarial"][under]["top1"] - report["copies"]["plain"][under]["top1"]
         for report in reports]
        for under in CONDITIONS
    ]  # fmt: skip
    table.add_row("difference", *map(mean_and_spread, gains))
    console.print(table)


def draw(report: dict[str, Any], examinations: dict[str, Examination]) -> Figure:
    """Top-1 of both copies under each attack, and over epsilon."""
    figure = Figure(figsize=(10.5, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.38
    for i, name in enumerate(COPIES):
        values = [report["copies"][name][under]["top1"] for under in CONDITIONS]
        places = [n + (i - 0.5) * width for n in range(len(values))]
        bars = left.bar(places, values, width, color=COLOURS[name], label=f"{name} copy")
        left.bar_label(bars, fmt="%.1f", fontsize="small")
    left.set_xticks(range(len(CONDITIONS)), [name.replace("_", " ") for name in CONDITIONS])
    left.set(ylabel="top-1 (%)", title=f"{report['pretrained']['images']:,} images")
    left.legend(fontsize="small")
    for name, examination in examinations.items():
        security_curve(
            right, examination.curve, examination.others, epsilon=report["attack"]["epsilon"],
            label=f"{name} copy, untargeted PGD", colour=COLOURS[name],
        )
    right.set_title(f"over epsilon, {examinations['plain'].images} images")
    right.legend(fontsize="x-small")
    pretrained, training = report["pretrained"], report["training"]
    figure.suptitle(
        f"{pretrained['model']}, {Path(pretrained['data']).name}, {pretrained['image_size']} px: {training['epochs']} "
        "more epochs, adversarial or plain"
    )
    return figure
