"""What the tests of the accountant count: storages of known size, and a model around a block."""

from collections import OrderedDict

import torch
from torch import nn

KIB = 1024
X, W = (2, 3, 8, 8), (4, 3, 3, 3)  # of a convolution: 1.5 KiB, 432 bytes; with a padding of 1 it makes 2 KiB


def kib(n: int, device: str = "cpu") -> torch.Tensor:
    """A tensor of n KiB."""
    return torch.zeros(n * KIB // 4, device=device)


def net(block: nn.Module, device: str) -> nn.Module:
    return nn.Sequential(OrderedDict(block=block)).to(device)
