"""Other people's implementations of what is timed, each by its own package, in the same rows of the same run.

A peer that is absent, or that cannot run here, is a row that is skipped with the reason. What was run: foolbox, on the
CPU; of Inductor's convolution the call, on a CPU, where it is PyTorch's own; its templates were not. FlagGems and
torchattacks were not run either: they are called as their public sources have it (`src/flag_gems/ops/conv2d.py`,
`torchattacks/attacks/pgd.py`).
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Attack = Callable[[Tensor, Tensor], Tensor]
"""(images of values 0 ... 1, labels) -> adversarial images."""


class FlagGemsConv2d(nn.Conv2d):
    """Forward and both gradients are its Triton kernels; it multiplies float32 in full, and its results are NCHW."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The package's own name for it is a function in some versions and a module in others.
        conv2d = importlib.import_module("flag_gems.ops.conv2d").conv2d
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class InductorConv2d(nn.Conv2d):
    """The fastest of Inductor's Triton templates, found at the first call. On CUDA its gradients are cuDNN's."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        only_triton = {"max_autotune": True, "max_autotune_conv_backends": "TRITON"}
        self.compiled = torch.compile(super()._conv_forward, dynamic=False, options=only_triton)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.compiled(input, weight, bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """A peer that convolves."""

    module: type[nn.Conv2d]
    package: str
    operations: tuple[str, ...]
    """Which rows it has."""
    layout: torch.memory_format
    """That it works in."""
    kinds: tuple[str, ...] = ("float32", "float16", "bfloat16")
    cannot: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a GPU though its package is there; None where it can."""


def _too_small_for_inductor(device: torch.device) -> str | None:
    """On a small GPU it would take cuDNN's convolution without a word."""
    big = importlib.import_module("torch._inductor.utils").is_big_gpu(device.index or 0)
    return None if big else "Inductor has no Triton convolution for so small a GPU"


CONVOLUTIONS = {
    "flag_gems": Convolution(
        module=FlagGemsConv2d, package="flag_gems", operations=("forward", "input_grad", "weight_grad", "step"),
        layout=torch.contiguous_format,
    ),
    "inductor": Convolution(
        module=InductorConv2d, package="torch", operations=("forward",), layout=torch.channels_last,
        cannot=_too_small_for_inductor,
    ),
}  # fmt: skip
NAMES = {"flag_gems": "FlagGems", "inductor": "Inductor's Triton convolution"}


def why_no_convolution(name: str, device: torch.device) -> str | None:
    """Why the peer of CONVOLUTIONS called `name` cannot run on `device`, in one line; None where it can."""
    peer = CONVOLUTIONS[name]
    if reason := why_not_installed(peer.package):
        return reason
    return f"{NAMES[name]} needs a GPU" if device.type != "cuda" else peer.cannot(device)


def why_not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def foolbox_pgd(model: nn.Module, device: torch.device, *, steps: int, step: float, epsilon: float) -> Attack:
    foolbox = importlib.import_module("foolbox")
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=step, steps=steps, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    return lambda x, y: attack(wrapped, x, y, epsilons=epsilon)[1]


def torchattacks_pgd(model: nn.Module, device: torch.device, *, steps: int, step: float, epsilon: float) -> Attack:
    torchattacks = importlib.import_module("torchattacks")
    return torchattacks.PGD(model, eps=epsilon, alpha=step, steps=steps, random_start=False)


ATTACKS = {"foolbox": foolbox_pgd, "torchattacks": torchattacks_pgd}
"""By package; each makes an Attack: L-infinity, untargeted, from the images themselves."""
