"""Where a run starts and how it steps: initial weights, optimiser, learning rate."""

import math

import torch
from torch import nn

from train.recipes import Settings


def initialise(model: nn.Module, init: str) -> None:
    """Redraws the weights for "kaiming" (He et al. 2015: fan-in, gain sqrt(2) before a ReLU); "pytorch" keeps them."""
    if init == "pytorch":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            before = "relu" if isinstance(module, nn.Conv2d) else "linear"
            # Drawn in a plain tensor: filling a channels-last one would deal the same numbers out in another order.
            drawn = nn.init.kaiming_normal_(torch.empty(module.weight.shape), nonlinearity=before)
            module.weight.data.copy_(drawn)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The settings' optimiser; the loop sets its learning rate before every step."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def learning_rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """The rate of step 0, 1, ...: linear up to `lr`, then half a cosine down to almost zero at the last step."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
