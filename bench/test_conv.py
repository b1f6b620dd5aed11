"""One layer's forward, input gradient and weight gradient, each alone, and a step of all, by each convolution.

A gradient's row is what autograd does for it: the other operands need none, so nothing else is computed. A step is
forward, both gradients and the bias's. Each result is checked against float64 before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.rows import worst_error
from bench.timing_cases import KINDS, Case, convolution
from bench.timing_rounds import copies_of, multiplying

Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """A layer with its input and the gradient of its output; nothing in it needs a gradient yet."""

    module: nn.Conv2d
    x: torch.Tensor
    """(N, Ci, H, W)"""
    dy: torch.Tensor
    """(N, Co, P, Q)"""

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Operands":
        """The same values for each contender, in the layout that its models run in."""
        torch.manual_seed(0)
        layer, layout, dtype = case.subject, case.layout, KINDS[case.kind].dtype
        with device:
            module = layer.module(convolution(case.contender)).to(dtype, memory_format=layout).requires_grad_(False)
            # Drawn into plain tensors, since a draw fills memory in order, and only then brought to the layout.
            x, dy = (
                torch.randn(shape).to(dtype, memory_format=layout) for shape in (layer.x_shape, layer.geometry.y_shape)
            )
        return cls(module=module, x=x, dy=dy)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.x, self.dy, *self.module.parameters()))

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
    return lambda: (operands.module(operands.x),)


def input_grad(operands: Operands) -> Call:
    return _gradient(operands, operands.x)


def weight_grad(operands: Operands) -> Call:
    return _gradient(operands, operands.module.weight)


def _gradient(operands: Operands, of: torch.Tensor) -> Call:
    """A call that computes the gradient of `of` alone; the forward pass is done here, once."""
    of.requires_grad_()
    y = operands.module(operands.x)
    return lambda: torch.autograd.grad(y, of, operands.dy, retain_graph=True)


def step(operands: Operands) -> Call:
    """A call that computes the result and the gradients of input, weight and bias."""
    module, x = operands.module, operands.x
    needed = [tensor.requires_grad_() for tensor in (x, module.weight, module.bias)]

    def run() -> tuple[torch.Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, needed, operands.dy)

    return run


def run(operation: Callable[[Operands], Call], case: Case, device: torch.device, timed: Callable) -> None:
    """Times one row, unless its result is wrong."""
    operands = Operands.of(case, device)
    exact = operation(operands.exact())()
    with multiplying(KINDS[case.kind]):
        calls = [operation(operands)]
        error = worst_error(calls[0](), exact)
        assert error <= case.tolerance, f"{case.contender} is wrong by {error:.1e}, so its time means nothing"
        del exact
        copies = [operation(Operands.of(case, device)) for _ in range(copies_of(operands.nbytes) - 1)]
        for call in copies:
            call()  # a peer may compile for each
        calls += copies
        timed(calls, case, error=error)


def test_forward(operation_case, device, timed):
    run(forward, operation_case, device, timed)


def test_input_grad(operation_case, device, timed):
    run(input_grad, operation_case, device, timed)


def test_weight_grad(operation_case, device, timed):
    run(weight_grad, operation_case, device, timed)


def test_step(operation_case, device, timed):
    run(step, operation_case, device, timed)
