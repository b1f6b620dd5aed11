"""The checks of the attacking command: a sound model passes them, and each kind of artefact is caught and named."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from attacks.pgd import AttackReport
from attacks.run import hygiene
from attacks.run.hygiene import (
    DOUBT,
    OK,
    UNDECIDED,
    WEAK,
    Check,
    Examiner,
    examine,
    falling_accuracy,
    half_way,
    print_examination,
    strong_enough,
    stronger_attack,
)
from attacks.run.subject import Subject, load_subject, make_space
from kernels import ops
from train.distributed import World

IMAGES = 24
EPSILON = 0.3
QUIET = Console(quiet=True)


@pytest.fixture
def subject(trained_folder: Path) -> Subject:
    arguments = argparse.Namespace(data=None, conv=None, limit=None, batch_size=64, device="cpu")
    return load_subject(trained_folder, arguments, QUIET, World())


@pytest.fixture
def few_kernel_images(monkeypatch) -> None:
    """The interpreter computes each step of these; 4 show a wrong kernel where epsilon is large."""
    monkeypatch.setattr(hygiene, "KERNEL_IMAGES", 4)


def checks_of(subject: Subject, **changes) -> dict[str, Check]:
    examination = examine(subject, make_space(subject), images=IMAGES, console=QUIET, **{"epsilon": EPSILON} | changes)
    return {check.name: check for check in examination.checks}


def doubted(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.verdict == DOUBT}


def make_examiner(subject: Subject, count: int, **changes) -> Examiner:
    x, y = subject.some(count)
    return Examiner(**{"subject": subject, "space": make_space(subject), "x": x, "y": y, "epsilon": EPSILON} | changes)


class Masked(nn.Module):
    """A model whose accuracy is another's and whose gradients lead nowhere."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class HugeLogits(Masked):
    """So sure that the cross-entropy's gradient rounds to 0."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e5 * self.model(x)


class Staircase(Masked):
    """Quantises its input: the gradient is 0 everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model((10 * x).round() / 10)


