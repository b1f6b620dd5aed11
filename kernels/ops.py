"""Convolution as PyTorch's operators, autograd and transforms see it.

Convolution is trilinear: T(x, w, dy) = <dy, conv(x, w)>. Forward, input gradient and weight gradient are its three
partial derivatives, so each one's derivatives are made of the other two, and every order of differentiation, in reverse
or forward mode, comes from the same three kernels:

    forward(x, w)        d/dx: input_grad(., w)     d/dw: weight_grad(., x)
    input_grad(dy, w)    d/ddy: forward(., w)       d/dw: weight_grad(dy, .)
    weight_grad(dy, x)   d/ddy: forward(x, .)       d/dx: input_grad(dy, .)

Each is linear in both of its operands, which is all that forward mode needs: the tangent of f(a, b) is
f(a', b) + f(a, b'). Batched by `vmap`, each is one convolution again: a batch B of one operand joins the images or the
channels, a batch of both makes B times the groups.

Three raw operators, `torch.ops.conv_lab.{forward, input_grad, weight_grad}`, launch; three autograd functions route.
All tensors of one call share dtype and device; geometry arguments are pairs (rows, columns), in pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from kernels import runtime
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


def _like(tensor: torch.Tensor, shape: Sequence[int], channels_last: bool) -> torch.Tensor:
    """What a launcher would return, without its values."""
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=_format(channels_last))


def _precision(dtype: torch.dtype) -> str:
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
) -> torch.Tensor:
    geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    layout = _format(is_channels_last(x) or is_channels_last(w))
    return forward(x, w, bias, geometry, precision=_precision(x.dtype), memory_format=layout)


def _forward_like(x, w, bias, stride, padding, dilation, groups):
    geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    return _like(x, geometry.y_shape, is_channels_last(x) or is_channels_last(w))


def _launch_input_grad(
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


def _input_grad_like(dy, w, x_shape, stride, padding, dilation, groups, channels_last):
    return _like(dy, x_shape, channels_last)


def _launch_weight_grad(
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


def _weight_grad_like(dy, x, w_shape, stride, padding, dilation, groups, channels_last):
    return _like(dy, w_shape, channels_last)


def _operator(name: str, launch: Callable, like: Callable) -> Callable:
    """The raw operator; fake, it takes the buffers of a launch where one is planned, and else just returns its like."""
    operator = torch.library.custom_op(f"conv_lab::{name}", launch, mutates_args=())

    @operator.register_fake
    def _(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
        return launch(tensor, *rest) if runtime.is_planned(tensor) else like(tensor, *rest)

    return operator


forward_op = _operator("forward", _launch_forward, _forward_like)
input_grad_op = _operator("input_grad", _launch_input_grad, _input_grad_like)
weight_grad_op = _operator("weight_grad", _launch_weight_grad, _weight_grad_like)


# What the axes of each tensor count, as far as convolutions can be put together along them.
_X, _W, _Y = ("N", "Ci"), ("Co", "Ci"), ("N", "Co")


class Convolution(torch.autograd.Function):
    """forward(x, w) + bias: x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y (N, Co, P, Q)."""

    @staticmethod
    def forward(x, w, bias, stride, padding, dilation, groups):
        return forward_op(x, w, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        x, w, _bias, *ctx.geometry = inputs
        _save(ctx, x, w)
        ctx.channels_last = is_channels_last(x) or is_channels_last(w)
        ctx.x_shape, ctx.w_shape, ctx.y_shape = x.shape, w.shape, output.shape

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor | None) -> tuple:
        if dy is None:
            return (None,) * 7
        x, w = ctx.saved_tensors
        dx = dw = db = None
        if _asked_for(ctx, 0):
            dx = InputGrad.apply(dy, w, ctx.x_shape, *ctx.geometry, ctx.channels_last)
        if _asked_for(ctx, 1):
            dw = WeightGrad.apply(dy, x, ctx.w_shape, *ctx.geometry, ctx.channels_last)
        if _asked_for(ctx, 2):
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None, None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, dx, dw, db, *_) -> torch.Tensor:
        x, w = ctx.saved_tensors
        if dx is None and dw is None:
            return db[:, None, None].expand(ctx.y_shape).clone()
        return _sum(
            None if dx is None else Convolution.apply(dx, w, db, *ctx.geometry),
            None if dw is None else Convolution.apply(x, dw, db if dx is None else None, *ctx.geometry),
        )

    @staticmethod
    def vmap(info, in_dims: tuple, x, w, bias, stride, padding, dilation, groups) -> tuple[torch.Tensor, int | None]:
        fused = bias if in_dims[1:3] == (None, None) else None

        def convolution(x, w, axis, groups):
            return Convolution.apply(x, w, fused, stride, padding, dilation, groups)

        y, batch = _as_one(convolution, info.batch_size, in_dims, (x, w), (_X, _W, _Y), groups)
        if bias is not fused:
            bias = bias[None] if in_dims[2] is None else bias.movedim(in_dims[2], 0)
            y, batch = (y[None] if batch is None else y) + bias[:, None, :, None, None], 0
        return y, batch


class InputGrad(torch.autograd.Function):
    """input_grad(dy, w): dy (N, Co, P, Q), w (Co, Ci/groups, R, S) -> dx of shape `x_shape` (N, Ci, H, W)."""

    @staticmethod
    def forward(dy, w, x_shape, stride, padding, dilation, groups, channels_last):
        return input_grad_op(dy, w, x_shape, stride, padding, dilation, groups, channels_last)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, w, ctx.x_shape, *ctx.geometry, ctx.channels_last = inputs
        _save(ctx, dy, w)
        ctx.w_shape = w.shape

    @staticmethod
    def backward(ctx: FunctionCtx, ddx: torch.Tensor | None) -> tuple:
        if ddx is None:
            return (None,) * 8
        dy, w = ctx.saved_tensors
        ddy = dw = None
        if _asked_for(ctx, 0):
            ddy = Convolution.apply(ddx, w, None, *ctx.geometry)
        if _asked_for(ctx, 1):
            dw = WeightGrad.apply(dy, ddx, ctx.w_shape, *ctx.geometry, ctx.channels_last)
        return ddy, dw, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, ddy, dw, *_) -> torch.Tensor:
        dy, w = ctx.saved_tensors
        rest = ctx.x_shape, *ctx.geometry, ctx.channels_last
        return _sum(
            None if ddy is None else InputGrad.apply(ddy, w, *rest),
            None if dw is None else InputGrad.apply(dy, dw, *rest),
        )

    @staticmethod
    def vmap(info, in_dims: tuple, dy, w, x_shape, stride, padding, dilation, groups, channels_last) -> tuple:
        def convolution(dy, w, axis, groups):
            shape = _scaled(x_shape, axis, info.batch_size)
            return InputGrad.apply(dy, w, shape, stride, padding, dilation, groups, channels_last)

        return _as_one(convolution, info.batch_size, in_dims, (dy, w), (_Y, _W, _X), groups)


class WeightGrad(torch.autograd.Function):
    """weight_grad(dy, x): dy (N, Co, P, Q), x (N, Ci, H, W) -> dw of shape `w_shape` (Co, Ci/groups, R, S)."""

    @staticmethod
    def forward(dy, x, w_shape, stride, padding, dilation, groups, channels_last):
        return weight_grad_op(dy, x, w_shape, stride, padding, dilation, groups, channels_last)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        dy, x, ctx.w_shape, *ctx.geometry, ctx.channels_last = inputs
        _save(ctx, dy, x)
        ctx.x_shape = x.shape

    @staticmethod
    def backward(ctx: FunctionCtx, ddw: torch.Tensor | None) -> tuple:
        if ddw is None:
            return (None,) * 8
        dy, x = ctx.saved_tensors
        ddy = dx = None
        if _asked_for(ctx, 0):
            ddy = Convolution.apply(x, ddw, None, *ctx.geometry)
        if _asked_for(ctx, 1):
            dx = InputGrad.apply(dy, ddw, ctx.x_shape, *ctx.geometry, ctx.channels_last)
        return ddy, dx, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: FunctionCtx, ddy, dx, *_) -> torch.Tensor:
        dy, x = ctx.saved_tensors
        rest = ctx.w_shape, *ctx.geometry, ctx.channels_last
        return _sum(
            None if ddy is None else WeightGrad.apply(ddy, x, *rest),
            None if dx is None else WeightGrad.apply(dy, dx, *rest),
        )

    @staticmethod
    def vmap(info, in_dims: tuple, dy, x, w_shape, stride, padding, dilation, groups, channels_last) -> tuple:
        def convolution(dy, x, axis, groups):
            shape = _scaled(w_shape, axis, info.batch_size)
            return WeightGrad.apply(dy, x, shape, stride, padding, dilation, groups, channels_last)

        return _as_one(convolution, info.batch_size, in_dims, (dy, x), (_Y, _X, _W), groups)


@torch.compiler.allow_in_graph
def convolution(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y (N, Co, P, Q), differentiable.

    `torch.compile` takes this call into its graph as it is: it cannot trace an autograd function that has a `jvp`.
    """
    return Convolution.apply(x, w, bias, stride, padding, dilation, groups)


