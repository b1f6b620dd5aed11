"""max_pool2d() and MaxPool2d: PyTorch's 2-D max-pooling, with a ReLU before it where asked, by the Triton kernels."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from kernels.geometry import PoolGeometry, window
from kernels.pool_ops import pooling
from kernels.runtime import DTYPES

_NO_INDICES = "MaxPool2d: return_indices=True; the kernels keep places within a window only"


def max_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.max_pool2d` of `input`, or of its ReLU, compiled on CUDA and interpreted on the CPU.

    input (N, C, H, W) or (C, H, W) -> (N, C, P, Q) or (C, P, Q), channels-last if the input is. The same values as
    PyTorch's, gradients to within the order of adding; NaN passes, ReLU included. Differentiable to any order, in
    reverse and forward mode; `torch.func` and `torch.compile` see it as one operator.

    For the backward pass it keeps one index an output, within its window: a byte for windows of up to 255 places, else
    four. Neither the input nor its ReLU is kept, nor is the output: they live for as long as others hold them.

    Raises RuntimeError for shapes, dtypes, devices or windows that do not fit together, naming them, and where PyTorch
    does; also where a dilated window steps over the whole image. Raises TypeError for arguments of the wrong kind.
    """
    if has_torch_function((input,)):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size,
            stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode, relu=relu,
        )  # fmt: skip
    _check(input)
    if input.dim() == 3:
        return max_pool2d(input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode, relu=relu).squeeze(0)
    arguments = (*window(kernel_size, stride, padding, dilation), bool(ceil_mode))
    PoolGeometry.of(input.shape, *arguments)
    return pooling(input, *arguments, bool(relu))


def _check(input: torch.Tensor) -> None:
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"max_pool2d: input must be a tensor, got {type(input).__name__}")
    if input.layout != torch.strided:
        raise RuntimeError(f"max_pool2d: input has layout {input.layout}; only dense tensors are supported")
    if input.dtype not in DTYPES:
        raise RuntimeError(f"max_pool2d: {input.dtype} is not supported; supported: {', '.join(map(str, DTYPES))}")
    if input.dim() not in (3, 4):
        raise RuntimeError(
            "max_pool2d: Expected 3D (unbatched) or 4D (batched) input to max_pool2d, "
            f"but got input of size: {list(input.shape)}"
        )


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` through the Triton kernels: same constructor and repr, but no `return_indices`.

    (N, C, H, W) or (C, H, W) -> (N, C, P, Q) or (C, P, Q); raises what `max_pool2d` raises, and its constructor
    NotImplementedError for `return_indices=True`.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        if return_indices:
            raise NotImplementedError(_NO_INDICES)
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)

    def forward(self, input: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
        """The pooled input, or with `relu` the pooled ReLU of it."""
        if self.return_indices:
            raise NotImplementedError(_NO_INDICES)
        return max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, relu=relu)
