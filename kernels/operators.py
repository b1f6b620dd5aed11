"""What each operator of ours is registered with: its launch, its like on fake tensors, its result's layout."""

from collections.abc import Callable, Sequence

import torch

from kernels import runtime


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a 4-D tensor's strides say channels-last, by PyTorch's rule for shapes that would fit both layouts."""
    floor = 0
    for axis in (1, 3, 2, 0):
        stride = tensor.stride(axis)
        if tensor.size(axis) == 0 or stride < floor or (axis == 0 and floor == tensor.stride(1)):
            return False
        floor = stride * max(tensor.size(axis), 1)
    return True


def layout_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def like(tensor: torch.Tensor, shape: Sequence[int], channels_last: bool) -> torch.Tensor:
    """What a launcher would return, without its values."""
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout_of(channels_last))


def operator(name: str, launch: Callable, like: Callable) -> Callable:
    """The raw operator; fake, it takes the buffers of a launch where one is planned, and else just returns its like."""
    raw = torch.library.custom_op(f"conv_lab::{name}", launch, mutates_args=())

    @raw.register_fake
    def _(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
        return launch(tensor, *rest) if runtime.is_planned(tensor) else like(tensor, *rest)

    return raw
