"""Attacks and saliency maps leave a model exactly as they found it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While open, `model` is in eval mode and its parameters ask for no gradient; afterwards all is as before.

    Kept, also after an exception: the training flag of each layer, `requires_grad` and `.grad` of each parameter,
    BatchNorm's statistics, and PyTorch's random state on the CPU and on `device`.

    Frozen parameters make an attack step as cheap as the input's gradient alone: an autograd.Function, as the unfolding
    convolution is, computes its weight's gradient wherever the weight asks for one, wanted or not.
    """
    training = [(module, module.training) for module in model.modules()]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Inference mode is left meanwhile: in it nothing has a gradient, and what is made in it never gets one.
    with torch.inference_mode(False), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            # Not by eval() and train(), which pass a flag on to all layers below, frozen ones too.
            for module, _ in training:
                module.training = False
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for parameter in asking:
                parameter.requires_grad_(True)
