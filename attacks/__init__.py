"""Saliency maps and attacks on image classifiers, that leave the model as they found it."""

from attacks.apgd import apgd
from attacks.pgd import AttackReport, attack_report, fgsm, pgd
from attacks.saliency import (
    Randomised,
    grad_cam,
    last_convolution,
    randomised_parameters,
    rank_correlation,
    saliency,
    smooth_grad,
)
from attacks.square import square
from attacks.sweep import Setting, Swept, sweep

__all__ = [
    "AttackReport", "Randomised", "Setting", "Swept", "apgd", "attack_report", "fgsm", "grad_cam", "last_convolution",
    "pgd", "randomised_parameters", "rank_correlation", "saliency", "smooth_grad", "square", "sweep",
]
