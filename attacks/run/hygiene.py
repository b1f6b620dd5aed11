"""Whether an accuracy under attack can be believed: checks that an artefact fails and a sound model passes.

After Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 3.1, and Carlini et al. 2019,
"On evaluating adversarial robustness": gradients that vanish, losses that do not rise, accuracies that do not fall with
epsilon, black-box attacks that beat white-box ones; and one of our own, a convolution whose gradient is wrong.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.apgd import apgd
from attacks.pgd import AttackReport, attack_report
from attacks.run.autoattack import autoattack
from attacks.run.kept import progress_bar
from attacks.run.subject import Space, Subject, uses_tf32
from attacks.square import square
from models import NATIVE
from train.data import spread
from train.devices import one_thread

CHECK_IMAGES, FEWEST_IMAGES = 128, 20  # of fewer, chance alone turns more than any check could tell
KERNEL_IMAGES = 32  # of which the interpreter computes every step
STEPS, ADAPTIVE_STEPS, QUERIES = 10, 50, 100
REACH = 2.5  # epsilons that the steps of one attack make together, so that it reaches any point (Madry et al. 2018)
CURVE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of epsilon; doubled on where more than chance is still right

# Of a sound network's input gradient less than this is exactly 0; more, and steps are not taken that should be.
MANY_ZEROS = 0.05
# Of a sound network nearly every image ends with a higher loss than it began with.
MANY_STUCK = 0.10
# Chance may turn as many images, in percent: the border between right and wrong is a matter of rounding.
SLACK = 2.0
# What many adaptive steps may win without speaking against ten plain ones, in percent.
BETTER_STEPS = 5.0
# Noise on the images at which two convolutions' input gradients are compared, of the images' standard deviation.
NOISE = 1e-2
# Relative L2 distance of two convolutions' input gradients: rounding, and the ties of max-pools that it decides, give
# 5e-4 in float32 (SimpleNet, 64 px); TF32 keeps a thousandth as much of each factor, untried.
GRADIENTS_APART, GRADIENTS_APART_TF32 = 1e-2, 1e-1

OK, WEAK, DOUBT, UNDECIDED = "ok", "weak", "doubt", "-"
STYLES = {OK: "green", WEAK: "yellow", DOUBT: "bold red", UNDECIDED: "dim"}

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""attack(model, x, y) -> logits (N, K) of what it made of x (N, C, H, W), whose true labels are y."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question to a model or an attack, and its answer."""

    name: str
    found: str
    """The figures, in words."""
    verdict: str = OK
    """A key of STYLES: DOUBT speaks against believing an accuracy under attack, WEAK against calling it robustness."""
    words: str = ""
    """Of DOUBT and WEAK, why."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """The checks of one model, and the curve they rest on."""

    images: int
    """How many were attacked; KERNEL_IMAGES at most for the kernel check."""
    epsilon: float
    curve: list[tuple[float, float]]
    """(epsilon, top-1 in percent) under untargeted attacks of STEPS steps, the clean images first."""
    others: dict[str, float]
    """Top-1 in percent under other attacks at `epsilon`."""
    checks: list[Check]

    @property
    def doubts(self) -> list[str]:
        return [check.words for check in self.checks if check.verdict == DOUBT]

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
    norm: str = "linf"

    @property
    def network(self) -> nn.Module:
        return self.space.model(self.subject.model)

    @property
    def chance(self) -> float:
        """Percent that guessing gets right, and what chance may turn of it."""
        return 100 / len(self.subject.data.classes) + slack_of(len(self.x))

    @property
    def largest(self) -> float:
        """An epsilon that reaches from any image to any other."""
        across = self.space.range
        return across if self.norm == "linf" else across * math.sqrt(self.x[0].numel())

    def untargeted(self, epsilon: float) -> AttackReport:
        return self.untargeted_on(self.network, self.x, self.y, epsilon)

    def untargeted_on(self, model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> AttackReport:
        return attack_report(
            model, x, "untargeted", y, num_steps=STEPS, step_size=REACH * epsilon / STEPS, epsilon=epsilon,
            norm=self.norm, bounds=self.space.bounds,
        )

    def right(self, logits: Tensor) -> Tensor:
        """(N,) bool."""
        return logits.argmax(dim=1) == self.y


def examine(
    subject: Subject, space: Space, *, epsilon: float, images: int, console: Console, norm: str = "linf",
    reported: Mapping[str, Attack] | None = None, with_autoattack: bool = False,
) -> Examination:
    """Attacks `images` of the subject's images, evenly over the classes, in ways that must agree with each other.

    reported    the attacks whose accuracies are reported, by name: whether others of the same ball do better
    """
    x, y = subject.some(images)
    examiner = Examiner(subject=subject, space=space, x=space.enter(x), y=y, epsilon=epsilon, norm=norm)
    with one_thread(subject.backend), progress_bar(console) as progress:
        told = Told(progress)
        curve, white = security(examiner, told)
        right = {}
        compared = {"APGD": adaptive, "Square": black_box} | ({"AutoAttack": ensemble} if with_autoattack else {})
        for name, attack in compared.items():
            with told(name):
                right |= {long: examiner.right(logits) for long, logits in attack(examiner).items()}
        worst = min(percent(examiner.right(white.logits)), *map(percent, right.values()))
        checks = [zero_gradients(white), rising_loss(white), falling_accuracy(examiner, curve)]
        checks += [stronger_attack(name, other, examiner.right(white.logits)) for name, other in right.items()]
        with told("the kernels"):
            checks.append(kernels_agree(examiner, half_way(curve)))
        for name, attack in (reported or {}).items():
            with told(name):
                logits = attack(examiner.network, examiner.x, examiner.y)
                checks.append(strong_enough(name, percent(examiner.right(logits)), worst))
    others = {name: percent(other) for name, other in right.items()}
    return Examination(images=len(x), epsilon=epsilon, curve=curve, others=others, checks=checks)


class Told:
    """told("what") names on a progress bar what is being checked."""

    def __init__(self, progress: Progress):
        self.progress, self.task = progress, progress.add_task("checking", total=None)

    def __call__(self, what: str) -> "Told":
        self.progress.update(self.task, description=f"checking: {what}")
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.progress.advance(self.task)


def security(examiner: Examiner, told: Told) -> tuple[list[tuple[float, float]], AttackReport]:
    """(`Examination.curve`, the attack of the examiner's own epsilon)."""
    curve, white = [], None
    for factor in itertools.chain(CURVE, (CURVE[-1] * 2**n for n in itertools.count(1))):
        if factor > CURVE[-1] and (curve[-1][1] <= examiner.chance or curve[-1][0] >= examiner.largest):
            break
        epsilon = factor * examiner.epsilon
        with told(f"epsilon {epsilon:.3g}"):
            report = examiner.untargeted(epsilon)
        curve.append((epsilon, percent(examiner.right(report.logits))))
        if factor == 1:
            white = report
    return [(0.0, percent(examiner.right(white.clean_logits))), *curve], white


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
    return Check(
        name="zero gradients", found=f"{100 * share:.2f}% of the entries", figures={"share": share},
        **doubt_if(share > MANY_ZEROS, stood_still(share)),
    )


def rising_loss(report: AttackReport) -> Check:
    first, last = report.loss[0], report.loss[-1]
    stuck = ~(last > first)  # NaN too
    share = stuck.double().mean().item()
    return Check(
        name="rising loss",
        found=f"mean {first.mean():.2f} to {last.mean():.2f}; not risen: {100 * share:.1f}% of the images",
        figures={"mean": report.loss.mean(dim=1).tolist(), "not_risen": share},
        **doubt_if(share > MANY_STUCK, f"of {100 * share:.0f}% of the images the loss did not rise along the attack"),
    )


def falling_accuracy(examiner: Examiner, curve: Sequence[tuple[float, float]]) -> Check:
    """Down with epsilon, and to chance where it reaches any image from any other."""
    (_, clean), *_, (largest, end) = curve
    words = ""
    for (near, before), (far, after) in itertools.pairwise(curve):
        if after > before + slack_of(len(examiner.x)):
            words = f"epsilon {far:.3g} leaves more right ({after:.1f}%) than epsilon {near:.3g} ({before:.1f}%)"
    if not words and end > examiner.chance:
        words = f"even epsilon {largest:.3g} leaves {end:.1f}% right: the gradients lead nowhere"
    return Check(
        name="accuracy falls with epsilon", found=f"{clean:.1f}% clean to {end:.1f}% at {largest:.3g}",
        figures={"curve": [list(point) for point in curve]}, **doubt_if(bool(words), words),
    )


def stronger_attack(name: str, other: Tensor, white: Tensor) -> Check:
    """Whether another attack fools what the plain one leaves right: then that stood still, and the model is not robust.

    other, white    (N,) bool: the images that are right under each

    Counted image by image, since a black box with few queries fools few: of a masked model a tenth, but those all in
    vain attacked by gradients.
    """
    missed = (white & ~other).sum().item()
    least = max(SLACK if "black box" in name else BETTER_STEPS, 200 / len(white))
    return Check(
        name=name.split(" (")[0], found=f"{percent(other):.1f}% right; fools {missed} that plain PGD leaves right",
        figures={"attack": name, "top1": percent(other), "missed": missed},
        **doubt_if(
            100 * missed / len(white) > least,
            f"{name} fools {missed} images of {len(white)} that plain projected gradients leave right",
        ),
    )


def strong_enough(name: str, top1: float, worst: float) -> Check:
    """Whether a reported attack does about as well as the best of the same ball: if not, it measures itself."""
    found = f"{top1:.1f}% right; the best attack found leaves {worst:.1f}%"
    if top1 <= worst + BETTER_STEPS:
        return Check(name=name, found=found, figures={"top1": top1, "worst": worst})
    return Check(
        name=name, found=found, figures={"top1": top1, "worst": worst}, verdict=WEAK,
        words=f"{name} leaves {top1:.1f}% right where other attacks of the same ball leave {worst:.1f}%: its accuracy "
        "says how weak it is, not how robust the model",
    )


def half_way(curve: Sequence[tuple[float, float]]) -> float:
    """The epsilon at which about half of what is right without an attack still is: where a weaker attack shows most."""
    (_, clean), *attacked = curve
    return min(attacked, key=lambda point: abs(point[1] - clean / 2))[0]


def kernels_agree(examiner: Examiner, epsilon: float) -> Check:
    """Attacks crafted through one convolution and judged by another: a wrong gradient looks like robustness.

    Of the model's own convolution and Triton's, or where its own is made of Triton kernels, PyTorch's. Right kernels
    give the four accuracies the same to a few images, for rounding alone turns signs of tiny gradients, and so pixels,
    but not what an attack achieves; and before any step their gradients are the same to rounding.
    """
    name = "kernel check"
    mine = examiner.subject.settings.conv
    other = "triton" if mine in NATIVE else "torch"
    try:
        twin = examiner.subject.computed_by(other)
    except RuntimeError as error:  # Triton can neither compile nor interpret here
        return Check(name=name, found=f"not made: {error}", verdict=UNDECIDED)
    few = spread(examiner.y.cpu().numpy(), KERNEL_IMAGES)
    x, y = examiner.x[few], examiner.y[few]
    models = {conv: examiner.space.model(subject.model) for conv, subject in ((mine, examiner.subject), (other, twin))}
    with one_thread(twin.backend):
        distance = gradients_apart(*models.values(), x, y)
        clean, top1 = crossed(examiner, models, x, y, epsilon)
    apart, fooled = max(top1.values()) - min(top1.values()), clean - min(top1.values())
    how = "interpreted" if "interpreter" in (examiner.subject.backend, twin.backend) else "compiled"
    words = ""
    if apart > slack_of(len(x)):
        each = ", ".join(f"{which} {value:.1f}%" for which, value in top1.items())
        words = f"attacks through one convolution do not hold for the other: right are {each}"
    limit = GRADIENTS_APART_TF32 if uses_tf32(examiner.subject.device) else GRADIENTS_APART
    if not distance <= limit:
        words += f"{'; ' if words else ''}input gradients by {mine} and {other} differ by {100 * distance:.1f}%"
    undecided = not words and fooled <= slack_of(len(x))
    return Check(
        name=name,
        found=f"{' / '.join(f'{value:.1f}' for value in top1.values())}% right, crafted and judged by {mine} and "
        f"{other}; gradients {distance:.1e} apart (Triton {how}, epsilon {epsilon:.3g}, {len(x)} images)"
        + ("; the attack fools too few to tell" if undecided else ""),
        figures={
            "top1": top1, "clean": clean, "gradients_apart": distance, "images": len(x), "epsilon": epsilon,
            "triton": how,
        },
        **({"verdict": UNDECIDED} if undecided else doubt_if(bool(words), words)),
    )


def gradients_apart(one: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> float:
    """The relative L2 distance of two models' input gradients around x (N, C, H, W) with labels y, of the median image.

    A ReLU within a rounding of its kink takes one side by one kernel and the other side by another, so right ones may
    differ by percents on some image; wrong ones differ on all. Where an image is flat, max-pooling meets equals, of
    which rounding picks one: so x is taken with a little noise.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    x = x + NOISE * x.std() * noise

    def gradient(model: nn.Module) -> Tensor:
        asked = x.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(model(asked), y, reduction="sum"), asked)[0].flatten(1).double()

    a, b = gradient(one), gradient(other)
    distances = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return distances.median().item()


@torch.no_grad()
def crossed(
    examiner: Examiner, models: dict[str, nn.Module], x: Tensor, y: Tensor, epsilon: float
) -> tuple[float, dict[str, float]]:
    """Top-1 of clean images, and {"crafted by a, judged by b": top-1} of each pair of models."""
    top1, clean = {}, 0.0
    for crafted, model in models.items():
        report = examiner.untargeted_on(model, x, y, epsilon)
        clean = percent(report.clean_logits.argmax(dim=1) == y)
        for judged, judge in models.items():
            top1[f"crafted by {crafted}, judged by {judged}"] = percent(judge(report.adversarial).argmax(dim=1) == y)
    return clean, top1


def doubt_if(doubted: bool, words: str) -> dict[str, str]:
    """Of a Check, its verdict and its words."""
    return {"verdict": DOUBT, "words": words} if doubted else {}


def stood_still(share: float) -> str:
    return f"{100 * share:.0f}% of the gradients' entries are exactly 0: the attack stands still there"


def slack_of(images: int) -> float:
    """What chance may turn of so many images, in percent: two of them at least."""
    return max(SLACK, 200 / images)


def percent(which: Tensor) -> float:
    return 100 * which.double().mean().item()


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
        table.add_row(check.name, check.found, Text(check.verdict, STYLES[check.verdict]))
    console.print(table)
    print_doubts(console, examination.doubts)
    for check in examination.checks:
        if check.verdict == WEAK:
            console.print(f"{check.words}.", style="yellow")
