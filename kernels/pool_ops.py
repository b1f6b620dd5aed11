"""Max-pooling as PyTorch's operators, autograd and transforms see it.

Where the winners of x's windows stand, y = max_pool(x) is linear in x, and the index says where they stand. So every
derivative is one of two linear maps, each the transpose of the other:

    max_pool(x)        d/dx, forward mode: take(., index)    reverse mode: max_pool_grad(., index)
    max_pool_grad(dy)  d/ddy, forward mode: max_pool_grad    reverse mode: take
    take(ddx)          d/dddx, forward mode: take            reverse mode: max_pool_grad

All that any of them keeps is the index. Batched by `vmap`, each is one pooling of more images.

Three raw operators, `torch.ops.conv_lab.{max_pool, max_pool_grad, max_pool_take}`, launch; three autograd functions
route. A window is (kernel_size, stride, padding, dilation, ceil_mode): pairs (rows, columns), in pixels.
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx

from kernels.geometry import PoolGeometry
from kernels.operators import is_channels_last, layout_of, like, operator
from kernels.pool import index_dtype, max_pool, max_pool_grad, max_pool_take


def _launch_max_pool(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry = PoolGeometry.of(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool(x, geometry, relu=relu, memory_format=layout_of(is_channels_last(x)))


def _max_pool_like(x, kernel_size, stride, padding, dilation, ceil_mode, relu):
    geometry = PoolGeometry.of(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    y = like(x, geometry.y_shape, is_channels_last(x))
    return y, torch.empty_like(y, dtype=index_dtype(geometry), memory_format=torch.channels_last)


def _launch_max_pool_grad(
    dy: torch.Tensor,
    index: torch.Tensor,
    x_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
) -> torch.Tensor:
    geometry = PoolGeometry.of(x_shape, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool_grad(dy, index, geometry, memory_format=layout_of(channels_last))


def _max_pool_grad_like(dy, index, x_shape, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return like(dy, x_shape, channels_last)


def _launch_max_pool_take(
    ddx: torch.Tensor,
    index: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
) -> torch.Tensor:
    geometry = PoolGeometry.of(ddx.shape, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool_take(ddx, index, geometry, memory_format=layout_of(channels_last))


def _max_pool_take_like(ddx, index, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return like(ddx, index.shape, channels_last)


max_pool_op = operator("max_pool", _launch_max_pool, _max_pool_like)
max_pool_grad_op = operator("max_pool_grad", _launch_max_pool_grad, _max_pool_grad_like)
max_pool_take_op = operator("max_pool_take", _launch_max_pool_take, _max_pool_take_like)


class MaxPool(torch.autograd.Function):
    """max_pool(x): x (N, C, H, W) -> y (N, C, P, Q) and the index of its winners, which has no gradient."""

    @staticmethod
    def forward(x, kernel_size, stride, padding, dilation, ceil_mode, relu):
        return max_pool_op(x, kernel_size, stride, padding, dilation, ceil_mode, relu)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, *ctx.window, _relu = inputs
        index = output[1]
        ctx.mark_non_differentiable(index)
        _save(ctx, index)
        ctx.x_shape, ctx.channels_last = x.shape, is_channels_last(x)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor | None, _dindex: object) -> tuple:
        if dy is None:
            return (None,) * 7
        (index,) = ctx.saved_tensors
        return MaxPoolGrad.apply(dy, index, ctx.x_shape, *ctx.window, ctx.channels_last), *(None,) * 6

    @staticmethod
    def jvp(ctx: FunctionCtx, dx: torch.Tensor, *_) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return MaxPoolTake.apply(dx, index, *ctx.window, ctx.channels_last), None

    @staticmethod
    def vmap(info, in_dims: tuple, x, *rest) -> tuple:
        y, index = MaxPool.apply(_join(x, in_dims[0], info.batch_size), *rest)
        return (_part(y, info.batch_size), _part(index, info.batch_size)), (0, 0)


class MaxPoolGrad(torch.autograd.Function):
    """max_pool_grad(dy, index): both (N, C, P, Q) -> dx of shape `x_shape` (N, C, H, W)."""

    @staticmethod
    def forward(dy, index, x_shape, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
        return max_pool_grad_op(dy, index, x_shape, kernel_size, stride, padding, dilation, ceil_mode, channels_last)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        _dy, index, ctx.x_shape, *ctx.window, ctx.channels_last = inputs
        _save(ctx, index)

    @staticmethod
    def backward(ctx: FunctionCtx, ddx: torch.Tensor | None) -> tuple:
        if ddx is None:
            return (None,) * 9
        (index,) = ctx.saved_tensors
        return MaxPoolTake.apply(ddx, index, *ctx.window, ctx.channels_last), *(None,) * 8

    @staticmethod
    def jvp(ctx: FunctionCtx, ddy: torch.Tensor, *_) -> torch.Tensor:
        (index,) = ctx.saved_tensors
        return MaxPoolGrad.apply(ddy, index, ctx.x_shape, *ctx.window, ctx.channels_last)

    @staticmethod
    def vmap(info, in_dims: tuple, dy, index, x_shape, *rest) -> tuple[torch.Tensor, int]:
        B = info.batch_size
        shape = (B * x_shape[0], *x_shape[1:])
        dx = MaxPoolGrad.apply(_join(dy, in_dims[0], B), _join(index, in_dims[1], B), shape, *rest)
        return _part(dx, B), 0


class MaxPoolTake(torch.autograd.Function):
    """max_pool_take(ddx, index): ddx (N, C, H, W), index (N, C, P, Q) -> (N, C, P, Q)."""

    @staticmethod
    def forward(ddx, index, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
        return max_pool_take_op(ddx, index, kernel_size, stride, padding, dilation, ceil_mode, channels_last)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        ddx, index, *ctx.window, ctx.channels_last = inputs
        _save(ctx, index)
        ctx.x_shape = ddx.shape

    @staticmethod
    def backward(ctx: FunctionCtx, dz: torch.Tensor | None) -> tuple:
        if dz is None:
            return (None,) * 8
        (index,) = ctx.saved_tensors
        return MaxPoolGrad.apply(dz, index, ctx.x_shape, *ctx.window, ctx.channels_last), *(None,) * 7

    @staticmethod
    def jvp(ctx: FunctionCtx, dddx: torch.Tensor, *_) -> torch.Tensor:
        (index,) = ctx.saved_tensors
        return MaxPoolTake.apply(dddx, index, *ctx.window, ctx.channels_last)

    @staticmethod
    def vmap(info, in_dims: tuple, ddx, index, *rest) -> tuple[torch.Tensor, int]:
        B = info.batch_size
        return _part(MaxPoolTake.apply(_join(ddx, in_dims[0], B), _join(index, in_dims[1], B), *rest), B), 0


@torch.compiler.allow_in_graph
def pooling(
    x: torch.Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    relu: bool,
) -> torch.Tensor:
    """x (N, C, H, W) -> y (N, C, P, Q), differentiable; channels-last if x is.

    `torch.compile` takes this call into its graph as it is: it cannot trace an autograd function that has a `jvp`.
    """
    return MaxPool.apply(x, kernel_size, stride, padding, dilation, ceil_mode, relu)[0]


def _save(ctx: FunctionCtx, index: torch.Tensor) -> None:
    ctx.save_for_backward(index)
    ctx.save_for_forward(index)
    ctx.set_materialize_grads(False)


def _join(tensor: torch.Tensor, axis: int | None, B: int) -> torch.Tensor:
    """A vmapped batch of B tensors as images of one: (B*N, ...); what has no batch is repeated."""
    batched = tensor.expand(B, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return batched.flatten(0, 1)


def _part(tensor: torch.Tensor, B: int) -> torch.Tensor:
    """(B*N, ...) -> (B, N, ...): what `_join` did, undone."""
    return tensor.unflatten(0, (B, -1))


# The raw operators differentiate too, for programs in which nothing else is left: exported and traced ones.
max_pool_op.register_autograd(MaxPool.backward, setup_context=MaxPool.setup_context)
max_pool_grad_op.register_autograd(MaxPoolGrad.backward, setup_context=MaxPoolGrad.setup_context)
max_pool_take_op.register_autograd(MaxPoolTake.backward, setup_context=MaxPoolTake.setup_context)
