"""conv2d(), Conv2d and LazyConv2d: PyTorch's 2-D convolution, computed by the Triton kernels on CUDA and on the CPU.

`swap_conv2d` puts them into a model that exists.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad, relu_
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import handle_torch_function, has_torch_function

from kernels.autocast import autocast
from kernels.geometry import ConvGeometry, check_dimensions, pair
from kernels.ops import convolution
from kernels.runtime import DTYPES


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    relu: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` through the Triton kernels: compiled on CUDA, interpreted on the CPU.

    input (N, Ci, H, W) or (Ci, H, W), weight (Co, Ci/groups, R, S), bias (Co,) -> (N, Co, P, Q) or (Co, P, Q).
    `padding` may be "valid" or, at stride 1, "same". The result is channels-last if input or weight is. Under autocast
    the operands are cast as PyTorch casts its own convolution's. Differentiable to any order, in reverse and forward
    mode; `torch.func` and `torch.compile` see it as one operator.

    With `relu` the result is relu(conv2d(...)), of the same operator. Besides what the convolution keeps for the
    backward pass (input and weight), it keeps its result, which the next layer has anyway; what lies before the ReLU
    is never written, nor is a masked gradient.

    Raises RuntimeError for shapes, dtypes, devices or geometry that do not fit together, naming them; TypeError for
    arguments of the wrong kind.
    """
    operands = (input, weight, bias)
    if has_torch_function(operands):
        return handle_torch_function(
            conv2d, operands, input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
            relu=relu,
        )  # fmt: skip
    input, weight, bias = autocast(operands) if isinstance(input, torch.Tensor) else operands
    _check(input, weight, bias)
    if input.dim() == 3:
        return conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups, relu=relu).squeeze(0)
    check_dimensions(input.shape, weight.shape)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    padding = pair(padding, "padding")
    geometry = ConvGeometry.of(input.shape, weight.shape, stride, padding, dilation, groups)
    if bias is not None and bias.shape != (geometry.Co,):
        raise RuntimeError(
            f"conv2d: Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with {geometry.Co} "
            f"elements, but got bias of size {list(bias.shape)} instead"
        )
    if input.dtype not in DTYPES:
        raise RuntimeError(f"conv2d: {input.dtype} is not supported; supported: {', '.join(map(str, DTYPES))}")
    if geometry.Ci == 0:
        return _without_channels(input, weight, bias, geometry)
    return convolution(input, weight, bias, stride, padding, dilation, geometry.groups, relu)


def _check(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"conv2d: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise RuntimeError(f"conv2d: {name} has layout {tensor.layout}; only dense tensors are supported")
        if tensor.dtype != input.dtype or tensor.device != input.device:
            raise RuntimeError(
                f"conv2d: Input type ({input.dtype} on {input.device}) and {name} type ({tensor.dtype} on "
                f"{tensor.device}) should be the same"
            )
    if input.dim() not in (3, 4):
        raise RuntimeError(
            "conv2d: Expected 3D (unbatched) or 4D (batched) input to conv2d, "
            f"but got input of size: {list(input.shape)}"
        )


def _resolve_padding(
    input: torch.Tensor, weight: torch.Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The input and padding in pixels that "same" or "valid" stand for; an odd row or column goes after the image."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"conv2d: Invalid padding string: {padding!r}; it must be 'same' or 'valid', or pixels")
    if stride != (1, 1):
        raise RuntimeError(f"conv2d: padding='same' is not supported for strided convolutions, got stride {stride}")
    total_h, total_w = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if total_h % 2 or total_w % 2:
        input = pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, (total_h // 2, total_w // 2)


def _without_channels(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: ConvGeometry
) -> torch.Tensor:
    """What PyTorch answers to no input channels: no output channels, (N, 0, P, Q), and gradients of zeros."""
    operands = (input, weight) if bias is None else (input, weight, bias)
    return input.new_empty(geometry.N, 0, geometry.P, geometry.Q) * sum(operand.sum() for operand in operands)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` through the Triton kernels: same constructor, parameters, state_dict and padding modes.

    (N, Ci, H, W) or (Ci, H, W) -> (N, Co, P, Q) or (Co, P, Q); raises what `conv2d` raises.
    """

    def forward(
        self, input: torch.Tensor, *, norm: nn.BatchNorm2d | None = None, relu: bool = False
    ) -> torch.Tensor:
        """The convolution, then `norm`, then ReLU, where they are asked for; see `fuse`.

        A norm of so many channels that uses its running statistics is folded into weight and bias:

            norm(conv(x, w) + b) = conv(x, w*s) + (b - mean)*s + beta     s = gamma / sqrt(var + eps), a channel each

        computed in float32 at least, and differentiable. One that takes the batch's needs the convolution's result, and
        keeps it: there the three run one after the other.
        """
        if norm is None:
            return self._convolve(input, self.weight, self.bias, relu)
        fits = input.dim() == 4 and norm.num_features == self.out_channels  # or the norm is to say what does not
        if norm.training or norm.running_mean is None or not fits:
            y = norm(self._convolve(input, self.weight, self.bias, False))
            return relu_(y) if relu else y
        return self._convolve(input, *_folded(self.weight, self.bias, norm), relu)

    def _convolve(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
    ) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, relu=relu)


def _folded(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight (Co, Ci/groups, R, S) and bias (Co,) that do what `norm` does after them, in the weight's dtype."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, norm.running_var.dtype), torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)  # (Co,)
    if norm.weight is not None:
        scale = norm.weight.to(wide) * scale
    shift = -norm.running_mean.to(wide) if bias is None else bias.to(wide) - norm.running_mean
    shift = shift * scale if norm.bias is None else torch.addcmul(norm.bias.to(wide), shift, scale)
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


class LazyConv2d(nn.LazyConv2d, Conv2d):
    """`torch.nn.LazyConv2d` that becomes our `Conv2d` when its first input tells the number of channels."""

    cls_to_become = Conv2d


def swap_conv2d(model: nn.Module) -> nn.Module:
    """Makes every plain `nn.Conv2d` of a model a `Conv2d`, and every `nn.LazyConv2d` a `LazyConv2d`; returns the model.

    The modules stay the objects they are: their parameters, hooks, parametrizations, training mode and places in the
    model, and whatever else refers to them, an optimizer for one. So it works on a model that is a convolution itself.
    Swap before `torch.compile`.

    Subclasses of nn.Conv2d, which may compute something else, and dtypes that we lack are left alone, and a UserWarning
    names each of them and why.
    """
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or isinstance(module, Conv2d):
            continue
        plain = type(module).__base__ if is_parametrized(module) else type(module)
        ours = {nn.Conv2d: Conv2d, nn.LazyConv2d: LazyConv2d}.get(plain)
        if ours is None:
            left.append(f"{name or 'the model'} ({plain.__name__}, a subclass of nn.Conv2d)")
        elif (parameter := next(module.parameters(), None)) is not None and parameter.dtype not in DTYPES:
            left.append(f"{name or 'the model'} ({parameter.dtype} weights)")
        else:
            module.__class__ = _parametrized(type(module), ours) if is_parametrized(module) else ours
    if left:
        warnings.warn(f"swap_conv2d left {len(left)} modules as they were: {', '.join(left)}", stacklevel=2)
    return model


def _parametrized(cls: type, base: type) -> type:
    """The class that `torch.nn.utils.parametrize` made for one module, on another base."""
    return type(cls.__name__, (base,), {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})
