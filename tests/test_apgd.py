"""APGD: held against the paper's algorithm written image by image, and against what it is there to expose."""

import pytest
import torch
from torch import nn

from attacks import apgd, attack_report
from attacks.apgd import schedule

EPSILON, STEPS = 0.3, 40


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    ).double().eval()


@pytest.fixture
def images(model):
    """(x, the model's own predictions but for two images that it gets wrong)."""
    x = torch.rand(12, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return x, y


def dlr(logits, label):
    """Of one image, (K,)."""
    first, second, third = logits.sort(descending=True).values[:3]
    other = second if logits[label] == first else first
    return (other - logits[label]) / (first - third + 1e-12)


def cross_entropy(logits, label):
    return -logits.log_softmax(0)[label]


def by_the_paper(model, x, label, start, loss_of):
    """Algorithm 1 for one image; returns the losses of all iterates and the iterate of least margin."""

    def judge(adv):
        adv = adv.clone().requires_grad_()
        logits = model(adv[None])[0]
        loss = loss_of(logits, label)
        others = logits.detach().clone()
        others[label] = -torch.inf
        margin = logits.detach()[label] - others.max()
        return loss.item(), torch.autograd.grad(loss, adv)[0], margin.item()

    def project(adv):
        return x + (adv - x).clamp(-EPSILON, EPSILON)

    step, before, adv = 2 * EPSILON, start, start
    loss, gradient, margin = judge(adv)
    losses, best, kept = [loss], (loss, adv, gradient), (margin, adv)
    checkpoint, best_then, step_then, last_step = 0, loss, None, step
    for t in range(1, STEPS + 1):
        moved = project(adv + step * gradient.sign())
        if t > 1:
            moved = project(adv + 0.75 * (moved - adv) + 0.25 * (adv - before))
        before, adv = adv, moved
        loss, gradient, margin = judge(adv)
        losses.append(loss)
        best = max(best, (loss, adv, gradient), key=lambda entry: entry[0])
        kept = min(kept, (margin, adv), key=lambda entry: entry[0])
        if t in schedule(STEPS):
            rises = sum(b > a for a, b in zip(losses[checkpoint:-1], losses[checkpoint + 1 :], strict=True))
            same = step_then == step and best_then == best[0]
            step_then, best_then, last_step = step, best[0], step
            if rises < 0.75 * (t - checkpoint) or same:
                step, adv, gradient = last_step / 2, best[1], best[2]
            checkpoint = t
    return losses, kept[1]


@pytest.mark.parametrize(("name", "loss_of"), [("dlr", dlr), ("cross_entropy", cross_entropy)])
def test_every_image_goes_the_papers_way(name, loss_of, model, images):
    x, y = images
    noise = torch.Generator().manual_seed(5)
    report = apgd(model, x, y, num_steps=STEPS, epsilon=EPSILON, loss=name, generator=noise)
    start = x + (2 * torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5)) - 1) * EPSILON
    halved = 0
    for n in range(2, len(x)):
        losses, adversarial = by_the_paper(model, x[n], y[n], start[n], loss_of)
        torch.testing.assert_close(report.loss[:, n], torch.tensor(losses, dtype=x.dtype), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(report.adversarial[n], adversarial, rtol=0, atol=1e-9)
        halved += losses[-1] != max(losses)
    assert halved  # some images overshot, or the checkpoints would not have been tried


def test_checkpoints_are_those_of_the_paper():
    assert schedule(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_images_that_are_wrong_as_they_came_are_left_alone(model, images):
    x, y = images
    report = apgd(model, x, y, num_steps=5, epsilon=EPSILON)
    assert torch.equal(report.adversarial[:2], x[:2])
    assert report.success[:2].all()
    assert report.backwards.tolist() == [0, 0] + 10 * [5]
    assert report.forwards.tolist() == [1, 1] + 10 * [7]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_images_stay_in_the_ball_and_the_bounds(norm, model, images):
    x, y = images
    report = apgd(model, x, y, num_steps=10, epsilon=EPSILON, norm=norm, bounds=(0.0, 1.0), restarts=2)
    delta = (report.adversarial - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= EPSILON + 1e-12
    assert (size[2:] > EPSILON / 10).all()
    assert report.adversarial.min() >= 0
    assert report.adversarial.max() <= 1
    torch.testing.assert_close(model(report.adversarial), report.logits)
    assert torch.equal(report.logits.argmax(1) != y, report.success)


class Masked(nn.Module):
    """The same predictions, with logits so large that the cross-entropy's gradient is 0 in float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model.float()

    def forward(self, x):
        return 1e6 * self.model(x)


def test_it_sees_through_logits_so_large_that_plain_gradients_vanish(model, images):
    x, y = images[0].float(), images[1]
    masked = Masked(model)
    plain = attack_report(masked, x, "untargeted", y, num_steps=20, step_size=EPSILON / 8, epsilon=EPSILON)
    honest = apgd(masked, x, y, num_steps=20, epsilon=EPSILON)
    assert plain.success.sum() == 2  # the two that are wrong anyway
    assert honest.success.sum() > 6


def test_the_same_call_gives_the_same_images(model, images):
    x, y = images
    first, second = (apgd(model, x, y, num_steps=4, epsilon=EPSILON, restarts=2) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial)


def test_mistakes_are_named(model, images):
    x, y = images
    with pytest.raises(ValueError, match="loss must be one of 'dlr', 'cross_entropy', got 'hinge'"):
        apgd(model, x, y, loss="hinge")
    with pytest.raises(ValueError, match="12 integer labels"):
        apgd(model, x, y[:3])
    two = nn.Sequential(nn.Flatten(), nn.Linear(128, 2).double())
    with pytest.raises(ValueError, match="3 classes"):
        apgd(two, x, y.clamp(max=1))
