"""robust: what adversarial training is worth, beside a copy that is trained as long on clean images."""

import argparse
import statistics
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attacks.objective import TARGETS
from attacks.pgd import MOST_STEPS
from attacks.run.counting import SUMS, accuracies, in_words, sums_under, together, write_together
from attacks.run.figures import grouped_bars, save_figure, security_curve
from attacks.run.hygiene import Examination, examine, print_examination
from attacks.run.kept import over_batches
from attacks.run.subject import Space, Subject, describe, each_subject, load_subject, make_space, size
from attacks.run.sweep import attacked, beside
from attacks.sweep import WRITEUP, Setting
from train import checkpoint, writeup
from train.cli import number
from train.distributed import World
from train.files import read_csv, write_csv, write_json
from train.recipes import DEFAULTS, Settings
from train.run_folder import METRICS
from train.session import train_in

COPIES = ("plain", "adversarial")
CONDITIONS = ("clean", *TARGETS)
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
end take 10 steps of 0.01 in a ball of --epsilon (of epsilon / 10 where that is
more), on the weights after the last epoch. An interrupted command goes on
where it was. Of several checkpoints (seeds, say) the mean and the standard
deviation are told as well.
"""


def add_own_options(parser: argparse.ArgumentParser) -> None:
    add, whole = parser.add_argument, number(int, above=0)
    steps, step_size, epsilon = (DEFAULTS[f"adversarial_{name}"] for name in ("steps", "step_size", "epsilon"))
    add("--epochs", type=whole, default=10, metavar="N", help="further epochs of each copy (10)")
    add("--target", choices=TARGETS, default="least_likely", help="of the images trained on (least_likely)")
    at_most = number(int, above=0, most=MOST_STEPS)
    add("--steps", type=at_most, default=steps, metavar="N", help=f"steps that make them ({steps})")
    add("--step-size", type=size, default=step_size, metavar="X", help=f"of a step, in normalised space ({step_size})")
    add("--epsilon", type=size, default=epsilon, metavar="X", help=f"radius of the ball, also at the end ({epsilon})")


def run(arguments: argparse.Namespace, console: Console, world: World) -> None:
    work = partial(run_one, arguments=arguments, console=console)
    reports = each_subject(arguments, console, world, work)
    if len(reports) > 1 and world.is_main:
        rows = together(list(map(csv_rows, reports)))
        print_together(console, rows, reports)
        write_together(arguments.out, "robust-together.csv", rows, console)


def run_one(pretrained: Subject, folder: Path, *, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    world = pretrained.world
    folder = folder if arguments.out else folder / "robust"
    steps = WRITEUP[0].num_steps  # it gives no settings for this attack: its first ones, long enough to reach epsilon
    setting = Setting(
        num_steps=steps, step_size=max(WRITEUP[0].step_size, arguments.epsilon / steps), epsilon=arguments.epsilon
    )
    report = {
        "attack": asdict(setting),
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
        part = folder / f"{name}.part.json"
        key = subject.conditions() | {"attack": report["attack"]}
        sums = over_batches(subject, part, key, partial(attack_batch, subject, setting), console)
        if not world.is_main:
            continue
        examinations[name] = examine(
            subject, make_space(subject), epsilon=arguments.epsilon, images=arguments.check_images, console=console,
            reported={target.replace("_", " "): partial(attacked, setting, target) for target in TARGETS},
        )
        total = torch.tensor(sums, dtype=torch.float64).sum(dim=0)
        report["copies"][name] = {
            **{under: accuracies(row, len(subject.data.classes)) for under, row in zip(CONDITIONS, total, strict=True)},
            "seconds_per_epoch": seconds_per_epoch(run_folder), "checks": examinations[name].as_json(),
            "conditions": subject.conditions(),
        }
    if not world.is_main:
        return {}
    write_json(folder / "robust.json", report)
    write_csv(folder / "robust.csv", ("copy", "under", "top1", "top5"), csv_rows(report))
    save_figure(folder / "robust.png", draw(report, examinations, make_space(pretrained)))
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
    """(len(CONDITIONS), SUMS) float64: Meter's sums."""
    x, y = x[mine], y[mine]
    if not len(x):
        return torch.zeros(len(CONDITIONS), SUMS, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        under = [subject.model(x)]
    under += [attacked(setting, target, subject.model, x, y) for target in TARGETS]
    return sums_under(under, y, len(subject.data.classes))


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"copy": copy, "under": under, **report["copies"][copy][under]} for copy in COPIES for under in CONDITIONS
    ]


