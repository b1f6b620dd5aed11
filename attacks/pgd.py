"""Projected gradient attacks (Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks").

    adv_0 = x, or a random point of the ball
    adv_{t+1} = project(adv_t + step_size * direction(s * d loss(model(adv_t), aim_t) / d adv_t))

with s = 1 to raise the loss and -1 to lower it. x, adv (N, C, H, W); logits (N, K). The last iterate is the result.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks.ball import L2, Bounds, Linf, Size, check_size, make_ball, pick
from attacks.objective import Objective, check_images, make_objective
from attacks.untouched import untouched

MOST_STEPS = 100_000
"""That commands take: the loss of every image is kept of each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackReport:
    """What an attack on N images did."""

    adversarial: Tensor
    """(N, C, H, W)."""
    clean_logits: Tensor
    """(N, K), of x."""
    logits: Tensor
    """(N, K), of `adversarial`."""
    success: Tensor
    """(N,) bool: no longer taken for its true label, or where that is unknown for the clean prediction; with given
    labels, taken for the label asked for."""
    loss: Tensor
    """(num_steps + 1, N): the loss that each iterate was judged by, of the restart that was kept; NaN from where an
    image was dropped on."""
    zero_gradient: Tensor
    """(num_steps, N): share of the gradient's entries that are exactly 0, of the restart that was kept; NaN as
    in `loss`."""
    forwards: Tensor
    """(N,) int64: how often the model was asked for an image's logits, all restarts together."""
    backwards: Tensor
    """(N,) int64: how often for its gradient."""


