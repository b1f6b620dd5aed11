"""Square: random search that asks for logits alone (Andriushchenko, Croce, Flammarion & Hein 2020, "Square Attack: a
query-efficient black-box adversarial attack via random search", algorithms 1 and 2, L-infinity).

    adv_0   = project(x + sign * epsilon), the signs drawn for each column of each channel: vertical stripes
    trial   = adv_t, but project(x + sign * epsilon) in a square at a random place, a sign for each channel
    adv_t+1 = trial if margin(model(trial)) < margin(model(adv_t)), else adv_t

The paper adds +-2 epsilon and projects, which comes to the same: from anywhere in the ball it leads to one of its ends.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attacks.ball import Bounds, Size
from attacks.pgd import AttackReport, make_attack
from attacks.untouched import untouched

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in squares of 10,000


def square(
    model: nn.Module, x: Tensor, y: Tensor, *, num_queries: int = 100, epsilon: Size = 0.1, p: float = 0.8,
    bounds: Bounds | None = None, generator: torch.Generator | None = None,
) -> AttackReport:
    """Moves images (N, C, H, W) away from their true labels y (N,) without a gradient.

    num_queries the most an image may cost, stripes included, besides the one for its clean logits
    p           share of an image's pixels that the first squares cover, in (0, 1]; halved nine times on the way
    generator   of the stripes and squares; None is a new one with seed 0 at each call

    epsilon, bounds, and how the model is asked and left, are `pgd`'s. If this attack fools images that a white-box
    attack of the same ball leaves, the white-box accuracy is an artefact of gradients that mislead.

    An image is left alone as soon as it is fooled, and from the start if it was never recognised. Each query draws for
    all images, those left alone too: what becomes of an image depends on its place in the batch and the batch's size,
    but not on how the others fare, except for how a model rounds fewer images at a time.

    Of the report, `loss` (num_queries + 1, N) is the margin, the logit of y less the largest other one: of x, then of
    the image kept after each query. It never rises after the stripes, which may themselves be worse than x.
    `zero_gradient` (num_queries, N) is NaN and `backwards` 0, as no gradient is taken.

    Raises ValueError for arguments that do not fit.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries must be at least 1, got {num_queries}")
    if not 0 < p <= 1:
        raise ValueError(f"p must be a share of the pixels, above 0 and at most 1, got {p}")
    attack = make_attack(model, x, "untargeted", y, num_queries, 0.0, epsilon, "linf", bounds)  # 0.0: it takes no step
    x = attack.x
    generator = generator or torch.Generator(x.device).manual_seed(0)
    with untouched(model, x.device), torch.no_grad():
        # Of copies, here and below: a first layer that works in place would write over the images.
        clean, _, _ = attack.judge(x.clone(), wants_gradient=False)
        kept = attack.blank(clean)
        forwards = torch.ones_like(kept.forwards)
        kept.loss[0] = margin = attack.objective.margin(clean)
        # From infinity, so that stripes are kept though they be worse than x, but never for a margin of NaN.
        best = torch.where(margin < 0, margin, math.inf)
        active = (best >= 0).nonzero().squeeze(1)
        for t, (inside, sign) in enumerate(draws(x, num_queries, p, generator), start=1):
            if not len(active):
                break
            part = attack[active]
            end = part.ball.project(part.x + sign[active] * part.ball.epsilon, part.x)
            trial = torch.where(inside[active], end, kept.adversarial[active])
            logits, _, _ = part.judge(trial.clone(), wants_gradient=False)
            margin = part.objective.margin(logits)
            better = margin < best[active]
            places = active[better]
            kept.adversarial[places], kept.logits[places], best[places] = trial[better], logits[better], margin[better]
            kept.loss[t, active] = best[active]
            forwards[active] += 1
            active = active[best[active] >= 0]
    return AttackReport(
        adversarial=kept.adversarial, clean_logits=clean, logits=kept.logits, success=best < 0, loss=kept.loss,
        zero_gradient=kept.zero_gradient, forwards=forwards, backwards=torch.zeros_like(forwards),
    )


def draws(x: Tensor, num_queries: int, p: float, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """For each query, of all images (N, C, H, W), whether they are still asked about or not:

    inside      bool, broadcasts to (N, 1, H, W): the pixels to change
    sign        of x's dtype, broadcasts to (N, C, H, W): +1 or -1, the end of the ball to take them to
    """
    N, C, H, W = x.shape
    made = dict(generator=generator, device=x.device)
    rows, columns = torch.arange(H, device=x.device).view(H, 1), torch.arange(W, device=x.device)
    yield x.new_ones(N, 1, 1, 1, dtype=torch.bool), 2 * torch.randint(2, (N, C, 1, W), **made).to(x) - 1
    for i in range(num_queries - 1):
        side = side_length(i, num_queries, p, H, W)
        top = torch.randint(H - side + 1, (N, 1, 1, 1), **made)
        left = torch.randint(W - side + 1, (N, 1, 1, 1), **made)
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        yield inside, 2 * torch.randint(2, (N, C, 1, 1), **made).to(x) - 1


def side_length(i: int, num_queries: int, p: float, height: int, width: int) -> int:
    """Of square i = 0, 1, ... in pixels: the root of the number of pixels that the schedule has it cover.

    As the authors' code counts, which rescales the schedule from 10,000 to num_queries.
    """
    share = p / 2 ** sum(i * 10_000 // num_queries > halving for halving in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)
