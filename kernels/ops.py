"""Convolution as PyTorch's operators, autograd and transforms see it.

Convolution is trilinear: T(x, w, dy) = <dy, conv(x, w)>. Forward, input gradient and weight gradient are its three
partial derivatives, so each one's derivatives are made of the other two, and every order of differentiation, in reverse
or forward mode, comes from the same three kernels:

    forward(x, w)        d/dx: input_grad(., w)     d/dw: weight_grad(., x)
    input_grad(dy, w)    d/ddy: forward(., w)       d/dw: weight_grad(dy, .)
    weight_grad(dy, x)   d/ddy: forward(x, .)       d/dx: input_grad(dy, .)

Each is linear in both of its operands, which is all that forward mode needs: the tangent of f(a, b) is
f(a', b) + f(a, b'). Batched by `vmap`, each is one convolution again: a batch B of one operand joins the images or the
channels, a batch of both makes B times the groups. The bias has a fourth derivative, bias_grad(dy).

A ReLU after the convolution is part of `forward`, and its output y is all that is kept for it. Where y is not positive
no gradient passes: the three gradients get y as their mask and apply it while they load dy, so that no masked gradient
is written. The mask is a constant of theirs: ReLU's second derivative is zero. Under `vmap`, in forward mode and in
second derivatives PyTorch masks instead, and there a masked tensor is written.

Four raw operators, `torch.ops.conv_lab.{forward, input_grad, weight_grad, bias_grad}`, launch; four autograd functions
route. All tensors of one call share dtype and device; geometry arguments are pairs (rows, columns), in pixels.
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from kernels.batching import W, X, Y, as_one, scaled
from kernels.bias_grad import bias_grad
from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.operators import is_channels_last, layout_of, like, operator
from kernels.weight_grad import weight_grad


def precision_for(dtype: torch.dtype) -> str:
    """ "tf32" where PyTorch's own switch for convolutions allows it, else "ieee"; only float32 knows the difference."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _launch_forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
) -> torch.Tensor:
    geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    layout = layout_of(is_channels_last(x) or is_channels_last(w))
    return forward(x, w, bias, geometry, relu=relu, precision=precision_for(x.dtype), memory_format=layout)


def _forward_like(x, w, bias, stride, padding, dilation, groups, relu=False):
    geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    return like(x, geometry.y_shape, is_channels_last(x) or is_channels_last(w))


def _launch_input_grad(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    geometry = ConvGeometry.of(x_shape, w.shape, stride, padding, dilation, groups)
    layout = layout_of(channels_last)
    return input_grad(dy, w, geometry, mask=mask, precision=precision_for(dy.dtype), memory_format=layout)


def _input_grad_like(dy, w, x_shape, stride, padding, dilation, groups, channels_last, mask=None):
    return like(dy, x_shape, channels_last)


def _launch_weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    geometry = ConvGeometry.of(x.shape, w_shape, stride, padding, dilation, groups)
    layout = layout_of(channels_last)
    return weight_grad(dy, x, geometry, mask=mask, precision=precision_for(dy.dtype), memory_format=layout)


def _weight_grad_like(dy, x, w_shape, stride, padding, dilation, groups, channels_last, mask=None):
    return like(dy, w_shape, channels_last)


def _launch_bias_grad(dy: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return bias_grad(dy, mask=mask)


def _bias_grad_like(dy, mask=None):
    return dy.new_empty(dy.shape[1])


forward_op = operator("forward", _launch_forward, _forward_like)
input_grad_op = operator("input_grad", _launch_input_grad, _input_grad_like)
weight_grad_op = operator("weight_grad", _launch_weight_grad, _weight_grad_like)
bias_grad_op = operator("bias_grad", _launch_bias_grad, _bias_grad_like)


class Convolution(torch.autograd.Function):
    """forward(x, w) + bias, or its ReLU: x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y."""

    @staticmethod
    def forward(x, w, bias, stride, padding, dilation, groups, relu=False):
        return forward_op(x, w, bias, stride, padding, dilation, groups, relu)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        x, w, _bias, *ctx.geometry, relu = inputs
        _save(ctx, x, w, output if relu else None)
        ctx.channels_last = is_channels_last(x) or is_channels_last(w)
        ctx.x_shape, ctx.w_shape, ctx.y_shape = x.shape, w.shape, output.shape

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor | None) -> tuple:
        if dy is None:
            return (None,) * 8
        x, w, mask = ctx.saved_tensors
        dx = dw = db = None
        if _asked_for(ctx, 0):
            dx = InputGrad.apply(dy, w, ctx.x_shape, *ctx.geometry, ctx.channels_last, mask)
        if _asked_for(ctx, 1):
            dw = WeightGrad.apply(dy, x, ctx.w_shape, *ctx.geometry, ctx.channels_last, mask)
        if _asked_for(ctx, 2):
            db = BiasGrad.apply(dy, mask)
        return dx, dw, db, None, None, None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, dx, dw, db, *_) -> torch.Tensor:
        x, w, mask = ctx.saved_tensors
        if dx is None and dw is None:
            return _masked(db[:, None, None].expand(ctx.y_shape).clone(), mask)
        tangent = _sum(
            None if dx is None else Convolution.apply(dx, w, db, *ctx.geometry, False),
            None if dw is None else Convolution.apply(x, dw, db if dx is None else None, *ctx.geometry, False),
        )
        return _masked(tangent, mask)

    @staticmethod
    def vmap(info, in_dims: tuple, x, w, bias, stride, padding, dilation, groups, relu) -> tuple:
        fused = bias if in_dims[1:3] == (None, None) else None
        after = relu and fused is not bias

        def convolution(x, w, axis, groups):
            return Convolution.apply(x, w, fused, stride, padding, dilation, groups, relu and not after)

        y, batch = as_one(convolution, info.batch_size, in_dims, (x, w), (X, W, Y), groups)
        if bias is not fused:
            bias = bias[None] if in_dims[2] is None else bias.movedim(in_dims[2], 0)
            y, batch = (y[None] if batch is None else y) + bias[:, None, :, None, None], 0
        return y.relu() if after else y, batch


