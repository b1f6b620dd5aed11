"""pgd: one attack on every image, what became of each, and pictures of some."""

import argparse
from dataclasses import asdict, dataclass
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
from attacks.pgd import MOST_STEPS, AttackReport, attack_report, pgd
from attacks.run.autoattack import CLASSES, require_autoattack
from attacks.run.counting import in_words, together, write_together
from attacks.run.figures import picture_grid, save_figure, security_curve
from attacks.run.hygiene import (
    MANY_ZEROS,
    Attack,
    Examination,
    examine,
    percent,
    print_doubts,
    print_examination,
    stood_still,
)
from attacks.run.kept import over_batches
from attacks.run.subject import Space, Subject, describe, each_subject, make_space, size
from train.cli import UserError, number
from train.distributed import World
from train.files import write_csv, write_json

NORMALIZED, PIXEL = SPACES = ("normalized", "pixel")
# Of 0.1 in normalised space the course write-up; of 8 grey levels, and of 0.5 in L2, the literature on CIFAR.
EPSILONS = {("linf", NORMALIZED): 0.1, ("linf", PIXEL): 8 / 255, ("l2", NORMALIZED): 2.0, ("l2", PIXEL): 0.5}
STEP_SIZE, SHARE = 0.01, 0.25  # the write-up's step, whatever epsilon; elsewhere a share of epsilon
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


def add_own_options(parser: argparse.ArgumentParser) -> None:
    add, whole = parser.add_argument, number(int, above=0)
    add("--target", default="least_likely", metavar="TARGET", help="what it aims at: see below (least_likely)")
    add("--steps", type=number(int, above=0, most=MOST_STEPS), default=10, metavar="N", help="steps (10)")
    add("--step-size", type=size, metavar="X", help="of a step (0.01; in pixels, and of L2, epsilon / 4)")
    add("--epsilon", type=size, metavar="X",
        help="radius of the ball (0.1; in pixels 8/255; of L2 2, in pixels 0.5)")
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
    kind = (arguments.norm, arguments.eps_space)
    epsilon = arguments.epsilon or EPSILONS[kind]
    sizes = Sizes(
        target=arguments.target, num_steps=arguments.steps,
        step_size=arguments.step_size or (STEP_SIZE if kind == ("linf", NORMALIZED) else SHARE * epsilon),
        epsilon=epsilon, norm=arguments.norm, random_start=arguments.random_start, restarts=arguments.restarts,
    )
    reports = each_subject(
        arguments, console, world, partial(run_one, arguments=arguments, sizes=sizes, console=console),
        check=partial(require_fit, target=sizes.target, with_autoattack=arguments.autoattack),
    )
    if len(reports) > 1 and world.is_main:
        rows = together([
            [{"images": name, **report[name]} for name in ("clean", "attacked")] for report in reports
        ])  # fmt: skip
        print_together(console, rows)
        write_together(arguments.out, "pgd-together.csv", rows, console)


def run_one(
    subject: Subject, folder: Path, *, arguments: argparse.Namespace, sizes: Sizes, console: Console
) -> dict[str, Any]:
    space = make_space(subject, arguments.eps_space, clamp=arguments.clamp)
    conditions = {
        "attack": asdict(sizes) | {"eps_space": space.name, "clamp": space.clamp},
        **subject.conditions(),
    }
    part = folder / "pgd.part.json"
    results = over_batches(subject, part, conditions, partial(attack_batch, subject, space, sizes), console)
    if not subject.world.is_main:
        return {}
    table = torch.tensor([row for rows in results for row in rows], dtype=torch.float64)
    aimed = subject.data.classes.index(sizes.target) if sizes.target not in TARGETS else None
    report = conditions | figures_of(table, aimed)
    report["doubts"] = doubts(report)
    examination = examine(
        subject, space, epsilon=sizes.epsilon, images=arguments.check_images, console=console, norm=sizes.norm,
        with_autoattack=arguments.autoattack, reported={"this attack": reported(subject, space, sizes)},
    )
    report["checks"] = examination.as_json()
    write_json(folder / "pgd.json", report)
    write_csv(folder / "pgd.csv", ("image", *COLUMNS, "first_loss", "last_loss"), image_rows(subject, table))
    save_figure(folder / "pgd-samples.png", samples(subject, space, sizes))
    save_figure(folder / "pgd-security.png", security(report, examination, space))
    part.unlink(missing_ok=True)
    print_report(console, report, space)
    print_doubts(console, report["doubts"])
    print_examination(console, examination)
    names = ("pgd.json", "pgd.csv", "pgd-samples.png", "pgd-security.png")
    console.print(f"written: {', '.join(str(folder / name) for name in names)}")
    return report


def require_fit(subject: Subject, *, target: str, with_autoattack: bool) -> None:
    """Raises UserError for a target that is neither a name of TARGETS nor a class, and too few classes."""
    if with_autoattack and len(subject.data.classes) < CLASSES:
        raise UserError(f"--autoattack needs {CLASSES} classes or more, {subject.file} has {len(subject.data.classes)}")
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


def reported(subject: Subject, space: Space, sizes: Sizes) -> Attack:
    """The attack as `examine` asks for it."""
    return lambda _, x, y: attack(subject, space, sizes, x, y).logits


def target_of(subject: Subject, target: str, y: Tensor) -> str | Tensor:
    """As `pgd` takes it: a name, or the labels (N,) of a class."""
    return target if target in TARGETS else torch.full_like(y, subject.data.classes.index(target))


