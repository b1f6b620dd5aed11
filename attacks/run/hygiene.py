"""Whether an accuracy under attack can be believed: checks that an artefact fails and a sound model passes.

After Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 3.1, and Carlini et al. 2019,
"On evaluating adversarial robustness": gradients that vanish, losses that do not rise, accuracies that do not fall with
epsilon, black-box attacks that beat white-box ones; and one of our own, a convolution whose gradient is wrong.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.pgd import AttackReport, attack_report
from attacks.run.autoattack import autoattack
from attacks.run.kept import progress_bar
from attacks.run.subject import Space, Subject
from attacks.square import square
from train.devices import one_thread

# Of a sound network's input gradient less than this is exactly 0; more, and steps are not taken that should be.
MANY_ZEROS = 0.05
# Of a sound network nearly every image ends with a higher loss than it began with.
MANY_STUCK = 0.10
# Chance may turn as many images, in percent: the border between right and wrong is a matter of rounding.
SLACK = 2.0
# What APGD may win by its fifty adaptive steps without speaking against ten plain ones, in percent.
BETTER_STEPS = 5.0

CHECK_IMAGES = 128
KERNEL_IMAGES = 32  # of which the interpreter computes every step
STEPS, ADAPTIVE_STEPS, QUERIES = 10, 50, 100
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of epsilon, for the curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question to a model, and its answer."""

    name: str
    found: str
    """The figures, in words."""
    doubt: str | None = None
    """What speaks against believing an accuracy under attack; None where nothing does."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """The checks of one model, and the curve they rest on."""

    images: int
    """How many were attacked; KERNEL_IMAGES at most for the kernel check."""
    curve: list[tuple[float, float]]
    """(epsilon, top-1 in percent) under untargeted attacks, the clean images first."""
    others: dict[str, float]
    """Top-1 in percent under other attacks, at the epsilon in the middle of the curve."""
    checks: list[Check]

    @property
    def doubts(self) -> list[str]:
        return [check.doubt for check in self.checks if check.doubt]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examiner:
    """One model, images of its space, and the sizes to attack them by."""

    subject: Subject
    space: Space
    x: Tensor
    """(N, 3, S, S), of `space`."""
    y: Tensor
    epsilon: float
    norm: str

    @property
    def network(self) -> nn.Module:
        return self.space.model(self.subject.model)

    @property
    def slack(self) -> float:
        """What chance may turn, in percent."""
        return max(SLACK, 200 / len(self.x))

    def untargeted(self, epsilon: float, *, model: nn.Module | None = None, count: int | None = None) -> AttackReport:
        """Ten steps, long enough to reach any point of the ball: 2.5 epsilon / steps (Madry et al. 2018)."""
        return attack_report(
            self.network if model is None else model, self.x[:count], "untargeted", self.y[:count], num_steps=STEPS,
            step_size=2.5 * epsilon / STEPS, epsilon=epsilon, norm=self.norm, bounds=self.space.bounds,
        )

    def right(self, logits: Tensor) -> Tensor:
        """(N,) bool."""
        return logits.argmax(dim=1) == self.y[: len(logits)]

    def top1(self, logits: Tensor) -> float:
        return 100 * self.right(logits).double().mean().item()


def examine(
    subject: Subject, space: Space, *, epsilon: float, images: int, console: Console, norm: str = "linf",
    with_autoattack: bool = False,
) -> Examination:
    """Attacks `images` of the subject's images, evenly over the classes, in ways that must agree with each other."""
    x, y = subject.some(images)
    examiner = Examiner(subject=subject, space=space, x=space.enter(x), y=y, epsilon=epsilon, norm=norm)
    with one_thread(subject.backend), progress_bar(console) as progress:
        task = progress.add_task("checking: accuracy over epsilon", total=len(FACTORS) + 3 + with_autoattack)
        reports = {}
        for factor in FACTORS:
            reports[factor] = examiner.untargeted(factor * epsilon)
            progress.advance(task)
        white = reports[1.0]
        curve = [(0.0, examiner.top1(white.clean_logits))]
        curve += [(factor * epsilon, examiner.top1(report.logits)) for factor, report in reports.items()]
        right = {}
        compared = {"APGD": adaptive, "Square": black_box} | ({"AutoAttack": ensemble} if with_autoattack else {})
        for name, attack in compared.items():
            progress.update(task, description=f"checking: {name}")
            right |= {name: examiner.right(logits) for name, logits in attack(examiner).items()}
            progress.advance(task)
        progress.update(task, description="checking: the kernels")
        checks = [
            zero_gradients(white), rising_loss(white), falling_accuracy(examiner, curve),
            *(stronger_attack(name, other, examiner.right(white.logits)) for name, other in right.items()),
            kernels_agree(examiner, half_way(curve)),
        ]
    others = {name: 100 * other.double().mean().item() for name, other in right.items()}
    return Examination(images=len(x), curve=curve, others=others, checks=checks)


