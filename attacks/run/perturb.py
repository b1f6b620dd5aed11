"""pgd: one attack on every image, what became of each, and pictures of some."""

import argparse
from dataclasses import asdict, dataclass
from fractions import Fraction
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
from attacks.pgd import AttackReport, attack_report, pgd
from attacks.run.autoattack import CLASSES, require_autoattack
from attacks.run.figures import mean_and_spread, picture_grid, save_figure, security_curve
from attacks.run.hygiene import MANY_ZEROS, Examination, examine, print_doubts, print_examination
from attacks.run.kept import over_batches
from attacks.run.subject import Space, Subject, describe, each_subject, make_space
from train.cli import UserError, number
from train.distributed import World
from train.files import write_csv, write_json

NORMALIZED, PIXEL = SPACES = ("normalized", "pixel")
# Of 0.1 in normalised space the course write-up; of 8 grey levels the literature on CIFAR and ImageNet.
DEFAULTS = {NORMALIZED: {"step_size": 0.01, "epsilon": 0.1}, PIXEL: {"step_size": 2 / 255, "epsilon": 8 / 255}}
SHOWN_IMAGES = 6

DESCRIPTION = """\
Attack every validation image by projected gradients and write what became of each, pictures of some, the accuracy over
epsilon, and checks of whether it can be believed."""

EXAMPLES = """
examples:
  python -m attacks.run pgd runs/mine
  python -m attacks.run pgd runs/mine --target untargeted --steps 50
  python -m attacks.run pgd runs/mine --eps-space pixel --epsilon 8/255
  python -m attacks.run pgd runs/mine --target ocean --limit 200

--target: least_likely (lower the loss of the least confident wrong label),
most_likely (raise that of the most confident), both chosen anew each step;
untargeted (raise the true label's); or a class, to be taken for.
Sizes live in normalised space, where 0.1 is about 5.7 grey levels of 255, or
with --eps-space pixel in pixels of 0 to 1, which may be typed as fractions.
"""

