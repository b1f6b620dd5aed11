"""Several settings of one attack on the same images: those that differ in their number of steps alone share a run.

An attack of 50 steps is after 10 of them where the attack of 10 ends, and the forward pass of its next step already
gives the logits there.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from attacks.pgd import make_attack
from attacks.untouched import untouched


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Of an L-infinity attack by `pgd`."""

    num_steps: int
    step_size: float
    epsilon: float


# The course write-up's table of attacks, row by row.
WRITEUP = tuple(
    Setting(num_steps=steps, step_size=size, epsilon=epsilon)
    for steps, size, epsilon in (
        (10, 0.01, 0.1), (50, 0.01, 0.1), (10, 0.1, 0.1), (10, 0.01, 10.0), (10, 0.1, 10.0), (50, 0.1, 10.0)
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """N images under one setting."""

    logits: Tensor
    """(N, K), of the adversarial images."""
    zero_gradient: Tensor
    """(N,), the share of the gradients' entries that were exactly 0, mean over the steps."""


def sweep(
    model: nn.Module, x: Tensor, target: str | Tensor, y: Tensor | None = None, *, settings: Sequence[Setting] = WRITEUP
) -> list[Swept]:
    """What becomes of x (N, C, H, W) under each of the settings, in their order; target and y as in `pgd`.

    The same bits as from `pgd` one by one. Settings of different step sizes or epsilons never share a step, so that
    two of them that must agree are computed independently. The model is left as it was found.

    Raises ValueError as `pgd` does.
    """
    runs: dict[tuple[float, float], set[int]] = defaultdict(set)
    for setting in settings:
        runs[setting.step_size, setting.epsilon].add(setting.num_steps)
    found: dict[Setting, Swept] = {}
    for (step_size, epsilon), ends in runs.items():
        attack = make_attack(model, x, target, y, max(ends), step_size, epsilon, "linf", None)

        logits_at: dict[int, Tensor] = {}

        def keep(t: int, _adv: Tensor, logits: Tensor, *, ends=ends, kept=logits_at) -> None:
            if t in ends:
                kept[t] = logits

        with untouched(model, x.device):
            trace = attack.run(attack.x.clone(), watch=keep)
        for t in ends:
            setting = Setting(num_steps=t, step_size=step_size, epsilon=epsilon)
            found[setting] = Swept(logits=logits_at[t], zero_gradient=trace.zero_gradient[:t].mean(dim=0))
    return [found[setting] for setting in settings]