# ---------------------------------------------------------------- the attacks compared with


def adaptive(examiner: Examiner) -> dict[str, Tensor]:
    """{name: logits (N, K) under APGD}, by the DLR loss, which large logits do not blind."""
    loss = "dlr" if len(examiner.subject.data.classes) > 2 else "cross_entropy"
    report = apgd(
        examiner.network, examiner.x, examiner.y, num_steps=ADAPTIVE_STEPS, epsilon=examiner.epsilon,
        norm=examiner.norm, loss=loss, bounds=examiner.space.bounds,
    )
    name = {"dlr": "DLR loss", "cross_entropy": "cross-entropy"}[loss]
    return {f"APGD ({name}, {ADAPTIVE_STEPS} steps)": report.logits}


def black_box(examiner: Examiner) -> dict[str, Tensor]:
    """{name: logits under Square}, which asks for no gradient; none for L2, which it is not made for."""
    if examiner.norm != "linf":
        return {}
    report = square(
        examiner.network, examiner.x, examiner.y, num_queries=QUERIES, epsilon=examiner.epsilon,
        bounds=examiner.space.bounds,
    )
    return {f"Square (black box, {QUERIES} queries)": report.logits}


def ensemble(examiner: Examiner) -> dict[str, Tensor]:
    """{name: logits under AutoAttack}."""
    logits = autoattack(examiner.network, examiner.x, examiner.y, epsilon=examiner.epsilon, norm=examiner.norm)
    return {"AutoAttack (its own package, standard)": logits}


# ---------------------------------------------------------------- the checks


def zero_gradients(report: AttackReport) -> Check:
    share = report.zero_gradient.nanmean().item()
    doubt = f"{100 * share:.0f}% of the gradients' entries are exactly 0: the attack stands still there"
    return Check(
        name="zero gradients", found=f"{100 * share:.2f}% of the entries", figures={"share": share},
        doubt=doubt if share > MANY_ZEROS else None,
    )


def rising_loss(report: AttackReport) -> Check:
    first, last = report.loss[0], report.loss[-1]
    stuck = ~(last > first)  # NaN too
    share = stuck.double().mean().item()
    doubt = f"of {100 * share:.0f}% of the images the loss did not rise along the attack"
    return Check(
        name="rising loss",
        found=f"mean {first.mean():.2f} to {last.mean():.2f}; not risen: {100 * share:.1f}% of the images",
        figures={"mean": report.loss.mean(dim=1).tolist(), "not_risen": share},
        doubt=doubt if share > MANY_STUCK else None,
    )


def falling_accuracy(examiner: Examiner, curve: Sequence[tuple[float, float]]) -> Check:
    """Down with epsilon, and to chance or below at its largest, where hardly a feature of the image is left."""
    (_, clean), *_, (largest, end) = curve
    slack, chance = examiner.slack, 100 / len(examiner.subject.data.classes)
    doubt = None
    for (near, before), (far, after) in itertools.pairwise(curve):
        if after > before + slack:
            doubt = f"epsilon {far:g} leaves more right ({after:.1f}%) than epsilon {near:g} ({before:.1f}%)"
    if doubt is None and end > chance + slack:
        doubt = f"even epsilon {largest:g} leaves {end:.1f}% right: the gradients lead nowhere"
    return Check(
        name="accuracy falls with epsilon", found=f"{clean:.1f}% clean to {end:.1f}% at {largest:g}",
        figures={"curve": [list(point) for point in curve]}, doubt=doubt,
    )