COLUMNS = (
    "true", "clean_predicted", "clean_confidence", "clean_in_top5", "predicted", "confidence", "in_top5", "success",
    "zero_gradient", "forwards", "backwards",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What was asked for."""

    target: str
    """A name in TARGETS, or a class."""
    num_steps: int
    step_size: float
    epsilon: float
    norm: str
    random_start: bool
    restarts: int


def size(text: str) -> float:
    """An argparse type: a number of at least 0, or a fraction as 8/255."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def add_own_options(parser: argparse.ArgumentParser) -> None:
    add, whole = parser.add_argument, number(int, above=0)
    add("--target", default="least_likely", metavar="TARGET", help="what it aims at: see below (least_likely)")
    add("--steps", type=whole, default=10, metavar="N", help="steps (10)")
    add("--step-size", type=size, metavar="X", help="of a step (0.01; in pixels 2/255)")
    add("--epsilon", type=size, metavar="X", help="radius of the ball (0.1; in pixels 8/255)")
    add("--eps-space", choices=SPACES, default=NORMALIZED, help="where these two live (normalized)")
    add("--clamp", action=argparse.BooleanOptionalAction,
        help="keep pixels within their range (default: only with --eps-space pixel)")
    add("--norm", choices=["linf", "l2"], default="linf", help="of the ball and the steps (linf)")
    add("--random-start", action="store_true", help="begin at a random point of the ball")
    add("--restarts", type=whole, default=1, metavar="N", help="runs, of which the worst for an image counts (1)")
    add("--autoattack", action="store_true",
        help="AutoAttack on the check images too, by its own package (pixel space)")


def run(arguments: argparse.Namespace, console: Console, world: World) -> None:
    if arguments.clamp is None:
        arguments.clamp = arguments.eps_space == PIXEL
    if arguments.autoattack:
        if not (arguments.eps_space == PIXEL and arguments.clamp):
            raise UserError("--autoattack attacks pixels of 0 to 1: it needs --eps-space pixel, and no --no-clamp")
        require_autoattack()
    defaults = DEFAULTS[arguments.eps_space]
    sizes = Sizes(
        target=arguments.target, num_steps=arguments.steps,
        step_size=defaults["step_size"] if arguments.step_size is None else arguments.step_size,
        epsilon=defaults["epsilon"] if arguments.epsilon is None else arguments.epsilon,
        norm=arguments.norm, random_start=arguments.random_start, restarts=arguments.restarts,
    )
    if sizes.epsilon == 0:
        raise UserError("--epsilon 0 leaves nothing to attack")
    reports = each_subject(
        arguments, console, world, partial(run_one, arguments=arguments, sizes=sizes, console=console)
    )
    if len(reports) > 1 and world.is_main:
        print_together(console, reports)


def run_one(
    subject: Subject, folder: Path, *, arguments: argparse.Namespace, sizes: Sizes, console: Console
) -> dict[str, Any]:
    space = make_space(subject, arguments.eps_space, clamp=arguments.clamp)
    require_target(subject, sizes.target)
    if arguments.autoattack and len(subject.data.classes) < CLASSES:
        raise UserError(f"--autoattack needs {CLASSES} classes or more, {subject.file} has {len(subject.data.classes)}")
    conditions = {
        "attack": asdict(sizes) | {"eps_space": space.name, "clamp": space.clamp, "precision": "float32"},
        **subject.conditions(),
    }
    part = folder / "pgd.part.json"
    results = over_batches(subject, part, conditions, partial(attack_batch, subject, space, sizes), console)
    if not subject.world.is_main:
        return {}
    table = torch.tensor([row for rows in results for row in rows], dtype=torch.float64)
    report = conditions | figures_of(table)
    report["doubts"] = doubts(report)
    examination = examine(
        subject, space, epsilon=sizes.epsilon, images=arguments.check_images, console=console, norm=sizes.norm,
        with_autoattack=arguments.autoattack,
    )
    report["checks"] = examination.as_json()
    write_json(folder / "pgd.json", report)
    write_csv(folder / "pgd.csv", ("image", *COLUMNS, "first_loss", "last_loss"), image_rows(subject, table))
    save_figure(folder / "pgd-samples.png", samples(subject, space, sizes))
    save_figure(folder / "pgd-security.png", security(report, examination))
    part.unlink(missing_ok=True)
    print_report(console, report, space, examination)
    print_doubts(console, report["doubts"])
    print_examination(console, examination)
    names = ("pgd.json", "pgd.csv", "pgd-samples.png", "pgd-security.png")
    console.print(f"written: {', '.join(str(folder / name) for name in names)}")
    return report


def require_target(subject: Subject, target: str) -> None:
    """Raises UserError for one that is neither a name of TARGETS nor a class."""
    if target not in TARGETS and target not in subject.data.classes:
        classes = ", ".join(subject.data.classes[:12]) + (", ..." if len(subject.data.classes) > 12 else "")
        raise UserError(f"--target {target} is neither one of {', '.join(TARGETS)} nor a class: {classes}")


# ---------------------------------------------------------------- counting


def attack_batch(subject: Subject, space: Space, sizes: Sizes, x: Tensor, y: Tensor, mine: slice) -> Tensor:
    """(B, len(COLUMNS) + num_steps + 1) float64: a row an image, COLUMNS and then the loss curve; of other processes'
    images zeros."""
    rows = torch.zeros(len(x), len(COLUMNS) + sizes.num_steps + 1, dtype=torch.float64, device=x.device)
    x, y = x[mine], y[mine]
    if len(x):
        report = attack(subject, space, sizes, space.enter(x), y)
        rows[mine] = torch.cat([
            torch.stack([
                y, *judged(report.clean_logits, y), *judged(report.logits, y), report.success,
                report.zero_gradient.mean(dim=0), report.forwards, report.backwards,
            ], dim=1).double(),
            report.loss.T.double(),
        ], dim=1)  # fmt: skip
    return rows


def attack(subject: Subject, space: Space, sizes: Sizes, x: Tensor, y: Tensor) -> AttackReport:
    """x (N, 3, S, S) of `space`."""
    options = asdict(sizes) | {"target": target_of(subject, sizes.target, y)}
    return attack_report(space.model(subject.model), x, y=y, bounds=space.bounds, **options)


def target_of(subject: Subject, target: str, y: Tensor) -> str | Tensor:
    """As `pgd` takes it: a name, or the labels (N,) of a class."""
    return target if target in TARGETS else torch.full_like(y, subject.data.classes.index(target))


def judged(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: the predicted class, how confident the model is of it, and whether y is among its first five."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return predicted, confidence, (first == y[:, None]).any(dim=1)


def figures_of(table: Tensor) -> dict[str, Any]:
    """What `attack_batch`'s rows of all images say, accuracies in percent."""
    true, clean, _, clean_in5, predicted, _, in5, success, zeros, forwards, backwards = table.T[: len(COLUMNS)]
    loss = table[:, len(COLUMNS) :]

    def percent(which: Tensor) -> float:
        return 100 * which.double().mean().item()

    return {
        "clean": {"top1": percent(clean == true), "top5": percent(clean_in5)},
        "attacked": {"top1": percent(predicted == true), "top5": percent(in5)},
        "success": percent(success), "zero_gradient": zeros.mean().item(), "mean_loss": loss.mean(dim=0).tolist(),
        "queries_per_image": {"forwards": forwards.mean().item(), "backwards": backwards.mean().item()},
    }


def image_rows(subject: Subject, table: Tensor) -> list[dict[str, Any]]:
    """The rows of pgd.csv: classes by name, losses before the attack and after it."""
    classes, rows = subject.data.classes, []
    for place, values in enumerate(table.tolist()):
        row = dict(zip(COLUMNS, values, strict=False))
        row |= {name: classes[int(row[name])] for name in ("true", "clean_predicted", "predicted")}
        row |= {name: int(row[name]) for name in ("clean_in_top5", "in_top5", "success", "forwards", "backwards")}
        rows.append({"image": place, **row, "first_loss": values[len(COLUMNS)], "last_loss": values[-1]})
    return rows


def doubts(report: dict[str, Any]) -> list[str]:
    """Signs in the attack itself that its accuracy is an artefact."""
    found = []
    if report["zero_gradient"] > MANY_ZEROS:
        found.append(f"{100 * report['zero_gradient']:.0f}% of the gradients' entries are exactly 0: the attack stood "
                     "still")
    first, last = report["mean_loss"][0], report["mean_loss"][-1]
    # "most_likely" raises the loss of whichever label is most confident, so that its loss has no direction.
    target = report["attack"]["target"]
    if target != "most_likely" and (last <= first if target == "untargeted" else last >= first):
        found.append(f"the mean loss did not {'rise' if target == 'untargeted' else 'fall'}: {first:.3g} to {last:.3g}")
    return found


# ---------------------------------------------------------------- what is shown


def print_report(console: Console, report: dict[str, Any], space: Space, examination: Examination) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="accuracy (%)")
    for column in ("", "top-1", "top-5"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("clean", "attacked"):
        table.add_row(name, *(f"{report[name][top]:.2f}" for top in ("top1", "top5")))
    console.print(table)
    loss, queries = report["mean_loss"], report["queries_per_image"]
    console.print(
        f"{attack_in_words(report['attack'])}; {space.describe()}; float32. Success: {report['success']:.2f}% of the "
        f"images. Mean loss: {loss[0]:.3g} to {loss[-1]:.3g}. Queries an image: {queries['forwards']:.0f} forward, "
        f"{queries['backwards']:.0f} backward. {describe(report)}"
    )
    worst = min(top1 for epsilon, top1 in examination.curve if epsilon == report["attack"]["epsilon"])
    if report["attack"]["target"] != "untargeted" and worst < report["attacked"]["top1"]:
        console.print(
            f"The attack is not the worst of its size: untargeted ones of the same epsilon leave {worst:.1f}% right "
            f"({examination.images} images)."
        )


def attack_in_words(attack: dict[str, Any]) -> str:
    more = ", random start" if attack["random_start"] else ""
    more += f", worst of {attack['restarts']}" if attack["restarts"] > 1 else ""
    norm = {"linf": "L-infinity", "l2": "L2"}[attack["norm"]]
    return (
        f"{attack['target'].replace('_', ' ')}, {attack['num_steps']} steps of {attack['step_size']:.4g}, "
        f"{norm} ball of {attack['epsilon']:.4g}{more}"
    )


def print_together(console: Console, reports: list[dict[str, Any]]) -> None:
    """Mean and spread of several checkpoints' figures."""
    table = Table(box=box.SIMPLE_HEAD, title=f"accuracy (%) of {len(reports)} checkpoints: mean ± standard deviation")
    for column in ("", "top-1", "top-5"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("clean", "attacked"):
        table.add_row(name, *(mean_and_spread([report[name][top] for report in reports]) for top in ("top1", "top5")))
    console.print(table)


def samples(subject: Subject, space: Space, sizes: Sizes) -> Figure:
    """A few images, clean and perturbed, and what was changed."""
    x, y = subject.some(SHOWN_IMAGES)
    x = space.enter(x)
    options = asdict(sizes) | {"target": target_of(subject, sizes.target, y)}
    adversarial = pgd(space.model(subject.model), x, y=y, bounds=space.bounds, **options)
    return picture_grid(
        subject, space, y, [("clean", x), ("perturbed", adversarial)], difference=True,
        title=f"{subject.settings.model}: {attack_in_words(options | {'target': sizes.target})}",
    )


def security(report: dict[str, Any], examination: Examination) -> Figure:
    """Accuracy over epsilon, and the mean loss along the attack."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    attack = report["attack"]
    this = f"{attack['target'].replace('_', ' ')}, {attack['num_steps']} steps ({report['images']:,} images)"
    security_curve(
        left, examination.curve, {this: report["attacked"]["top1"]} | examination.others, epsilon=attack["epsilon"],
        label="untargeted, 10 steps of epsilon / 4",
    )
    left.set_title(f"accuracy over epsilon, {examination.images} images")
    left.legend(fontsize="small")
    loss = report["mean_loss"]
    right.plot(range(len(loss)), loss, marker="o", color="tab:orange")
    right.set(
        xlabel="step", ylabel="mean loss of the label aimed at",
        title=f"loss along the attack ({attack['target'].replace('_', ' ')})",
    )
    figure.suptitle(f"{report['model']}, {Path(report['data']).name}, {report['image_size']} px")
    return figure