def _save(ctx: FunctionCtx, a: torch.Tensor, b: torch.Tensor) -> None:
    """Keeps the two operands for differentiation: for the backward pass, each only if the other's gradient needs it.

    So a layer with frozen weights keeps no input.
    """
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
    ctx.save_for_forward(a, b)
    ctx.set_materialize_grads(False)  # an operand without a tangent then costs no convolution of zeros


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


def _as_one(convolution: Callable, B: int, in_dims: tuple, operands: tuple, axes: tuple, groups: int) -> tuple:
    """A vmapped batch of B convolutions as one: (its result, the axis of the batch in it).

    operands  two tensors, whose batches `in_dims` tells
    axes      what the axes of the operands and of the result count: of _X, _W, _Y
    convolution(a, b, axis, groups)  computes the result of operands without a batch, longer by B along `axis`

    A batch of one operand is spread along what that operand shares with the result alone: images or channels. A batch
    of both makes B times the groups.
    """
    dims = in_dims[:2]
    batched = [dim is not None for dim in dims]
    if not any(batched):
        return convolution(*operands, None, groups), None
    *operand_axes, result_axes = axes
    if all(batched):
        shared = "Co" if result_axes is not _X else "Ci"
        along = ["Co" if "Co" in names else "Ci" for names in operand_axes]
        inner = 1  # the groups of one convolution stay together
    else:
        (shared,) = set(operand_axes[batched.index(True)]) & set(result_axes)
        along = [shared, shared]
        inner = groups
    spread = [
        _join(operand.movedim(dim, 0), names.index(name), _parts(names, name, inner)) if dim is not None else operand
        for operand, dim, names, name in zip(operands, dims, operand_axes, along, strict=True)
    ]
    axis = result_axes.index(shared)
    result = convolution(*spread, axis, groups * B if all(batched) else groups)
    return _part(result, axis, _parts(result_axes, shared, inner), B), 0


