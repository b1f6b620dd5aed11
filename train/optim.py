"""Where a run starts and how it steps: initial weights, optimiser, learning rate, moving average."""

import copy
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
    groups = [{"params": list(model.parameters())}] if settings.decay_all else decay_groups(model)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


def decay_groups(model: nn.Module) -> list[dict]:
    """The weights of convolutions and linear layers, which decay, and everything else, which does not.

    Decay on norms, biases and embeddings only costs accuracy (He et al. 2019, "Bag of tricks", section 3.1).
    """
    weights, others = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays = name == "weight" and isinstance(module, nn.Conv2d | nn.Linear)
            (weights if decays else others).append(parameter)
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def learning_rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """The rate of step 0, 1, ...: linear up to `lr`, then half a cosine down to almost zero at the last step."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


class MovingAverage:
    """An exponential moving average of a model's parameters and buffers, itself a model to validate."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after `step` (from 1) steps.

        Early on the decay is (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage: a long memory of
        the initial weights would make every short run's average useless.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = self.model.state_dict(), model.state_dict()
        moving = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in moving], [values[name] for name in moving], 1 - decay)
        for name in values.keys() - set(moving):  # counters
            averages[name].copy_(values[name])
