"""AutoAttack (Croce & Hein 2020) by its authors' own package, which PyPI does not have."""

import importlib.util

import torch
from torch import Tensor, nn

from attacks.untouched import untouched
from train.cli import UserError

INSTALL = "pip install git+https://github.com/fra31/auto-attack"  # as pyproject.toml's extra of that name
NORMS = {"linf": "Linf", "l2": "L2"}
CLASSES = 10  # of which its targeted attacks aim at nine


def require_autoattack() -> None:
    """Raises UserError, saying how to install it, where the package is missing."""
    if importlib.util.find_spec("autoattack") is None:
        raise UserError(f"--autoattack needs the package of that name, which is not installed: {INSTALL}")


def autoattack(model: nn.Module, pixels: Tensor, y: Tensor, *, epsilon: float, norm: str) -> Tensor:
    """Logits (N, K) after the standard version (APGD-CE, targeted APGD, targeted FAB, Square), which takes minutes.

    pixels      (N, 3, H, W) of 0 ... 1, which it keeps them in
    """
    from autoattack import AutoAttack

    with untouched(model, pixels.device):
        adversary = AutoAttack(
            model, norm=NORMS[norm], eps=epsilon, seed=0, version="standard", device=pixels.device, verbose=False
        )
        adversarial = adversary.run_standard_evaluation(pixels, y, bs=len(pixels))
        with torch.no_grad():
            return model(adversarial)
