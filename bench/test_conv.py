"""Forward, input gradient and weight gradient of one layer, each alone, by each convolution.

A gradient's row is what autograd does for it: the other operands need none, so nothing else is computed. Each result
is checked against float64 before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import models
from bench.rows import TOLERANCE, relative_error
from bench.shapes import Layer

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """A layer with its input and the gradient of its output; nothing in it needs a gradient yet."""

    module: nn.Conv2d
    x: torch.Tensor
    """(N, Ci, H, W)"""
    dy: torch.Tensor
    """(N, Co, P, Q)"""

    @classmethod
    def of(cls, layer: Layer, conv: str, device: torch.device) -> "Operands":
        """The same values for each convolution, in the layout that its models run in."""
        torch.manual_seed(0)
        layout = models.memory_format(conv)
        with device:
            module = layer.module(conv).to(memory_format=layout).requires_grad_(False)
            # Drawn into plain tensors, since a draw fills memory in order, and only then brought to the layout.
            x = torch.randn(layer.x_shape).contiguous(memory_format=layout)
            dy = torch.randn(module(x).shape).contiguous(memory_format=layout)
        return cls(module=module, x=x, dy=dy)

    def exact(self) -> "Operands":
        """The same in float64, by PyTorch's own convolution."""
        ours = self.module
        module = nn.Conv2d(
            ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, ours.padding, ours.dilation, ours.groups
        )
        module.load_state_dict(ours.state_dict())
        module = module.to(self.x.device, torch.float64).requires_grad_(False)
        return Operands(module=module, x=self.x.double(), dy=self.dy.double())


def forward(operands: Operands) -> Call:
    return lambda: operands.module(operands.x)


def input_grad(operands: Operands) -> Call:
    return _gradient(operands, operands.x)


def weight_grad(operands: Operands) -> Call:
    return _gradient(operands, operands.module.weight)


def _gradient(operands: Operands, of: torch.Tensor) -> Call:
    """A call that computes the gradient of `of` alone; the forward pass is done here, once."""
    of.requires_grad_()
    y = operands.module(operands.x)
    return lambda: torch.autograd.grad(y, of, operands.dy, retain_graph=True)[0]


def run(
    operation: Callable[[Operands], Call], layer: Layer, conv: str, device: torch.device, timed: Callable
) -> None:
    """Times one row, unless its result is wrong."""
    operands = Operands.of(layer, conv, device)
    exact = operation(operands.exact())()
    call = operation(operands)
    error = relative_error(call(), exact)
    assert error <= TOLERANCE["layer"], f"{conv} is wrong by {error:.1e}, so its time means nothing"
    timed(call, conv=conv, layer=layer, error=error)


def test_forward(layer, conv, device, timed):
    run(forward, layer, conv, device, timed)


def test_input_grad(layer, conv, device, timed):
    run(input_grad, layer, conv, device, timed)


def test_weight_grad(layer, conv, device, timed):
    run(weight_grad, layer, conv, device, timed)
