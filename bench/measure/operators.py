"""What an operator takes beside what one sees of it, told from its arguments and its result."""

from collections.abc import Iterator, Sequence

import torch

from bench.measure.account import ConvolutionCall, ReductionCall, ScratchCall

# A library computes them on a GPU, one convolution for each 4-D result, with a workspace of its own.
CONVOLUTIONS = ("aten.convolution", "aten.convolution_backward")


def adds_up_gradients(func: torch._ops.OpOverload, args: tuple, result: object) -> bool:
    """Whether this may be autograd that adds a gradient to an earlier one of the same tensor.

    It does so in place if nobody else holds the earlier one, but never where a dispatch mode looks on. An addition in
    a backward pass of the user's own, whose first term dies with it, is taken for one: they cannot be told apart.
    """
    return (
        func is torch.ops.aten.add.Tensor
        and torch._C._current_autograd_node() is not None
        and not torch.is_grad_enabled()
        and isinstance(args[1], torch.Tensor)
        and args[0].shape == result.shape
        and args[0].dtype == result.dtype
    )


def scratch(operator: str, module: str, args: tuple, result: torch.Tensor) -> Iterator[ScratchCall]:
    """What its kernel takes before its result: `unfold` a tensor like its argument, which it then makes larger."""
    if operator == "aten.im2col" and args[0].nbytes < result.nbytes:
        yield ScratchCall(operator, module, args[0].nbytes)


def calls(
    operator: str, module: str, args: tuple, result: torch.Tensor
) -> Iterator[ConvolutionCall | ReductionCall]:
    """What a GPU's kernel of this operator may have taken besides."""
    if operator in CONVOLUTIONS and result.dim() == 4:
        yield ConvolutionCall(operator, module, _convolved_bytes(operator, args, result))
    elif operator == "aten.sum" and len(args) > 1 and args[1] and result.numel() and _lie_side_by_side(*args[:2]):
        element = torch.promote_types(result.dtype, torch.float32).itemsize
        yield ReductionCall(operator, module, result.numel(), args[0].numel() // result.numel(), element)


def _lie_side_by_side(tensor: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether the sums over `dims` lie as their terms do: a step of one in memory is a step to the next sum."""
    summed = {dim % tensor.dim() for dim in dims}
    kept = [dim for dim in range(tensor.dim()) if dim not in summed and tensor.size(dim) > 1]
    reached = 1
    for stride, size in sorted((tensor.stride(dim), tensor.size(dim)) for dim in kept):
        if stride != reached:
            return False
        reached *= size
    return reached > 1


def _convolved_bytes(operator: str, args: tuple, result: torch.Tensor) -> int:
    """Bytes of a convolution's two operands and its result.

    The forward pass has x and w; a gradient has dy and that of x and w whose own gradient it is not.
    """
    if operator == "aten.convolution":
        operands = args[:2]
    else:
        dy, x, w = args[:3]
        is_of_w = result.shape == w.shape and result.shape != x.shape
        operands = dy, x if is_of_w else w
    return result.nbytes + sum(operand.nbytes for operand in operands)


def unseen_bytes(func: torch._ops.OpOverload, args: tuple, result: torch.Tensor) -> int:
    """Bytes by which a real device's result is larger than its meta twin.

    `fold` and `unfold` alone: their CPU and CUDA kernels first take a result as large as their argument, and then
    change its shape, for which a storage that is too large is kept.
    """
    if func in (torch.ops.aten.col2im.default, torch.ops.aten.im2col.default) and result.is_meta:
        return max(0, args[0].nbytes - result.untyped_storage().nbytes())
    return 0