class InputGrad(torch.autograd.Function):
    """input_grad(dy, w): dy (N, Co, P, Q), w (Co, Ci/groups, R, S), mask as dy or None -> dx of shape `x_shape`."""

    @staticmethod
    def forward(dy, w, x_shape, stride, padding, dilation, groups, channels_last, mask=None):
        return input_grad_op(dy, w, x_shape, stride, padding, dilation, groups, channels_last, mask)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, w, ctx.x_shape, *ctx.geometry, ctx.channels_last, mask = inputs
        _save(ctx, dy, w, mask)
        ctx.w_shape = w.shape

    @staticmethod
    def backward(ctx: FunctionCtx, ddx: torch.Tensor | None) -> tuple:
        if ddx is None:
            return (None,) * 9
        dy, w, mask = ctx.saved_tensors
        ddy = dw = None
        if _asked_for(ctx, 0):
            ddy = _masked(Convolution.apply(ddx, w, None, *ctx.geometry, False), mask)
        if _asked_for(ctx, 1):
            dw = WeightGrad.apply(dy, ddx, ctx.w_shape, *ctx.geometry, ctx.channels_last, mask)
        return ddy, dw, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, ddy, dw, *_) -> torch.Tensor:
        dy, w, mask = ctx.saved_tensors
        rest = ctx.x_shape, *ctx.geometry, ctx.channels_last, mask
        return _sum(
            None if ddy is None else InputGrad.apply(ddy, w, *rest),
            None if dw is None else InputGrad.apply(dy, dw, *rest),
        )

    @staticmethod
    def vmap(info, in_dims: tuple, dy, w, x_shape, stride, padding, dilation, groups, channels_last, mask) -> tuple:
        def convolution(dy, w, axis, groups):
            shape = scaled(x_shape, axis, info.batch_size)
            return InputGrad.apply(dy, w, shape, stride, padding, dilation, groups, channels_last, None)

        dy, in_dims = _masked_batch(dy, mask, in_dims)
        return as_one(convolution, info.batch_size, in_dims, (dy, w), (Y, W, X), groups)


class WeightGrad(torch.autograd.Function):
    """weight_grad(dy, x): dy (N, Co, P, Q), x (N, Ci, H, W), mask as dy or None -> dw of shape `w_shape`."""

    @staticmethod
    def forward(dy, x, w_shape, stride, padding, dilation, groups, channels_last, mask=None):
        return weight_grad_op(dy, x, w_shape, stride, padding, dilation, groups, channels_last, mask)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, x, ctx.w_shape, *ctx.geometry, ctx.channels_last, mask = inputs
        _save(ctx, dy, x, mask)
        ctx.x_shape = x.shape

    @staticmethod
    def backward(ctx: FunctionCtx, ddw: torch.Tensor | None) -> tuple:
        if ddw is None:
            return (None,) * 9
        dy, x, mask = ctx.saved_tensors
        ddy = dx = None
        if _asked_for(ctx, 0):
            ddy = _masked(Convolution.apply(x, ddw, None, *ctx.geometry, False), mask)
        if _asked_for(ctx, 1):
            dx = InputGrad.apply(dy, ddw, ctx.x_shape, *ctx.geometry, ctx.channels_last, mask)
        return ddy, dx, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, ddy, dx, *_) -> torch.Tensor:
        dy, x, mask = ctx.saved_tensors
        rest = ctx.w_shape, *ctx.geometry, ctx.channels_last, mask
        return _sum(
            None if ddy is None else WeightGrad.apply(ddy, x, *rest),
            None if dx is None else WeightGrad.apply(dy, dx, *rest),
        )

    @staticmethod
    def vmap(info, in_dims: tuple, dy, x, w_shape, stride, padding, dilation, groups, channels_last, mask) -> tuple:
        def convolution(dy, x, axis, groups):
            shape = scaled(w_shape, axis, info.batch_size)
            return WeightGrad.apply(dy, x, shape, stride, padding, dilation, groups, channels_last, None)

        dy, in_dims = _masked_batch(dy, mask, in_dims)
        return as_one(convolution, info.batch_size, in_dims, (dy, x), (Y, X, W), groups)


