"""Which convolutions are timed: layers of a model, with the shapes that the model itself gives them.

Nothing is listed twice: a model is run on meta tensors, and its convolutions tell what they are and what they got.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import models
from kernels.geometry import ConvGeometry

# Of SimpleNet's seven convolutions: the stem, which has 3 channels and a stride; both 3x3, which do most of the work;
# and the 1x1 that writes the largest result, where memory is the limit. Of ResNet18's eleven those of another kind: 3x3
# and 1x1 of stride 2, and 3x3 whose filters outweigh the few pixels that are left. Its stem and its first 3x3 are
# SimpleNet's.
TIMED = {
    "simplenet": ("conv7x7-64-s2", "conv3x3-64", "conv1x1-256", "conv3x3-128"),
    "resnet18": ("conv3x3-128-s2", "conv1x1-128-s2", "conv3x3-256", "conv3x3-512"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One convolution of a model, with the batch it gets."""

    name: str
    """Filter and output channels, as "conv3x3-64"."""
    x_shape: tuple[int, int, int, int]
    """(N, Ci, H, W)"""
    w_shape: tuple[int, int, int, int]
    """(Co, Ci/groups, R, S)"""
    stride: tuple[int, int]
    """In pixels, as the two below."""
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry.of(
            self.x_shape, self.w_shape, self.stride, self.padding, self.dilation, self.groups
        )

    @property
    def label(self) -> str:
        """The name, and the stride where there is one, as "conv3x3-128-s2": no two in a model of TIMED."""
        strides = "x".join(map(str, dict.fromkeys(self.stride)))
        return self.name if self.stride == (1, 1) else f"{self.name}-s{strides}"

    def module(self, conv: type[nn.Conv2d]) -> nn.Conv2d:
        """This layer computed by such a convolution, freshly initialised, with a bias."""
        return conv(
            self.x_shape[1],
            self.w_shape[0],
            self.w_shape[2:],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


def name_of(w_shape: Sequence[int]) -> str:
    """Filter and output channels of (Co, Ci/groups, R, S), as "conv3x3-64"."""
    return f"conv{w_shape[2]}x{w_shape[3]}-{w_shape[0]}"


def conv_layers(model_name: str, batch_size: int, image_size: int) -> list[Layer]:
    """The model's convolutions in the order they run, for a batch of square images; equal ones once.

    Raises ValueError where `models.build` does.
    """
    with torch.device("meta"):
        model = models.build(model_name, conv="torch", image_size=image_size)
        images = torch.empty(batch_size, 3, image_size, image_size)
    layers = []

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        layers.append(
            Layer(
                name=name_of(conv.weight.shape),
                x_shape=tuple(inputs[0].shape),
                w_shape=tuple(conv.weight.shape),
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=conv.groups,
            )
        )

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    model(images)
    return list(dict.fromkeys(layers))


def timed_layers(model_name: str, batch_size: int, image_size: int) -> list[Layer]:
    """The layers of TIMED, in its order."""
    layers = {layer.label: layer for layer in conv_layers(model_name, batch_size, image_size)}
    return [layers[label] for label in TIMED[model_name]]
