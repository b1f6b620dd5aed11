"""Saliency maps and attacks on image classifiers, that leave the model as they found it."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m attacks.run, which comes by here before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("attacks.run")

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
