"""APGD: projected gradients with momentum, whose step size finds itself (Croce & Hein 2020, "Reliable evaluation of
adversarial robustness with an ensemble of diverse parameter-free attacks", algorithm 1).

    z       = project(adv_t + step * direction(gradient))
    adv_t+1 = project(adv_t + 3/4 (z - adv_t) + 1/4 (adv_t - adv_t-1))

from step = 2 epsilon. At checkpoints an image whose loss rose in fewer than 3/4 of the steps since the last, or whose
best loss and step have not changed since, halves its step and goes on from its best point.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks.ball import Bounds, Size
from attacks.objective import DifferenceOfLogitsRatio
from attacks.pgd import Attack, AttackReport, Trace, make_attack, make_starts, worst_case

MOMENTUM, RISING = 0.75, 0.75
FIRST_PERIOD, SHORTENING, SHORTEST = 0.22, 0.03, 0.06  # between checkpoints, in shares of all steps

LOSSES = ("dlr", "cross_entropy")


def apgd(
    model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int = 50, epsilon: Size = 0.1, norm: str = "linf",
    loss: str = "dlr", restarts: int = 1, bounds: Bounds | None = None, generator: torch.Generator | None = None,
) -> AttackReport:
    """Moves images (N, C, H, W) away from their true labels y (N,); no step size to choose.

    loss        "dlr", for 3 classes or more, or "cross_entropy"
    restarts    all from random points of the ball; images that are fooled, or were never recognised, are left alone

    The other arguments, and what raises ValueError, are `pgd`'s. What a robust-looking number is checked with: if
    this attack fools many images that plain PGD leaves, PGD stood still and did not fail.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    plain = make_attack(model, x, "untargeted", y, num_steps, 2 * epsilon, epsilon, norm, bounds)
    fields = {name: getattr(plain, name) for name in plain.__slots__}
    if loss == "dlr":
        fields["objective"] = DifferenceOfLogitsRatio("untargeted", plain.objective.labels, plain.objective.judges)
    attack = AdaptiveAttack(**fields)
    return worst_case(attack, make_starts(attack, True, restarts, generator), drop_fooled=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveAttack(Attack):
    """An attack whose `run` is APGD. Its step_size is the first one."""

    def run(self, adv: Tensor, *, drop_fooled: bool = True) -> Trace:
        """From adv (N, C, H, W); each image keeps its iterate of least margin.

        drop_fooled     is for `worst_case`, between runs; within one, no image is dropped
        """
        x, ball, objective = self.x, self.ball, self.objective
        logits, loss, gradient = self.judge(adv, wants_gradient=True)
        trace = self.blank(logits)
        trace.forwards.fill_(self.num_steps + 1)
        trace.loss[0] = loss
        kept, kept_margin = adv.clone(), objective.margin(logits)
        trace.logits.copy_(logits)
        best, best_loss, best_gradient = adv.clone(), loss.clone(), gradient.clone()
        scale = x.new_ones(len(x), 1, 1, 1)  # of the step, image by image
        previous = adv
        rises = torch.zeros_like(loss)  # since the last checkpoint
        halved, loss_then = torch.ones_like(loss, dtype=torch.bool), loss.clone()  # at the last checkpoint
        checkpoints = set(schedule(self.num_steps))
        last = 0
        for t in range(1, self.num_steps + 1):
            trace.zero_gradient[t - 1] = (gradient == 0).flatten(1).to(gradient.dtype).mean(dim=1)
            moved = ball.project(adv + scale * self.step_size * ball.direction(gradient), x)
            if t > 1:
                moved = ball.project(adv + MOMENTUM * (moved - adv) + (1 - MOMENTUM) * (adv - previous), x)
            previous, adv, before = adv, moved, loss
            logits, loss, gradient = self.judge(adv, wants_gradient=t < self.num_steps)
            trace.loss[t] = loss

            margin = objective.margin(logits)
            nearer = margin < kept_margin
            kept[nearer], trace.logits[nearer], kept_margin[nearer] = adv[nearer], logits[nearer], margin[nearer]
            if gradient is None:
                break
            rises += loss > before
            better = loss > best_loss
            best[better], best_loss[better], best_gradient[better] = adv[better], loss[better], gradient[better]
            if t in checkpoints:
                idle = ~halved & (best_loss <= loss_then)
                halved, loss_then = (rises < RISING * (t - last)) | idle, best_loss.clone()
                scale[halved] /= 2
                adv[halved], gradient[halved] = best[halved], best_gradient[halved]
                rises.zero_()
                last = t
        return replace(trace, adversarial=kept)


def schedule(num_steps: int) -> list[int]:
    """The steps after which images may halve their step size: w_j = ceil(p_j num_steps) of the paper's section 3.2."""
    share, period, steps = FIRST_PERIOD, FIRST_PERIOD, []
    while share < 1:
        steps.append(math.ceil(round(share * num_steps, 6)))  # 0.57 * 100 is a little more than 57
        period = max(period - SHORTENING, SHORTEST)
        share += period
    return steps