class BiasGrad(torch.autograd.Function):
    """bias_grad(dy): dy (N, Co, P, Q), mask as dy or None -> db (Co,)."""

    @staticmethod
    def forward(dy, mask=None):
        return bias_grad_op(dy, mask)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, mask = inputs
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.y_shape = dy.shape

    @staticmethod
    def backward(ctx: FunctionCtx, ddb: torch.Tensor) -> tuple:
        (mask,) = ctx.saved_tensors
        return _masked(ddb[:, None, None].expand(ctx.y_shape), mask), None

    @staticmethod
    def jvp(ctx: FunctionCtx, ddy: torch.Tensor, *_) -> torch.Tensor:
        (mask,) = ctx.saved_tensors
        return BiasGrad.apply(ddy, mask)

    @staticmethod
    def vmap(info, in_dims: tuple, dy, mask) -> tuple:
        dy, (axis, _) = _masked_batch(dy, mask, in_dims)
        dy = dy.movedim(axis, 1)  # (N, B, Co, P, Q)
        return BiasGrad.apply(dy.flatten(1, 2), None).unflatten(0, (info.batch_size, -1)), 0


@torch.compiler.allow_in_graph
def convolution(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y (N, Co, P, Q), or relu(y), differentiable.

    `torch.compile` takes this call into its graph as it is: it cannot trace an autograd function that has a `jvp`.
    """
    return Convolution.apply(x, w, bias, stride, padding, dilation, groups, relu)


def _save(ctx: FunctionCtx, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Keeps the two operands for differentiation: for the backward pass, each only if the other's gradient needs it.

    So a layer with frozen weights keeps no input.
    """
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None, mask)
    ctx.save_for_forward(a, b, mask)
    ctx.set_materialize_grads(False)  # an operand without a tangent then costs no convolution of zeros


def _masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The tensor where the mask, if any, is positive or NaN, else 0: what passes a ReLU whose output is the mask."""
    return tensor if mask is None else torch.where(mask <= 0, 0, tensor)


def _masked_batch(dy: torch.Tensor, mask: torch.Tensor | None, in_dims: tuple) -> tuple[torch.Tensor, tuple]:
    """dy, masked, and `in_dims` of the operands, of which dy's is the first and the mask's the last."""
    axis, *others, mask_axis = in_dims
    if mask is None:
        return dy, in_dims
    if axis is not None:
        dy = dy.movedim(axis, 0)
    if mask_axis is not None:
        mask = mask.movedim(mask_axis, 0)
    return _masked(dy, mask), (None if axis is mask_axis is None else 0, *others, None)


def _asked_for(ctx: FunctionCtx, index: int) -> bool:
    """Whether the backward pass that is running needs the gradient of operand `index`.

    `needs_input_grad` says whether the operand requires one; `autograd.grad(loss, x)` leaves the weights' unasked for
    all the same, and PyTorch's own operators then skip it.
    """
    if not ctx.needs_input_grad[index] or torch.compiler.is_compiling():
        return ctx.needs_input_grad[index]
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:
        return True  # a leaf that is itself asked for, which the question does not cover


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """a + b, where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


# The raw operators differentiate too, for programs in which nothing else is left: exported and traced ones.
forward_op.register_autograd(Convolution.backward, setup_context=Convolution.setup_context)
input_grad_op.register_autograd(InputGrad.backward, setup_context=InputGrad.setup_context)
weight_grad_op.register_autograd(WeightGrad.backward, setup_context=WeightGrad.setup_context)
bias_grad_op.register_autograd(BiasGrad.backward, setup_context=BiasGrad.setup_context)


# What FlopCounterMode reports, as for PyTorch's own: two operations a multiply-add, halo included.


@register_flop_formula(torch.ops.conv_lab.forward)
def _(x_shape, w_shape, bias, *geometry, out_shape=None, **_) -> int:
    return 2 * ConvGeometry.of(x_shape, w_shape, *geometry[:4]).multiply_adds


@register_flop_formula(torch.ops.conv_lab.input_grad)
def _(dy_shape, w_shape, x_shape, *geometry, out_shape=None, **_) -> int:
    return 2 * ConvGeometry.of(x_shape, w_shape, *geometry[:4]).multiply_adds


@register_flop_formula(torch.ops.conv_lab.weight_grad)
def _(dy_shape, x_shape, w_shape, *geometry, out_shape=None, **_) -> int:
    return 2 * ConvGeometry.of(x_shape, w_shape, *geometry[:4]).multiply_adds