def stronger_attack(name: str, other: Tensor, white: Tensor) -> Check:
    """Whether another attack fools what the plain one leaves right: then that stood still, and the model is not robust.

    other, white    (N,) bool: the images that are right under each

    Counted image by image, since a black box with few queries fools few: of a masked model a tenth, but those all in
    vain attacked by gradients.
    """
    missed = white & ~other
    share = 100 * missed.double().mean().item()
    short = name.split(" (")[0]
    least = BETTER_STEPS if short == "APGD" else SLACK
    doubt = f"{name} fools {missed.sum()} images of {len(white)} that plain projected gradients leave right"
    return Check(
        name=short,
        found=f"{100 * other.double().mean():.1f}% right; fools {missed.sum()} that plain PGD leaves right",
        figures={"right": 100 * other.double().mean().item(), "missed": missed.sum().item()},
        doubt=doubt if share > least and missed.sum() > 2 else None,
    )


def half_way(curve: Sequence[tuple[float, float]]) -> float:
    """The epsilon at which about half of what is right without an attack still is: where a weaker attack shows most."""
    (_, clean), *attacked = curve
    return min(attacked, key=lambda point: abs(point[1] - clean / 2))[0]


def kernels_agree(examiner: Examiner, epsilon: float) -> Check:
    """Attacks crafted through one convolution and judged by another: a wrong gradient looks like robustness.

    Triton's against PyTorch's native one. Right kernels give the four accuracies the same to a few images, for rounding
    alone turns signs of tiny gradients, and so pixels, but not what an attack achieves.
    """
    name = "kernel check"
    mine = examiner.subject.settings.conv
    other = "torch" if mine == "triton" else "triton"
    try:
        twin = examiner.subject.computed_by(other)
    except RuntimeError as error:  # Triton can neither compile nor interpret here
        return Check(name=name, found=f"not made: {error}")
    models = {conv: examiner.space.model(subject.model) for conv, subject in ((mine, examiner.subject), (other, twin))}
    with one_thread(twin.backend):
        top1 = crossed(examiner, models, epsilon)
    count = min(KERNEL_IMAGES, len(examiner.x))
    apart = max(top1.values()) - min(top1.values())
    how = "interpreted" if "interpreter" in (examiner.subject.backend, twin.backend) else "compiled"
    doubt = None
    if apart > max(SLACK, 200 / count):
        each = ", ".join(f"{which} {value:.1f}%" for which, value in top1.items())
        doubt = f"attacks through one convolution do not hold for the other: right are {each}"
    return Check(
        name=name,
        found=f"{' / '.join(f'{value:.1f}' for value in top1.values())}% right, crafted and judged by {mine} and "
        f"{other} (Triton {how}, epsilon {epsilon:.3g}, {count} images)",
        figures={"top1": top1, "images": count, "epsilon": epsilon, "triton": how}, doubt=doubt,
    )


@torch.no_grad()
def crossed(examiner: Examiner, models: dict[str, nn.Module], epsilon: float) -> dict[str, float]:
    """{"crafted by a, judged by b": top-1} of each pair of models that differ in their convolution."""
    top1 = {}
    for crafted, model in models.items():
        report = examiner.untargeted(epsilon, model=model, count=KERNEL_IMAGES)
        for judged, judge in models.items():
            how = f"crafted by {crafted}, judged by {judged}"
            top1[how] = examiner.top1(judge(report.adversarial))
    return top1


# ---------------------------------------------------------------- what is shown


def print_doubts(console: Console, doubts: Sequence[str]) -> None:
    if doubts:
        console.print("What speaks against believing these figures:", style="bold red")
        for doubt in doubts:
            console.print(f"  {doubt}", style="red")


def print_examination(console: Console, examination: Examination, *, of: str = "") -> None:
    subject = f" of {of}" if of else ""
    table = Table(box=box.SIMPLE_HEAD, title=f"can it be believed? checks{subject} on {examination.images} images")
    table.add_column("check")
    table.add_column("found")
    table.add_column("", justify="right")
    for check in examination.checks:
        verdict, style = ("doubt", "bold red") if check.doubt else ("ok", "green")
        if check.found.startswith("not made"):
            verdict, style = "-", "dim"
        table.add_row(check.name, check.found, Text(verdict, style))
    console.print(table)
    print_doubts(console, examination.doubts)
