"""The checks of the attacking command: a sound model passes them, and each kind of artefact is caught and named."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from attacks.pgd import AttackReport
from attacks.run import hygiene
from attacks.run.hygiene import Check, examine, falling_accuracy, half_way, print_examination, stronger_attack
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
    return {name for name, check in checks.items() if check.doubt}


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
    assert sizes == (0, *(factor * EPSILON for factor in hygiene.FACTORS))
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


@pytest.mark.parametrize("conv", [pytest.param("torch", marks=pytest.mark.slow), "triton"])
def test_a_wrong_kernel_is_caught(conv, subject, monkeypatch):
    """Its attack fools nobody, and looks like robustness: only the other convolution tells."""
    monkeypatch.setattr(hygiene, "KERNEL_IMAGES", 8)
    right = ops.input_grad
    monkeypatch.setattr(ops, "input_grad", lambda *args, **kwargs: -right(*args, **kwargs))
    subject = subject.computed_by(conv)
    x, y = subject.some(8)
    examiner = hygiene.Examiner(subject=subject, space=make_space(subject), x=x, y=y, epsilon=EPSILON, norm="linf")
    check = hygiene.kernels_agree(examiner, EPSILON)
    assert "do not hold for the other" in check.doubt
    top1 = check.figures["top1"]
    assert top1["crafted by triton, judged by torch"] > top1["crafted by torch, judged by torch"]


def test_where_triton_cannot_run_the_kernel_check_says_so(subject, monkeypatch):
    def cannot(self, conv):
        raise RuntimeError("Triton has no backend here")

    monkeypatch.setattr(Subject, "computed_by", cannot)
    x, y = subject.some(2)
    examiner = hygiene.Examiner(subject=subject, space=make_space(subject), x=x, y=y, epsilon=EPSILON, norm="linf")
    check = hygiene.kernels_agree(examiner, EPSILON)
    assert check.found == "not made: Triton has no backend here"
    assert check.doubt is None


class Stub:
    """As much of an Examiner as the checks of figures alone ask for."""

    slack = 2.0

    class subject:
        class data:
            classes = tuple("abcdefghij")


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
    assert (words in check.doubt) if words else check.doubt is None


@pytest.mark.parametrize(
    ("name", "fooled", "is_doubted"),
    [
        ("Square (black box, 100 queries)", 3, True), ("Square (black box, 100 queries)", 2, False),
        ("APGD (DLR loss, 50 steps)", 6, True), ("APGD (DLR loss, 50 steps)", 5, False),
    ],
)
def test_another_attack_may_not_fool_what_gradients_leave(name, fooled, is_doubted):
    """Whatever it leaves itself: images 20 to 30 are right under it alone."""
    white, other = torch.arange(100) < 20, torch.arange(100) < 30
    other[:fooled] = False
    check = stronger_attack(name, other, white)
    assert bool(check.doubt) is is_doubted
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
    assert (bool(hygiene.rising_loss(report).doubt), bool(hygiene.zero_gradients(report).doubt)) == doubts


def test_the_kernels_are_compared_where_half_of_the_images_are_fooled():
    assert half_way([(0.0, 60.0), (0.1, 55.0), (0.2, 31.0), (0.4, 4.0)]) == 0.2


def test_doubts_are_told_in_words(capsys):
    examination = hygiene.Examination(
        images=3, curve=[(0.0, 50.0)], others={},
        checks=[Check(name="one", found="fine"), Check(name="two", found="bad", doubt="something is wrong")],
    )
    print_examination(Console(width=80), examination)
    told = capsys.readouterr().out
    assert "speaks against" in told
    assert "something is wrong" in told
    print_examination(Console(width=80), replace(examination, checks=examination.checks[:1]))
    assert "speaks against" not in capsys.readouterr().out