class Backwards(torch.autograd.Function):
    """Passes values on and turns gradients round."""

    @staticmethod
    def forward(_ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:
        return -gradient


class Misleading(Masked):
    """Its gradient lowers the loss that it promises to raise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(Backwards.apply(x))


def test_a_sound_model_passes_every_check(subject, few_kernel_images):
    checks = checks_of(subject)
    assert not doubted(checks)
    assert set(checks) == {
        "zero gradients", "rising loss", "accuracy falls with epsilon", "APGD", "Square", "kernel check",
    }
    assert checks["kernel check"].figures["triton"] == "interpreted"
    assert checks["rising loss"].figures["mean"][-1] > checks["rising loss"].figures["mean"][0]
    sizes, top1 = zip(*checks["accuracy falls with epsilon"].figures["curve"], strict=True)
    assert sizes == (0, *(factor * EPSILON for factor in hygiene.CURVE))
    assert top1[0] > 50
    assert top1[-1] < 10


@pytest.mark.parametrize(
    ("mask", "caught"),
    [
        pytest.param(HugeLogits, {"zero gradients", "rising loss", "accuracy falls with epsilon", "APGD"}, id="huge"),
        pytest.param(
            Staircase, {"zero gradients", "rising loss", "accuracy falls with epsilon"}, id="staircase",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Misleading, {"rising loss", "accuracy falls with epsilon"}, id="backwards", marks=pytest.mark.slow
        ),
    ],
)
def test_a_masked_model_is_caught(mask, caught, subject, monkeypatch):
    monkeypatch.setattr(hygiene, "kernels_agree", lambda *_: Check(name="kernel check", found=""))
    checks = checks_of(replace(subject, model=mask(subject.model)))
    assert doubted(checks) >= caught


def test_black_box_attacks_catch_what_gradients_miss(subject, monkeypatch):
    monkeypatch.setattr(hygiene, "kernels_agree", lambda *_: Check(name="kernel check", found=""))
    checks = checks_of(replace(subject, model=Staircase(subject.model)), epsilon=1.0)
    assert "Square" in doubted(checks)
    assert checks["Square"].figures["missed"] > 2


def wrong(kind: str, right: Callable) -> Callable:
    """An input gradient with a mistake in it."""

    def call(*args, **kwargs) -> Tensor:
        gradient = right(*args, **kwargs)
        if kind == "sign":
            return -gradient
        gradient[..., -1, :] = 0  # the halo forgotten
        gradient[..., -1] = 0
        return gradient

    return call


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        pytest.param("torch", "sign", marks=pytest.mark.slow), ("triton", "sign"),
        pytest.param("torch", "border", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_kernel_is_caught(conv, kind, subject, monkeypatch):
    """Its attack fools nobody, or fewer, and looks like robustness: only the other convolution tells."""
    monkeypatch.setattr(hygiene, "KERNEL_IMAGES", 8)
    monkeypatch.setattr(ops, "input_grad", wrong(kind, ops.input_grad))
    check = hygiene.kernels_agree(make_examiner(subject.computed_by(conv), 20), EPSILON)
    assert check.verdict == DOUBT
    assert "input gradients by" in check.words
    assert check.figures["images"] == 8
    if kind == "sign":
        top1 = check.figures["top1"]
        assert "do not hold for the other" in check.words
        assert top1["crafted by triton, judged by torch"] > top1["crafted by torch, judged by torch"]


def test_kernels_are_not_told_apart_by_an_attack_that_does_nothing(subject, few_kernel_images):
    check = hygiene.kernels_agree(make_examiner(subject, 20), 1e-6)
    assert check.verdict == UNDECIDED
    assert "fools too few to tell" in check.found


def test_images_of_the_kernel_check_are_of_all_classes(subject, monkeypatch):
    monkeypatch.setattr(hygiene, "KERNEL_IMAGES", 10)
    seen = []
    monkeypatch.setattr(hygiene, "crossed", lambda _e, _m, x, y, _s: seen.append(y) or (50.0, {"a": 10.0}))
    hygiene.kernels_agree(make_examiner(subject, 40), EPSILON)
    assert sorted(seen[0].tolist()) == list(range(10))


def test_where_triton_cannot_run_the_kernel_check_says_so(subject, monkeypatch):
    def cannot(self, conv):
        raise RuntimeError("Triton has no backend here")

    monkeypatch.setattr(Subject, "computed_by", cannot)
    check = hygiene.kernels_agree(make_examiner(subject, 2), EPSILON)
    assert check.found == "not made: Triton has no backend here"
    assert check.verdict == UNDECIDED


@pytest.mark.parametrize(
    "changes", [{"norm": "l2", "epsilon": 2.0}, {"norm": "l2", "epsilon": 0.1}, {"epsilon": 0.02}],
    ids=["l2", "short-l2", "small-epsilon"],
)
def test_the_curve_goes_on_until_chance(changes, subject, monkeypatch):
    """A small ball leaves most images right, and eight times of it too: that alone is no sign of anything."""
    monkeypatch.setattr(hygiene, "adaptive", lambda _: {})
    monkeypatch.setattr(hygiene, "black_box", lambda examiner: {"Square (black box, 1 query)": examiner.y * 0.0})
    monkeypatch.setattr(hygiene, "stronger_attack", lambda *_: Check(name="s", found=""))
    monkeypatch.setattr(Examiner, "right", lambda self, logits: (
        logits.argmax(1) == self.y if logits.dim() == 2 else torch.ones(len(self.y), dtype=torch.bool)
    ))
    monkeypatch.setattr(hygiene, "kernels_agree", lambda *_: Check(name="kernel check", found=""))
    checks = checks_of(subject, **changes)
    assert not doubted(checks)
    curve = checks["accuracy falls with epsilon"].figures["curve"]
    assert curve[-1][1] <= 10 + 100 * 2 / IMAGES
    assert len(curve) >= 1 + len(hygiene.CURVE)


def test_a_flat_curve_ends_where_any_image_is_in_reach(subject, monkeypatch):
    examiner = make_examiner(replace(subject, model=Staircase(subject.model)), 20, epsilon=0.1)
    curve, _ = hygiene.security(examiner, hygiene.Told(Progress(disable=True)))
    assert curve[-2][0] < examiner.largest <= curve[-1][0]
    assert examiner.largest == pytest.approx(1 / 0.224)
    assert len({top1 for _, top1 in curve}) == 1


class Stub:
    """As much of an Examiner as the checks of figures alone ask for."""

    x = torch.empty(100)
    chance = 12.0


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        pytest.param([60, 40, 20, 5, 0], None, id="healthy"),
        pytest.param([60, 40, 41.5, 5, 0], None, id="within-chance"),
        pytest.param([60, 40, 50, 5, 0], "leaves more right", id="rises"),
        pytest.param([60, 60, 60, 60, 60], "even epsilon 4 leaves 60.0% right", id="flat"),
        pytest.param([60, 40, 20, 12, 11], None, id="down-to-chance"),
    ],
)
def test_accuracy_must_fall_with_epsilon(curve, words):
    check = falling_accuracy(Stub(), list(zip(range(5), map(float, curve), strict=True)))
    assert (words in check.words) if words else check.verdict == OK


@pytest.mark.parametrize(("top1", "verdict"), [(5.0, OK), (9.9, OK), (10.1, WEAK), (60.0, WEAK)])
def test_a_reported_attack_is_measured_by_the_best_found(top1, verdict):
    check = strong_enough("this attack", top1, 5.0)
    assert check.verdict == verdict
    assert ("how weak it is" in check.words) is (verdict == WEAK)


def test_a_reported_attack_is_made_on_the_check_images(subject, monkeypatch):
    """One that does nothing leaves what was right before."""
    monkeypatch.setattr(hygiene, "kernels_agree", lambda *_: Check(name="kernel check", found=""))
    reported = {"nothing": lambda model, x, _y: model(x).detach()}
    check = checks_of(subject, reported=reported)["nothing"]
    assert check.verdict == WEAK
    assert check.figures["top1"] > 40
    assert check.figures["worst"] < 20


@pytest.mark.parametrize(
    ("name", "fooled", "is_doubted"),
    [
        ("Square (black box, 100 queries)", 3, True), ("Square (black box, 100 queries)", 2, False),
        ("APGD (DLR loss, 50 steps)", 6, True), ("APGD (DLR loss, 50 steps)", 5, False),
        ("AutoAttack (its own package, standard)", 6, True), ("AutoAttack (its own package, standard)", 5, False),
    ],
)
def test_another_attack_may_not_fool_what_gradients_leave(name, fooled, is_doubted):
    """Whatever it leaves itself: images 20 to 30 are right under it alone."""
    white, other = torch.arange(100) < 20, torch.arange(100) < 30
    other[:fooled] = False
    check = stronger_attack(name, other, white)
    assert (check.verdict == DOUBT) is is_doubted
    assert f"fools {fooled} that" in check.found


def report_of(loss: list[list[float]], zeros: list[list[float]]) -> AttackReport:
    n = len(loss[0])
    return AttackReport(
        adversarial=torch.empty(n, 0), clean_logits=torch.empty(n, 0), logits=torch.empty(n, 0),
        success=torch.zeros(n, dtype=torch.bool), loss=torch.tensor(loss), zero_gradient=torch.tensor(zeros),
        forwards=torch.empty(n), backwards=torch.empty(n),
    )


@pytest.mark.parametrize(
    ("last", "zeros", "doubts"),
    [
        pytest.param([2.0, 2.0, 2.0], 0.01, (False, False), id="healthy"),
        pytest.param([2.0, 1.0, 2.0], 0.01, (True, False), id="a-third-stuck"),
        pytest.param([2.0, float("nan"), 2.0], 0.01, (True, False), id="not-a-number"),
        pytest.param([2.0, 2.0, 2.0], 0.06, (False, True), id="zeros"),
    ],
)
def test_loss_must_rise_and_gradients_must_not_vanish(last, zeros, doubts):
    report = report_of([[1.0, 1.0, 1.0], last], [3 * [zeros]])
    found = hygiene.rising_loss(report).verdict, hygiene.zero_gradients(report).verdict
    assert tuple(verdict == DOUBT for verdict in found) == doubts


def test_the_kernels_are_compared_where_half_of_the_images_are_fooled():
    assert half_way([(0.0, 60.0), (0.1, 55.0), (0.2, 31.0), (0.4, 4.0)]) == 0.2


def test_doubts_are_told_in_words(capsys):
    examination = hygiene.Examination(
        images=3, epsilon=0.1, curve=[(0.0, 50.0)], others={},
        checks=[
            Check(name="one", found="fine"), Check(name="two", found="bad", verdict=DOUBT, words="something is wrong"),
            Check(name="three", found="meagre", verdict=WEAK, words="it is weak"),
        ],
    )
    assert examination.doubts == ["something is wrong"]
    print_examination(Console(width=80), examination)
    told = capsys.readouterr().out
    assert "speaks against" in told
    assert "something is wrong" in told
    assert "it is weak." in told
    print_examination(Console(width=80), replace(examination, checks=examination.checks[:1]))
    assert "speaks against" not in capsys.readouterr().out
