"""The lab's models, each built with the convolution it is told to use.

A model gets its convolution class as an argument; nothing is patched afterwards.
"""

from pathlib import Path

import torch
from torch import nn

import kernels
from kernels import variants
from kernels.unfold import UnfoldConv2d
from models import resnet18
from models.customnet import CustomNet
from models.resnet18 import ResNet18
from models.simplenet import SimpleNet
from models.simplevit import SimpleViT

MODELS: dict[str, type[nn.Module]] = {
    "simplenet": SimpleNet,
    "customnet": CustomNet,
    "simplevit": SimpleViT,
    "resnet18": ResNet18,
}
LABS: dict[str, type[nn.Conv2d]] = {
    "torch": nn.Conv2d,
    "unfold": UnfoldConv2d,
    "triton": kernels.Conv2d,
}
PEERS = ("flag_gems", "inductor")
"""What the benchmark calls other people's convolutions; no variant can have these names."""
VARIANTS = variants.find(reserved=(*LABS, *PEERS))
"""Those of kernels/variants; one whose file cannot be used raises ValueError, with the reason, when it is built."""
CONVOLUTIONS = LABS | VARIANTS
NATIVE = ("torch", "unfold")
"""Made of PyTorch's own operators. All others are Triton kernels, also those that are not here (any more)."""

# How often a model halves its images: one pixel must be left of them.
HALVINGS = {"simplenet": 3, "customnet": 3, "resnet18": 5}


def build(
    name: str, conv: str = "triton", num_classes: int = 100, image_size: int = 128, fuse: bool | None = None
) -> nn.Module:
    """A freshly initialised model; the same seed gives the same parameters whatever the convolution.

    name        one of MODELS
    conv        one of CONVOLUTIONS
    image_size  side of the square input in pixels: SimpleNet and CustomNet take any from 8 up, ResNet18 from 32 up,
                SimpleViT multiples of 8, of which it makes its patch
    fuse        whether ReLU, max-pool and batch norm join the triton convolution (`kernels.fuse`); None is yes. It
                means nothing for the others

    Weights of convolutions lie in `memory_format(conv)`. Raises ValueError for an unknown name or convolution, a
    variant that cannot be used, or a size that does not fit.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    if conv not in CONVOLUTIONS:
        raise ValueError(
            f"unknown convolution {conv!r}; choose from {', '.join(CONVOLUTIONS)} (there is no "
            f"kernels/variants/{conv}.py)"
        )
    options = {"num_classes": num_classes, "conv": CONVOLUTIONS[conv]}
    if name not in HALVINGS:
        options["image_size"] = image_size
    elif image_size < 2 ** HALVINGS[name]:
        raise ValueError(
            f"image size {image_size} is too small: {name} halves it {HALVINGS[name]} times and needs "
            f"{2 ** HALVINGS[name]} or more"
        )
    model = MODELS[name](**options)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # not the whole model: SimpleViT's positions have four dimensions too
            module.to(memory_format=memory_format(conv))
    return kernels.fuse(model) if conv == "triton" and fuse is not False else model


def load_pretrained(model: nn.Module, name: str, weights: str | Path) -> None:
    """Puts pretrained weights into the model called `name`: ResNet18 only, see `models.resnet18.load_pretrained`.

    Raises ValueError, in one line, for another model and for weights that cannot be had or do not fit.
    """
    if name != "resnet18":
        raise ValueError(f"there are pretrained weights for resnet18 only, not for {name}")
    resnet18.load_pretrained(model, weights)


def memory_format(conv: str) -> torch.memory_format:
    """The layout in which a model with this convolution wants its parameters and its input.

    Triton kernels reduce over channels, so channels-last lets them load whole vectors; a batch brought to it once,
    before the first layer, stays in it through ReLU and pooling and no layer converts. A variant says its own.
    """
    if conv in VARIANTS:
        return VARIANTS[conv].memory_format
    return torch.channels_last if conv == "triton" else torch.contiguous_format
