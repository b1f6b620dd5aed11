"""The set an attack stays in, and its steps: an L-infinity or L2 ball around x, cut with the range of valid pixels.

Sizes live in whatever space x lives in: for images normalised by (pixel - mean) / std, a ball of e grey levels has
epsilon e / (255 * std), a tensor of shape (C, 1, 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.step import fused_linf_step, linf_table

Size = float | Tensor
"""A number, or a tensor that broadcasts to (N, C, H, W)."""
Bounds = tuple[Size, Size]
"""The least and the greatest value a pixel may have."""
Step = Callable[[Tensor, Tensor], Tensor]
"""(adv, gradient to go along) -> the next adv, all (N, C, H, W)."""

TINY = 1e-12  # a gradient shorter than this is not lengthened to a whole step


@dataclass(frozen=True, slots=True)
class Linf:
    """max |adv - x| <= epsilon."""

    epsilon: Size
    bounds: Bounds | None = None

    def stepper(self, x: Tensor, step_size: Size) -> Step:
        """clamp(x + clamp(adv + step_size * sign(gradient) - x, -epsilon, epsilon), *bounds), as Madry et al. 2018.

        On CUDA one kernel where all sizes are a number a channel; else, and on a CPU, where interpreting the kernel
        would cost more, PyTorch's operators. Bit for bit alike.
        """
        if x.is_cuda:
            table = linf_table(x, step_size, self.epsilon, *(self.bounds or (-math.inf, math.inf)))
            if table is not None:
                return lambda adv, gradient: fused_linf_step(adv, x, gradient, table)
        return lambda adv, gradient: self.project(adv + step_size * gradient.sign(), x)

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball, then of the valid pixels."""
        return cut(x + clamp(adv - x, -self.epsilon, self.epsilon), self.bounds)

    def __getitem__(self, chosen: Tensor) -> "Linf":
        """For some of the images."""
        return Linf(*pick_ball(self, chosen))

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of unit size along which a linear loss rises most."""
        return gradient.sign()

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A point of the ball, uniform, with pixels cut to valid ones."""
        noise = 2 * torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) - 1
        return self.project(x + noise * self.epsilon, x)


@dataclass(frozen=True, slots=True)
class L2:
    """sqrt(sum (adv - x)^2) <= epsilon for each image."""

    epsilon: Size
    bounds: Bounds | None = None

    def stepper(self, x: Tensor, step_size: Size) -> Step:
        """A step of length step_size along the gradient, then the projection onto the ball."""
        return lambda adv, gradient: self.project(adv + step_size * self.direction(gradient), x)

    def project(self, adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball, then the nearest valid pixels, which only come closer to x."""
        delta = adv - x
        shrink = (self.epsilon / length(delta)).clamp_(max=1)
        return cut(x + delta * shrink, self.bounds)

    def __getitem__(self, chosen: Tensor) -> "L2":
        """For some of the images."""
        return L2(*pick_ball(self, chosen))

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of unit length along which a linear loss rises most; zero where the gradient is."""
        return gradient * (1 / length(gradient))

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A point of the ball, uniform in volume, with pixels cut to valid ones."""
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        radius = torch.rand((len(x), 1, 1, 1), dtype=x.dtype, device=x.device, generator=generator)
        return self.project(x + self.direction(noise) * radius ** (1 / x[0].numel()) * self.epsilon, x)


BALLS = {"linf": Linf, "l2": L2}


def make_ball(norm: str, epsilon: Size, bounds: Bounds | None, x: Tensor) -> Linf | L2:
    """Raises ValueError for an unknown norm, and for sizes that are no numbers or do not fit x (N, C, H, W)."""
    if norm not in BALLS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, BALLS))}, got {norm!r}")
    epsilon = check_size("epsilon", epsilon, x)
    if bounds is not None:
        low, high = (check_size("bounds", bound, x, signed=True) for bound in bounds)
        if (torch.as_tensor(low) > torch.as_tensor(high)).any():
            raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds}")
        bounds = low, high
    return BALLS[norm](epsilon, bounds)


def check_size(name: str, size: Size, x: Tensor, *, signed: bool = False) -> Size:
    """`size` on x's device and of its dtype; ValueError where it is negative, not a number, or does not fit x."""
    if isinstance(size, Tensor):
        try:
            fits = torch.broadcast_shapes(size.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} of shape {tuple(size.shape)} does not broadcast to x's {tuple(x.shape)}")
        size = size.to(x)
        bad = size.isnan().any() or (not signed and (size < 0).any())
    else:
        bad = math.isnan(size) or (not signed and size < 0)
    if bad:
        raise ValueError(f"{name} must be {'a number' if signed else 'at least 0'}, got {size}")
    return size


def pick(size: Size, chosen: Tensor) -> Size:
    """A size for some of the images: of one that differs from image to image their own."""
    return size[chosen] if isinstance(size, Tensor) and size.dim() == 4 and len(size) > 1 else size


def pick_ball(ball: "Linf | L2", chosen: Tensor) -> tuple[Size, Bounds | None]:
    return pick(ball.epsilon, chosen), ball.bounds and tuple(pick(bound, chosen) for bound in ball.bounds)


def length(delta: Tensor) -> Tensor:
    """(N, ...) -> (N, 1, 1, 1): the L2 norm of each image, at least TINY."""
    return delta.flatten(1).norm(dim=1).clamp_(min=TINY).view(-1, *[1] * (delta.dim() - 1))


def clamp(x: Tensor, low: Size, high: Size) -> Tensor:
    """torch.clamp, which does not take a number with a tensor."""
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        low, high = (torch.as_tensor(size, dtype=x.dtype, device=x.device) for size in (low, high))
    return x.clamp_(low, high)


def cut(x: Tensor, bounds: Bounds | None) -> Tensor:
    return x if bounds is None else clamp(x, *bounds)
