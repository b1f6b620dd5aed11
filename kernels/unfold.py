"""The write-up's convolution: unfold -> GEMM -> fold, with the unfolded matrix in memory.

    forward        y  = w2d @ unfold(x) + b       (Co, K) @ (N, K, P*Q) -> (N, Co, P*Q) = (N, Co, P, Q)
    input grad     dx = fold(w2d^T @ dy)          (K, Co) @ (N, Co, P*Q) -> (N, K, P*Q); overlaps add up
    weight grad    dw = sum_n dy @ unfold(x)^T    (N, Co, P*Q) @ (N, P*Q, K) -> (N, Co, K), summed over N
    bias grad      db = sum_{n,p,q} dy

x (N, Ci, H, W), w (Co, Ci, R, S), w2d = w viewed as (Co, K), K = Ci*R*S. Plain PyTorch: any device and dtype.

It is the lab's baseline and oracle, so it stays as the write-up has it. So do three costs of that coding,
each as large as the unfolded matrix; memory reports show them:

  - `matmul` of the 2-D weight with the 3-D matrix clones that matrix in order to flatten it, where the weight
    needs a gradient; in the input gradient it clones the product likewise;
  - `fold` leaves its result in a storage of R*S times the result's size, on the CPU and on CUDA;
  - in the backward pass, the product that was folded has a name, and lives until the weight gradient is done.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import fold, unfold
from torch.overrides import handle_torch_function, has_torch_function

from kernels.autocast import autocast
from kernels.geometry import ConvGeometry


class Unfold(torch.autograd.Function):
    """x (N, Ci, H, W), w (Co, Ci, R, S), bias (Co,) or None -> y (N, Co, P, Q).

    The gradients are made of differentiable calls, so every order of differentiation works.
    """

    @staticmethod
    def forward(
        x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geometry: ConvGeometry
    ) -> torch.Tensor:
        columns = unfold(x, **_window(geometry))  # (N, K, P*Q)
        y = w.reshape(geometry.Co, -1) @ columns  # (N, Co, P*Q)
        if bias is not None:
            y = y + bias.view(1, -1, 1)
        # A result that autograd knows as a view may not be changed by the in-place ReLU that follows.
        return torch.ops.aten._unsafe_view(y, geometry.y_shape)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        x, w, _, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> tuple:
        x, w = ctx.saved_tensors
        geometry = ctx.geometry
        dy = dy.flatten(2)  # (N, Co, P*Q)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            columns_grad = w.reshape(geometry.Co, -1).T @ dy  # (N, K, P*Q)
            dx = fold(columns_grad, (geometry.H, geometry.W), **_window(geometry))
        if ctx.needs_input_grad[1]:
            columns = unfold(x, **_window(geometry))  # (N, K, P*Q)
            dw = (dy @ columns.mT).sum(0).view(geometry.w_shape)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2))
        return dx, dw, db, None


def _window(geometry: ConvGeometry) -> dict[str, tuple[int, int]]:
    """The sliding window as `unfold` and `fold` take it."""
    return {
        "kernel_size": (geometry.R, geometry.S),
        "stride": (geometry.SH, geometry.SW),
        "padding": (geometry.PH, geometry.PW),
        "dilation": (geometry.DH, geometry.DW),
    }


def unfold_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` by unfold -> GEMM.

    input (N, Ci, H, W), weight (Co, Ci, R, S), bias (Co,) -> (N, Co, P, Q). Under autocast the operands are cast as
    PyTorch casts its own convolution's.

    Raises NotImplementedError for groups other than 1, TypeError for padding by name, RuntimeError for shapes
    or geometry that do not fit.
    """
    operands = (input, weight, bias)
    if has_torch_function(operands):
        return handle_torch_function(
            unfold_conv2d, operands, input, weight, bias, stride=stride, padding=padding, dilation=dilation,
            groups=groups,
        )
    if groups != 1:
        raise NotImplementedError(f"unfold_conv2d: groups must be 1, got {groups}")
    input, weight, bias = autocast(operands)
    geometry = ConvGeometry.of(input.shape, weight.shape, stride, padding, dilation)
    return Unfold.apply(input, weight, bias, geometry)


class UnfoldConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` by unfold -> GEMM: same constructor, parameters and state_dict.

    Raises NotImplementedError for what the write-up's convolution lacks: groups, padding by name, and padding
    modes other than zeros.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise NotImplementedError(f"UnfoldConv2d: groups must be 1, got {self.groups}")
        if isinstance(self.padding, str):
            raise NotImplementedError(f"UnfoldConv2d: padding must be in pixels, got {self.padding!r}")
        if self.padding_mode != "zeros":
            raise NotImplementedError(f"UnfoldConv2d: padding_mode must be zeros, got {self.padding_mode!r}")

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return unfold_conv2d(input, weight, bias, self.stride, self.padding, self.dilation)
