"""conv2d() and Conv2d: PyTorch's 2-D convolution, computed by the Triton kernels on CUDA and on the CPU."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad

from kernels.geometry import ConvGeometry, pair
from kernels.ops import Convolution
from kernels.runtime import DTYPES


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` through the Triton kernels: compiled on CUDA, interpreted on the CPU.

    input (N, Ci, H, W) or (Ci, H, W), weight (Co, Ci/groups, R, S), bias (Co,) -> (N, Co, P, Q) or (Co, P, Q).
    `padding` may be "valid" or, at stride 1, "same". The result is channels-last if input or weight is. Differentiable
    to any order.

    Raises RuntimeError for shapes, dtypes, devices or geometry that do not fit together, naming them; TypeError for
    arguments of the wrong kind.
    """
    _check(input, weight, bias)
    if input.dim() == 3:
        return conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    padding = pair(padding, "padding")
    geometry = ConvGeometry.of(input.shape, weight.shape, stride, padding, dilation, groups)
    if bias is not None and bias.shape != (geometry.Co,):
        raise RuntimeError(f"conv2d: expected a bias of shape [{geometry.Co}], got {list(bias.shape)}")
    return Convolution.apply(input, weight, bias, stride, padding, dilation, geometry.groups)


def _check(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"conv2d: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise RuntimeError(f"conv2d: {name} has dtype {tensor.dtype}; supported: {', '.join(map(str, DTYPES))}")
        if tensor.dtype != input.dtype or tensor.device != input.device:
            raise RuntimeError(
                f"conv2d: input ({input.dtype} on {input.device}) and {name} ({tensor.dtype} on {tensor.device}) "
                "must have one dtype and one device"
            )
    if weight.dim() != 4:
        raise RuntimeError(f"conv2d: expected a 4-D weight, got shape {list(weight.shape)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"conv2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {list(input.shape)}"
        )


def _resolve_padding(
    input: torch.Tensor, weight: torch.Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The input and padding in pixels that "same" or "valid" stand for; an odd row or column goes after the image."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"conv2d: padding must be pixels, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"conv2d: padding='same' needs stride 1, got {stride}")
    total_h, total_w = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if total_h % 2 or total_w % 2:
        input = pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, (total_h // 2, total_w // 2)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` through the Triton kernels: same constructor, parameters, state_dict and padding modes."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