def pgd(
    model: nn.Module, x: Tensor, target: str | Tensor = "least_likely", y: Tensor | None = None, *,
    num_steps: int = 10, step_size: Size = 0.01, epsilon: Size = 0.1, norm: str = "linf", random_start: bool = False,
    restarts: int = 1, bounds: Bounds | None = None, generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial images (N, C, H, W) for x (N, C, H, W), float32 or float64, a model of logits (N, K).

    target      "least_likely": lower the loss of the least confident label, chosen anew each step, never y
                "most_likely": raise the loss of the most confident label, chosen anew each step
                "untargeted": raise the loss of y
                (N,) labels: lower their loss
    y           (N,), the true labels where they are known
    step_size, epsilon, bounds
                in the space x lives in; a number, or a tensor that broadcasts to x (of shape (C, 1, 1), a number a
                channel). bounds are the least and greatest value of a valid pixel; None clamps nothing.
    norm        "linf", or "l2": epsilon and step_size are then lengths, over all pixels of an image
    restarts    runs of which the worst for the model is kept, image by image; all but the first start at random
    generator   of the random starts; None is a new one with seed 0 at each call

    The gradient is taken in x's precision, never in mixed precision: half a gradient's small entries are 0 in
    float16, and an attack that stands still looks like a robust model. The model is left as it was found (`untouched`).

    Raises ValueError for arguments that do not fit.
    """
    attack = make_attack(model, x, target, y, num_steps, step_size, epsilon, norm, bounds)
    starts = make_starts(attack, random_start, restarts, generator)
    if restarts > 1:
        return worst_case(attack, starts, drop_fooled=False).adversarial
    with untouched(model, x.device):
        return attack.run(next(starts), judge_last=False).adversarial


def fgsm(
    model: nn.Module, x: Tensor, target: str | Tensor = "untargeted", y: Tensor | None = None, *,
    epsilon: Size = 0.1, bounds: Bounds | None = None,
) -> Tensor:
    """One step of the whole epsilon (Goodfellow et al. 2015, "Explaining and harnessing adversarial examples")."""
    return pgd(model, x, target, y, num_steps=1, step_size=epsilon, epsilon=epsilon, bounds=bounds)


def attack_report(
    model: nn.Module, x: Tensor, target: str | Tensor = "least_likely", y: Tensor | None = None, *,
    num_steps: int = 10, step_size: Size = 0.01, epsilon: Size = 0.1, norm: str = "linf", random_start: bool = False,
    restarts: int = 1, bounds: Bounds | None = None, generator: torch.Generator | None = None,
    drop_fooled: bool = False,
) -> AttackReport:
    """`pgd`'s images with success, loss curve and counts of queries.

    drop_fooled     leave an image alone as soon as it is fooled, which saves the queries that would follow. Top-1
                    accuracy under the attack is then the lowest along its way; top-5 says nothing any more.
    """
    attack = make_attack(model, x, target, y, num_steps, step_size, epsilon, norm, bounds)
    return worst_case(attack, make_starts(attack, random_start, restarts, generator), drop_fooled=drop_fooled)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One run of an attack on N images."""

    adversarial: Tensor
    """(N, C, H, W), the last iterate."""
    logits: Tensor
    """(N, K), of the last iterate that was judged."""
    loss: Tensor
    """(num_steps + 1, N); NaN for iterates that were not judged."""
    zero_gradient: Tensor
    """(num_steps, N), the share of zeros in the gradient; NaN where none was taken."""
    forwards: Tensor
    """(N,) int64."""

    def put(self, places: Tensor, other: "Trace") -> None:
        """Replaces the images at `places` by those of `other`."""
        self.adversarial[places], self.logits[places] = other.adversarial, other.logits
        self.loss[:, places], self.zero_gradient[:, places] = other.loss, other.zero_gradient

    def __getitem__(self, chosen: Tensor) -> "Trace":
        """Of some of the images."""
        return Trace(
            adversarial=self.adversarial[chosen], logits=self.logits[chosen], loss=self.loss[:, chosen],
            zero_gradient=self.zero_gradient[:, chosen], forwards=self.forwards[chosen],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """`pgd` with its arguments checked; the model must be `untouched` while it runs."""

    model: nn.Module
    x: Tensor
    objective: Objective
    ball: Linf | L2
    num_steps: int
    step_size: Size

    def run(
        self, adv: Tensor, *, judge_last: bool = True, drop_fooled: bool = False,
        watch: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Trace:
        """From adv (N, C, H, W), which may be written over.

        judge_last              ask for the last iterate's logits too, which costs a forward pass
        drop_fooled             see `attack_report`
        watch(t, adv, logits)   is called with each iterate that is judged, from t = 0 on
        """
        trace = None
        part, active = self, torch.arange(len(self.x), device=self.x.device)  # those still attacked, and their places
        step = self.ball.stepper(self.x, self.step_size)
        for t in range(self.num_steps + judge_last):
            current = adv if part is self else adv[active]
            logits, loss, gradient = part.judge(current, wants_gradient=t < self.num_steps)
            trace = self.blank(logits) if trace is None else trace
            trace.logits[active], trace.loss[t, active] = logits, loss
            trace.forwards[active] += 1
            if watch:
                watch(t, current, logits)
            if gradient is None:
                break
            trace.zero_gradient[t, active] = (gradient == 0).flatten(1).to(gradient.dtype).mean(dim=1)
            if drop_fooled:
                left = (part.objective.margin(logits) >= 0).nonzero().squeeze(1)
                if not len(left):
                    break
                part, active, current, gradient = part[left], active[left], current[left], gradient[left]
                step = part.ball.stepper(part.x, part.step_size)
            moved = step(current, gradient if self.objective.sign > 0 else -gradient)
            if part is self:
                adv = moved
            else:
                adv[active] = moved
        return replace(trace, adversarial=adv)

    def judge(self, adv: Tensor, *, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (N, K), loss (N,) of the labels aimed at, and its gradient (N, C, H, W), at adv (N, C, H, W)."""
        adv = adv.detach().requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient), torch.autocast(adv.device.type, enabled=False):
            logits = self.model(adv)
            loss = self.objective.loss(logits)
            # Still in here: the backward pass of a linear layer would follow the caller's autocast.
            gradient = torch.autograd.grad(loss.sum(), adv)[0] if wants_gradient else None
        return logits.detach(), loss.detach(), gradient

    def blank(self, logits: Tensor) -> Trace:
        """A trace in which nothing has happened yet; logits (N, K) say what kind the model's are."""
        x = self.x
        return Trace(
            adversarial=x.clone(), logits=logits.clone(),
            loss=logits.new_full((self.num_steps + 1, len(x)), math.nan),
            zero_gradient=x.new_full((self.num_steps, len(x)), math.nan),
            forwards=torch.zeros(len(x), dtype=torch.int64, device=x.device),
        )

    def __getitem__(self, chosen: Tensor) -> "Attack":
        """On some of the images."""
        return replace(
            self, x=self.x[chosen], objective=self.objective[chosen], ball=self.ball[chosen],
            step_size=pick(self.step_size, chosen),
        )


def make_attack(
    model: nn.Module, x: Tensor, target: str | Tensor, y: Tensor | None, num_steps: int, step_size: Size,
    epsilon: Size, norm: str, bounds: Bounds | None,
) -> Attack:
    """Raises ValueError for arguments that do not fit."""
    x = check_images(x)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    ball, step_size = make_ball(norm, epsilon, bounds, x), check_size("step_size", step_size, x)
    for name, size in {"epsilon": ball.epsilon, "step_size": step_size}.items():
        if norm == "l2" and isinstance(size, Tensor) and size.shape[-3:].numel() != 1:
            raise ValueError(
                f'with norm="l2" {name} is a length over all pixels of an image: a number or (N, 1, 1, 1) of them; '
                f"got {name} of shape {tuple(size.shape)}"
            )
    return Attack(
        model=model, x=x, objective=make_objective(target, y, x), ball=ball, num_steps=num_steps, step_size=step_size
    )


def make_starts(
    attack: Attack, random_start: bool, restarts: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """The first iterates of `restarts` runs; ValueError for fewer than one."""
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    x = attack.x
    generator = generator or torch.Generator(x.device).manual_seed(0)
    return (attack.ball.random(x, generator) if random_start or i else x.clone() for i in range(restarts))


def worst_case(attack: Attack, starts: Iterator[Tensor], *, drop_fooled: bool) -> AttackReport:
    """Of all runs, image by image, the last iterate with the least margin."""
    with untouched(attack.model, attack.x.device):
        # Of a copy: a first layer that works in place is refused where gradients are asked for, but not here.
        clean, _, _ = attack.judge(attack.x.clone(), wants_gradient=False)
        attack = replace(attack, objective=attack.objective.judged_by(clean))
        kept = attack.blank(clean)
        margin = torch.full_like(clean[:, 0], math.inf)
        if drop_fooled:  # images that are fooled as they came are left so
            margin = torch.where((reached := attack.objective.margin(clean)) < 0, reached, margin)
        forwards = torch.ones(len(clean), dtype=torch.int64, device=clean.device)
        backwards = torch.zeros_like(forwards)
        every = torch.arange(len(clean), device=clean.device)
        for start in starts:
            active = ((margin >= 0) | margin.isnan()).nonzero().squeeze(1) if drop_fooled else every
            if not len(active):
                break
            part = attack[active]
            trace = part.run(start[active], drop_fooled=drop_fooled)
            reached = part.objective.margin(trace.logits)
            better = (~(reached >= margin[active])).nonzero().squeeze(1)
            kept.put(active[better], trace[better])
            margin[active[better]] = reached[better]
            forwards[active] += trace.forwards
            backwards[active] += (~trace.zero_gradient.isnan()).sum(dim=0)
    return AttackReport(
        adversarial=kept.adversarial, clean_logits=clean, logits=kept.logits, success=margin < 0, loss=kept.loss,
        zero_gradient=kept.zero_gradient, forwards=forwards, backwards=backwards,
    )
