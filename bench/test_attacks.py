"""Ten steps of projected gradients beside foolbox and the rule written plainly; frozen weights; the shared sweep.

Native convolutions compute what is compared with others, so that the attacks' own arithmetic shows. All contenders of
a row give the same images.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import models
from attacks import Swept, pgd, sweep
from attacks.sweep import WRITEUP

STEP, EPSILON, STEPS = 0.01, 0.1, 10
SECTION = "attacks on SimpleNet"


def network(conv: str, pixels: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return models.build("simplenet", conv, 100, pixels).to(device).eval()


def pictures(count: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Values 0 ... 1, and labels."""
    random = torch.Generator().manual_seed(1)
    x, y = torch.rand(count, 3, pixels, pixels, generator=random), torch.randint(100, (count,), generator=random)
    return x.to(device), y.to(device)


def plain_rule(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """As torchattacks and most papers' code have it: weights not frozen, the gradient of the input alone asked for."""
    adv = x.clone()
    for _ in range(STEPS):
        adv.requires_grad_()
        gradient = torch.autograd.grad(cross_entropy(model(adv), y), adv)[0]
        adv = adv.detach() + STEP * gradient.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -EPSILON, EPSILON), 0, 1).detach()
    return adv


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return pgd(model, x, "untargeted", y, num_steps=STEPS, step_size=STEP, epsilon=EPSILON, bounds=(0, 1))


def test_pgd_beside_others(side_by_side, device):
    foolbox = pytest.importorskip("foolbox", reason="pip install -e '.[test]' brings foolbox")
    model, (x, y) = network("torch", 64, device), pictures(32, 64, device)
    peer = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=STEP, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    calls = {
        "ours": lambda: ours(model, x, y),
        "plain rule": lambda: plain_rule(model, x, y),
        "foolbox": lambda: peer(wrapped, x, y, epsilons=EPSILON)[1],
    }
    result = ours(model, x, y)
    assert all((call() - result).abs().max() <= 2 * STEP for call in calls.values())
    assert torch.equal(calls["foolbox"](), result)
    side_by_side(SECTION, "10 steps, native", calls, conv="torch", x_shape=tuple(x.shape))


@pytest.mark.parametrize("written", ["unfold", "triton"])
def test_frozen_weights(written, side_by_side, device):
    """The plain rule leaves weights asking for gradients, and an operator may compute them for nothing."""
    model, (x, y) = network(written, 32, device), pictures(8, 32, device)
    calls = {"frozen": lambda: ours(model, x, y), "not frozen": lambda: plain_rule(model, x, y)}
    side_by_side(SECTION, f"10 steps, {written}", calls, conv=written, x_shape=tuple(x.shape))


def test_shared_sweep(side_by_side, device):
    """The write-up's six settings."""
    model, (x, y) = network("torch", 32, device), pictures(32, 32, device)

    def one_by_one() -> list[Swept]:
        return [sweep(model, x, "most_likely", y, settings=[setting])[0] for setting in WRITEUP]

    calls = {"shared": lambda: sweep(model, x, "most_likely", y), "one by one": one_by_one}
    for one, other in zip(*(call() for call in calls.values()), strict=True):
        assert torch.equal(one.logits, other.logits)
    side_by_side(SECTION, "sweep of 6 settings", calls, conv="torch", x_shape=tuple(x.shape))
