"""Ten steps of projected gradients beside the rule written plainly and beside peers; frozen weights; the shared sweep.

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
from bench import peers

STEP, EPSILON, STEPS = 0.01, 0.1, 10
FEW_STEPS = 2
"""Where the convolution, and not the rule, makes the difference."""
SECTION = "attacks on SimpleNet"
IMAGES, PIXELS = {"cuda": 128, "cpu": 4}, {"cuda": 128, "cpu": 32}


@pytest.fixture(autouse=True)
def _same_bits(monkeypatch):
    """Or the same attack twice would not give the same images on a GPU: a step's sign flips where a gradient is ~0."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def pictures(device) -> tuple[Tensor, Tensor]:
    """Values 0 ... 1, and labels."""
    random = torch.Generator().manual_seed(1)
    count, pixels = IMAGES[device.type], PIXELS[device.type]
    x, y = torch.rand(count, 3, pixels, pixels, generator=random), torch.randint(100, (count,), generator=random)
    return x.to(device), y.to(device)


def network(conv: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return models.build("simplenet", conv, 100, PIXELS[device.type]).to(device).eval()


def plain_rule(model: nn.Module, x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    """As torchattacks and most papers' code have it: weights not frozen, the gradient of the input alone asked for."""
    adv = x.clone()
    for _ in range(steps):
        adv.requires_grad_()
        gradient = torch.autograd.grad(cross_entropy(model(adv), y), adv)[0]
        adv = adv.detach() + STEP * gradient.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -EPSILON, EPSILON), 0, 1).detach()
    return adv


def ours(model: nn.Module, x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    return pgd(model, x, "untargeted", y, num_steps=steps, step_size=STEP, epsilon=EPSILON, bounds=(0, 1))


def test_pgd_beside_the_plain_rule(side_by_side, device, pictures):
    model = network("torch", device)
    calls = {"ours": lambda: ours(model, *pictures), "plain rule": lambda: plain_rule(model, *pictures)}
    results = [call() for call in calls.values()]
    assert (results[0] - results[1]).abs().max() <= 2 * STEP
    side_by_side(SECTION, f"{STEPS} steps", calls, conv="torch", x_shape=tuple(pictures[0].shape))


@pytest.mark.parametrize("peer", peers.ATTACKS)
def test_pgd_beside(peer, side_by_side, device, pictures):
    if reason := peers.why_not_installed(peer):
        pytest.skip(reason)
    model = network("torch", device)
    theirs = peers.ATTACKS[peer](model, device, steps=STEPS, step=STEP, epsilon=EPSILON)
    calls = {"ours": lambda: ours(model, *pictures), peer: lambda: theirs(*pictures)}
    results = [call() for call in calls.values()]
    assert (results[0] - results[1]).abs().max() <= (0 if peer == "foolbox" else 2 * STEP)
    side_by_side(SECTION, f"{STEPS} steps", calls, conv="torch", x_shape=tuple(pictures[0].shape))


@pytest.mark.parametrize("written", ["unfold", "triton"])
def test_frozen_weights(written, side_by_side, device, pictures):
    """The plain rule leaves weights asking for gradients, and an operator may compute them for nothing."""
    model = network(written, device)
    calls = {
        "frozen": lambda: ours(model, *pictures, FEW_STEPS),
        "not frozen": lambda: plain_rule(model, *pictures, FEW_STEPS),
    }
    results = [call() for call in calls.values()]
    assert (results[0] - results[1]).abs().max() <= 2 * STEP
    side_by_side(SECTION, f"{FEW_STEPS} steps", calls, conv=written, x_shape=tuple(pictures[0].shape))


def test_shared_sweep(side_by_side, device, pictures):
    """The write-up's six settings."""
    model, (x, y) = network("torch", device), pictures

    def one_by_one() -> list[Swept]:
        return [sweep(model, x, "most_likely", y, settings=[setting])[0] for setting in WRITEUP]

    calls = {"shared": lambda: sweep(model, x, "most_likely", y), "one by one": one_by_one}
    for one, other in zip(*(call() for call in calls.values()), strict=True):
        assert torch.equal(one.logits, other.logits)
    side_by_side(SECTION, f"sweep of {len(WRITEUP)} settings", calls, conv="torch", x_shape=tuple(x.shape))