def judged(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: the predicted class, how confident the model is of it, and whether y is among its first five."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return predicted, confidence, (first == y[:, None]).any(dim=1)


def figures_of(table: Tensor, target: int | None) -> dict[str, Any]:
    """What `attack_batch`'s rows of all images say, accuracies in percent; `target` is the class that was aimed at."""
    true, clean, _, clean_in5, predicted, _, in5, success, zeros, forwards, backwards = table.T[: len(COLUMNS)]
    loss = table[:, len(COLUMNS) :]

    # Those that the attack has still to turn: right ones, or with a class for a target those not taken for it.
    left = (clean != target) if target is not None else (clean == true)
    attackable = int(left.sum())
    success_share = percent(success[left]) if attackable else None
    return {
        "clean": {"top1": percent(clean == true), "top5": percent(clean_in5)},
        "attacked": {"top1": percent(predicted == true), "top5": percent(in5)},
        "attackable": attackable, "success": success_share, "zero_gradient": zeros.mean().item(),
        "mean_loss": loss.mean(dim=0).tolist(),
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
        found.append(stood_still(report["zero_gradient"]))
    first, last = report["mean_loss"][0], report["mean_loss"][-1]
    # "most_likely" raises the loss of whichever label is most confident, so that its loss has no direction.
    target = report["attack"]["target"]
    if target != "most_likely" and (last <= first if target == "untargeted" else last >= first):
        found.append(f"the mean loss did not {'rise' if target == 'untargeted' else 'fall'}: {first:.3g} to {last:.3g}")
    return found


# ---------------------------------------------------------------- what is shown


def print_report(console: Console, report: dict[str, Any], space: Space) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="accuracy (%)")
    for column in ("", "top-1", "top-5"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("clean", "attacked"):
        table.add_row(name, *(f"{report[name][top]:.2f}" for top in ("top1", "top5")))
    console.print(table)
    loss, queries = report["mean_loss"], report["queries_per_image"]
    console.print(
        f"{attack_in_words(report['attack'])}; {space.describe()}. {success_in_words(report)} Mean loss: {loss[0]:.3g} "
        f"to {loss[-1]:.3g}. Queries an image: {queries['forwards']:.0f} forward, {queries['backwards']:.0f} backward. "
        f"{describe(report)}"
    )


def success_in_words(report: dict[str, Any]) -> str:
    target = report["attack"]["target"]
    aimed = target not in TARGETS
    if not report["attackable"]:
        return f"No image was {f'not taken for {target} anyway' if aimed else 'right to begin with'}."
    which = f"that were not taken for {target}" if aimed else "that were right"
    how = "now are" if aimed else "are fooled"
    return f"Of the {report['attackable']:,} images {which} {report['success']:.2f}% {how}."


def attack_in_words(attack: dict[str, Any]) -> str:
    more = ", random start" if attack["random_start"] else ""
    more += f", worst of {attack['restarts']}" if attack["restarts"] > 1 else ""
    norm = {"linf": "L-infinity", "l2": "L2"}[attack["norm"]]
    return (
        f"{attack['target'].replace('_', ' ')}, {attack['num_steps']} steps of {attack['step_size']:.4g}, "
        f"{norm} ball of {attack['epsilon']:.4g}{more}"
    )


def print_together(console: Console, rows: list[dict[str, Any]]) -> None:
    """Mean and spread of several checkpoints' figures."""
    table = Table(box=box.SIMPLE_HEAD, title=f"accuracy (%) of {rows[0]['n']} checkpoints: mean ± standard deviation")
    table.add_column("")
    table.add_column("top-1 / top-5", justify="right")
    for row in rows:
        table.add_row(row["images"], in_words(row))
    console.print(table)


def samples(subject: Subject, space: Space, sizes: Sizes) -> Figure:
    """A few images, clean and perturbed, and what was changed."""
    x, y = subject.some(SHOWN_IMAGES)
    x = space.enter(x)
    options = asdict(sizes) | {"target": target_of(subject, sizes.target, y)}
    adversarial = pgd(space.model(subject.model), x, y=y, bounds=space.bounds, **options)
    return picture_grid(
        subject, space, y, [("clean", x), ("perturbed", adversarial)], difference=True,
        title=f"{subject.settings.model}: {attack_in_words(options | {'target': sizes.target})}\n{space.describe()}",
    )


def security(report: dict[str, Any], examination: Examination, space: Space) -> Figure:
    """Accuracy over epsilon, and the mean loss along the attack."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = report["attack"]
    this = f"{sizes['target'].replace('_', ' ')}, {sizes['num_steps']} steps ({report['images']:,} images)"
    security_curve(left, examination, space, {this: report["attacked"]["top1"]} | examination.others)
    norm = {"linf": "L-infinity", "l2": "L2"}[sizes["norm"]]
    left.set(title=f"accuracy over epsilon ({norm}), {examination.images} images", ylim=(0, None))
    left.legend(fontsize="small")
    loss = report["mean_loss"]
    right.plot(range(len(loss)), loss, marker="o", color="tab:orange")
    right.set(
        xlabel="step", ylabel="mean loss of the label aimed at",
        title=f"loss along the attack ({sizes['target'].replace('_', ' ')})",
    )
    figure.suptitle(f"{report['model']}, {Path(report['data']).name}, {report['image_size']} px")
    return figure
