"""Models to fuse, and how to tell whether one is fused and still computes the same."""

import copy
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import Conv2d


class _Ran(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **kwargs or {})


def ran(model: nn.Module, *args: Tensor) -> Counter[str]:
    """The operators of a call, and how often each runs; the model stays as it is."""
    with _Ran() as operators, torch.no_grad():
        copy.deepcopy(model)(*args)  # norms remember what they saw
    return operators.counts


def is_fused(model: nn.Module, *args: Tensor) -> bool:
    """Whether a call runs no ReLU and no max-pool of PyTorch's; not to be asked of a norm in training."""
    return not ran(model, *args).keys() & {"aten::relu", "aten::relu_", "aten::max_pool2d_with_indices"}


def step(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Outputs, then gradients of their squares' sum, those of inputs that ask for one included, then buffers."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    outputs = torch.utils._pytree.tree_leaves(model(*args))
    sources = [t for t in (*args, *model.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), sources, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None), *(b.clone() for b in model.buffers())]


def assert_alike(fused: nn.Module, model: nn.Module, *args: Tensor) -> None:
    """In float64, where only the order of adding tells the two apart."""
    for ours, expected in zip(step(fused, *args), step(model, *args), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10 * max(1, expected.abs().max().item()))


def images(side: int = 8) -> Tensor:
    """(2, 3, side, side), always the same."""
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """Layers, and a way to use them: `way(block, x)`, or all of them in a row."""

    def __init__(self, way: Callable[["Block", Tensor], object] | None = None):
        torch.manual_seed(0)
        super().__init__()
        self.conv1, self.conv2 = Conv2d(3, 4, 3, padding=1), Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.way, self.scale, self.calls = way, 2.0, []
        self.double()

    def forward(self, x, mask=None):
        if self.way is not None:
            return self.way(self, x)
        y = self.relu(self.norm(self.conv1(x))) * self.scale * (1 + len(self.calls))
        return self.pool(self.relu(self.conv2(y if mask is None else y * mask)))

    def half(self, x):
        return self.relu(self.conv1(x))