def _parts(names: tuple, name: str, groups: int) -> int:
    """How many parts an axis consists of, each of which takes the whole batch: w holds the inputs of one group."""
    return 1 if name == "N" or (names is _W and name == "Ci") else groups


def _join(tensor: torch.Tensor, axis: int, parts: int) -> torch.Tensor:
    """(B, ..., parts*C, ...) -> (..., parts*B*C, ...), at `axis` of the result."""
    return tensor.unflatten(axis + 1, (parts, -1)).movedim(0, axis + 1).flatten(axis, axis + 2)


def _part(tensor: torch.Tensor, axis: int, parts: int, B: int) -> torch.Tensor:
    """(..., parts*B*C, ...) -> (B, ..., parts*C, ...): what `_join` did, undone."""
    return tensor.unflatten(axis, (parts, B, -1)).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def _scaled(shape: Sequence[int], axis: int | None, B: int) -> list[int]:
    """The shape, B times as long along `axis`."""
    return [size * B if i == axis else size for i, size in enumerate(shape)]


# The raw operators differentiate too, for programs in which nothing else is left: exported and traced ones.
forward_op.register_autograd(Convolution.backward, setup_context=Convolution.setup_context)
input_grad_op.register_autograd(InputGrad.backward, setup_context=InputGrad.setup_context)
weight_grad_op.register_autograd(WeightGrad.backward, setup_context=WeightGrad.setup_context)


# What FlopCounterMode reports, as for PyTorch's own: two operations a multiply-add, halo included.


@register_flop_formula(torch.ops.conv_lab.forward)
def _(x_shape, w_shape, bias, *geometry, out_shape=None, **_) -> int:
    return 2 * ConvGeometry.of(x_shape, w_shape, *geometry).multiply_adds


@register_flop_formula(torch.ops.conv_lab.input_grad)
def _(dy_shape, w_shape, x_shape, *geometry, out_shape=None, **_) -> int:
    return 2 * ConvGeometry.of(x_shape, w_shape, *geometry[:4]).multiply_adds


@register_flop_formula(torch.ops.conv_lab.weight_grad)
def _(dy_shape, x_shape, w_shape, *geometry, out_shape=None, **_) -> int:
    return 2 * ConvGeometry.of(x_shape, w_shape, *geometry[:4]).multiply_adds
