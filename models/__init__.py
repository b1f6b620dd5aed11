"""The lab's models, each built with the convolution it is told to use.

A model gets its convolution class as an argument; nothing is patched afterwards.
"""

import torch
from torch import nn

from kernels import Conv2d
from kernels.unfold import UnfoldConv2d
from models.simplenet import SimpleNet

MODELS = {"simplenet": SimpleNet}
CONVOLUTIONS: dict[str, type[nn.Conv2d]] = {
    "torch": nn.Conv2d,
    "unfold": UnfoldConv2d,
    "triton": Conv2d,
}


def build(name: str, conv: str = "triton", num_classes: int = 100, image_size: int = 128) -> nn.Module:
    """A freshly initialised model; the same seed gives the same parameters whatever the convolution.

    name        one of MODELS
    conv        one of CONVOLUTIONS
    image_size  side of the square input in pixels; SimpleNet takes any from 8 up

    Parameters lie in `memory_format(conv)`. Raises ValueError for an unknown name or convolution.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    if conv not in CONVOLUTIONS:
        raise ValueError(f"unknown convolution {conv!r}; choose from {', '.join(CONVOLUTIONS)}")
    if image_size < 8:
        raise ValueError(f"image size {image_size} is too small: {name} halves it three times and needs 8 or more")
    model = MODELS[name](num_classes=num_classes, conv=CONVOLUTIONS[conv])
    return model.to(memory_format=memory_format(conv))


def memory_format(conv: str) -> torch.memory_format:
    """The layout in which a model with this convolution wants its parameters and its input.

    Triton kernels reduce over channels, so channels-last lets them load whole vectors; a batch brought to it once,
    before the first layer, stays in it through ReLU and pooling and no layer converts.
    """
    return torch.channels_last if conv == "triton" else torch.contiguous_format
