"""A vmapped batch of convolutions as one: longer along the axis that they share, or in B times the groups."""

from collections.abc import Callable, Sequence

import torch

# What the axes of each tensor count, as far as convolutions can be put together along them.
X, W, Y = ("N", "Ci"), ("Co", "Ci"), ("N", "Co")


def as_one(convolution: Callable, B: int, in_dims: tuple, operands: tuple, axes: tuple, groups: int) -> tuple:
    """A vmapped batch of B convolutions as one: (its result, the axis of the batch in it).

    operands  two tensors, whose batches `in_dims` tells
    axes      what the axes of the operands and of the result count: of X, W, Y
    convolution(a, b, axis, groups)  computes the result of operands without a batch, longer by B along `axis`

    A batch of one operand is spread along what that operand shares with the result alone: images or channels. A batch
    of both makes B times the groups.
    """
    dims = in_dims[:2]
    batched = [dim is not None for dim in dims]
    if not any(batched):
        return convolution(*operands, None, groups), None
    *operand_axes, result_axes = axes
    if all(batched):
        shared = "Co" if result_axes is not X else "Ci"
        along = ["Co" if "Co" in names else "Ci" for names in operand_axes]
        inner = 1  # the groups of one convolution stay together
    else:
        (shared,) = set(operand_axes[batched.index(True)]) & set(result_axes)
        along = [shared, shared]
        inner = groups
    spread = [
        _join(operand.movedim(dim, 0), names.index(name), _parts(names, name, inner)) if dim is not None else operand
        for operand, dim, names, name in zip(operands, dims, operand_axes, along, strict=True)
    ]
    axis = result_axes.index(shared)
    result = convolution(*spread, axis, groups * B if all(batched) else groups)
    return _part(result, axis, _parts(result_axes, shared, inner), B), 0


def _parts(names: tuple, name: str, groups: int) -> int:
    """How many parts an axis consists of, each of which takes the whole batch: w holds the inputs of one group."""
    return 1 if name == "N" or (names is W and name == "Ci") else groups


def _join(tensor: torch.Tensor, axis: int, parts: int) -> torch.Tensor:
    """(B, ..., parts*C, ...) -> (..., parts*B*C, ...), at `axis` of the result."""
    return tensor.unflatten(axis + 1, (parts, -1)).movedim(0, axis + 1).flatten(axis, axis + 2)


def _part(tensor: torch.Tensor, axis: int, parts: int, B: int) -> torch.Tensor:
    """(..., parts*B*C, ...) -> (B, ..., parts*C, ...): what `_join` did, undone."""
    return tensor.unflatten(axis, (parts, B, -1)).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def scaled(shape: Sequence[int], axis: int | None, B: int) -> list[int]:
    """The shape, B times as long along `axis`."""
    return [size * B if i == axis else size for i, size in enumerate(shape)]