# ---------------------------------------------------------------- what is shown


def print_report(console: Console, report: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="clean and under attack: top-1 / top-5 (%)")
    table.add_column("copy")
    for name in CONDITIONS:
        table.add_column(name.replace("_", " "), justify="right")
    for name in COPIES:
        copy = report["copies"][name]
        table.add_row(name, *(f"{copy[under]['top1']:.2f} / {copy[under]['top5']:.2f}" for under in CONDITIONS))
        if beside(report["pretrained"]):
            theirs = ("{:.2f} / {:.2f}".format(*pair) for pair in writeup.HARDENED[name])
            table.add_row("write-up", *theirs, "", "", style="dim")
    console.print(table)
    attack, training = report["attack"], report["training"]
    plain, adversarial = (report["copies"][name]["seconds_per_epoch"] for name in COPIES)
    console.print(
        f"{training['epochs']} further epochs each; the adversarial copy's on images of {training['num_steps']} steps "
        f"of {training['step_size']:g}, epsilon {training['epsilon']:g}, {training['target'].replace('_', ' ')}. At "
        f"the end {attack['num_steps']} steps of {attack['step_size']:g}, epsilon {attack['epsilon']:g}. The write-up "
        "gives neither the schedule of these epochs nor its final attack: here they are the recipe's, from its "
        f"beginning, and its default. Started from: {describe(report['pretrained'])}"
    )
    console.print(
        f"An adversarial epoch took {adversarial:.3g} s, a plain one {plain:.3g} s: {adversarial / plain:.2f} times as "
        f"long (measured, training steps alone, {report['pretrained']['device']})."
    )


def print_together(console: Console, rows: list[dict[str, Any]], reports: list[dict[str, Any]]) -> None:
    """Mean and spread of several checkpoints' figures."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{rows[0]['n']} checkpoints: mean ± standard deviation (%)")
    table.add_column("under")
    for name in COPIES:
        table.add_column(f"{name}: top-1 / top-5", justify="right")
    table.add_column("top-1 gained", justify="right")
    for under in CONDITIONS:
        plain, adversarial = (row for row in rows if row["under"] == under)
        gains = [
            report["copies"]["adversarial"][under]["top1"] - report["copies"]["plain"][under]["top1"]
            for report in reports
        ]
        gained = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
        table.add_row(under.replace("_", " "), in_words(plain), in_words(adversarial), gained)
    console.print(table)


def draw(report: dict[str, Any], examinations: dict[str, Examination], space: Space) -> Figure:
    """Top-1 of both copies under each attack, and over epsilon."""
    figure = Figure(figsize=(11.5, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    grouped_bars(
        left, [name.replace("_", " ") for name in CONDITIONS],
        {name: [report["copies"][name][under]["top1"] for under in CONDITIONS] for name in COPIES}, COLOURS,
    )
    attack, pretrained, training = report["attack"], report["pretrained"], report["training"]
    left.set_title(
        f"{pretrained['images']:,} images; {attack['num_steps']} steps of {attack['step_size']:g}, "
        f"epsilon {attack['epsilon']:g}", fontsize="medium",
    )
    left.legend(title="copy", fontsize="small")
    for name, examination in examinations.items():
        security_curve(right, examination, space, examination.others, of=f"{name}: ", colour=COLOURS[name])
    right.set_title(f"over epsilon (L-infinity), {examinations['plain'].images} images", fontsize="medium")
    right.set(ylim=(0, None))
    right.legend(fontsize="x-small")
    figure.suptitle(
        f"{pretrained['model']}, {Path(pretrained['data']).name}, {pretrained['image_size']} px: {training['epochs']} "
        "more epochs, adversarial or plain"
    )
    return figure
