"""Convolution as PyTorch's operators and autograd see it.

Convolution is trilinear: T(x, w, dy) = <dy, conv(x, w)>. Forward, input gradient and weight gradient are its three
partial derivatives, so each one's derivatives are made of the other two, and every order of differentiation comes
from the same three kernels:

    forward(x, w)        d/dx: input_grad(., w)     d/dw: weight_grad(., x)
    input_grad(dy, w)    d/ddy: forward(., w)       d/dw: weight_grad(dy, .)
    weight_grad(dy, x)   d/ddy: forward(x, .)       d/dx: input_grad(dy, .)

Three raw operators, `torch.ops.conv_lab.{forward, input_grad, weight_grad}`, launch; three autograd functions route.
All tensors of one call share dtype and device; geometry arguments are pairs (rows, columns), in pixels.
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx

from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.weight_grad import weight_grad


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a 4-D tensor's strides say channels-last, by PyTorch's rule for shapes that would fit both layouts."""
    floor = 0
    for axis in (1, 3, 2, 0):
        stride = tensor.stride(axis)
        if tensor.size(axis) == 0 or stride < floor or (axis == 0 and floor == tensor.stride(1)):
            return False
        floor = stride * max(tensor.size(axis), 1)
    return True


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _precision(dtype: torch.dtype) -> str:
    """ "tf32" where PyTorch's own switch for convolutions allows it, else "ieee"; only float32 knows the difference."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@torch.library.custom_op("conv_lab::forward", mutates_args=())
def forward_op(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    layout = _format(is_channels_last(x) or is_channels_last(w))
    return forward(x, w, bias, geometry, precision=_precision(x.dtype), memory_format=layout)


@forward_op.register_fake
def _(x, w, bias, stride, padding, dilation, groups):
    geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    return x.new_empty(geometry.y_shape).to(memory_format=_format(is_channels_last(x) or is_channels_last(w)))


@torch.library.custom_op("conv_lab::input_grad", mutates_args=())
def input_grad_op(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    geometry = ConvGeometry.of(x_shape, w.shape, stride, padding, dilation, groups)
    return input_grad(dy, w, geometry, precision=_precision(dy.dtype), memory_format=_format(channels_last))


@input_grad_op.register_fake
def _(dy, w, x_shape, stride, padding, dilation, groups, channels_last):
    return dy.new_empty(x_shape).to(memory_format=_format(channels_last))


@torch.library.custom_op("conv_lab::weight_grad", mutates_args=())
def weight_grad_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    geometry = ConvGeometry.of(x.shape, w_shape, stride, padding, dilation, groups)
    return weight_grad(dy, x, geometry, precision=_precision(dy.dtype), memory_format=_format(channels_last))


@weight_grad_op.register_fake
def _(dy, x, w_shape, stride, padding, dilation, groups, channels_last):
    return dy.new_empty(w_shape).to(memory_format=_format(channels_last))


class Convolution(torch.autograd.Function):
    """forward(x, w) + bias: x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y (N, Co, P, Q)."""

    @staticmethod
    def forward(x, w, bias, stride, padding, dilation, groups):
        return forward_op(x, w, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        x, w, _bias, *ctx.geometry = inputs
        ctx.save_for_backward(x, w)
        ctx.channels_last = is_channels_last(x) or is_channels_last(w)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> tuple:
        x, w = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = InputGrad.apply(dy, w, x.shape, *ctx.geometry, ctx.channels_last)
        if ctx.needs_input_grad[1]:
            dw = WeightGrad.apply(dy, x, w.shape, *ctx.geometry, ctx.channels_last)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None, None, None, None


class InputGrad(torch.autograd.Function):
    """input_grad(dy, w): dy (N, Co, P, Q), w (Co, Ci/groups, R, S) -> dx of shape `x_shape` (N, Ci, H, W)."""

    @staticmethod
    def forward(dy, w, x_shape, stride, padding, dilation, groups, channels_last):
        return input_grad_op(dy, w, x_shape, stride, padding, dilation, groups, channels_last)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, w, _, *ctx.geometry, ctx.channels_last = inputs
        ctx.save_for_backward(dy, w)

    @staticmethod
    def backward(ctx: FunctionCtx, ddx: torch.Tensor) -> tuple:
        dy, w = ctx.saved_tensors
        ddy = dw = None
        if ctx.needs_input_grad[0]:
            ddy = Convolution.apply(ddx, w, None, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dw = WeightGrad.apply(dy, ddx, w.shape, *ctx.geometry, ctx.channels_last)
        return ddy, dw, None, None, None, None, None, None


class WeightGrad(torch.autograd.Function):
    """weight_grad(dy, x): dy (N, Co, P, Q), x (N, Ci, H, W) -> dw of shape `w_shape` (Co, Ci/groups, R, S)."""

    @staticmethod
    def forward(dy, x, w_shape, stride, padding, dilation, groups, channels_last):
        return weight_grad_op(dy, x, w_shape, stride, padding, dilation, groups, channels_last)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, x, _, *ctx.geometry, ctx.channels_last = inputs
        ctx.save_for_backward(dy, x)

    @staticmethod
    def backward(ctx: FunctionCtx, ddw: torch.Tensor) -> tuple:
        dy, x = ctx.saved_tensors
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = Convolution.apply(x, ddw, None, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dx = InputGrad.apply(dy, ddw, x.shape, *ctx.geometry, ctx.channels_last)
        return ddy, dx, None, None, None, None, None, None
