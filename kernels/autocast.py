"""What autocast does to a convolution's operands, for convolutions that PyTorch does not know as such."""

import torch


def autocast(operands: tuple) -> tuple:
    """The operands as autocast hands them to a convolution: its dtype for all but float64, on the device it is for.

    The first one is a tensor, and its device decides. Unlike PyTorch's, a cast weight is not kept while the context is
    open: each call casts it again.
    """
    device = operands[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        operand.to(dtype)
        if isinstance(operand, torch.Tensor)
        and operand.is_floating_point()
        and operand.dtype != torch.float64
        and operand.device.type == device
        else operand
        for operand in operands
    )
