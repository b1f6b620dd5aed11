"""The bytes that operators must move to and from a device's memory, counted from their tensors; nothing is measured.

    with counting("meta") as moves:
        loss(model(x)).backward()
    sum(move.nbytes for move in moves)

Every operator reads each of its operands once and writes each of its results once:

    storages   What two operands view of one storage is read once; of what an expanded axis repeats, one is.
    in place   What an operator changes it reads and writes; what it only overwrites (copy_, zero_) it writes.
    views      And other operators whose results are all views of operands move nothing; nor do empty and its like.
    shapes     An operand of which an operator needs the shape alone (UNREAD) is not read.
    gradients  PyTorch's convolution_backward is up to three moves, one for each gradient asked for, each with what it
               must read by itself: a GPU computes each in a kernel of its own.
    launchers  A custom operator's launcher takes buffers of its own, seen through `kernels.runtime.on_allocate`:
               layout copies, transposed weights, split-K workspaces. Each is written once and read once.

A cache between two operators, or between two kernels of one, may save some of that. Repeated reads cost more, and so
does what a library does inside one operator: cuDNN's workspaces and layout copies, and the bias that PyTorch adds to
cuDNN's result in another kernel. Operands count whole, also where a strided 1x1 convolution uses every fourth pixel.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels import runtime

INPUT_GRAD, WEIGHT_GRAD, BIAS_GRAD = "input gradient", "weight gradient", "bias gradient"

CONVOLUTION_BACKWARD = "aten.convolution_backward"
UNINITIALISED = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}
# In place, but for what was there before.
OVERWRITES = {
    f"aten.{name}"
    for name in ("copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_", "_foreach_copy_", "_foreach_zero_")
}
_CREATORS = ("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full")
UNREAD = {f"aten.{name}": "self" for name in _CREATORS} | {
    "aten.max_pool2d_with_indices_backward": "self",
    "aten.avg_pool2d_backward": "self",
    "aten._adaptive_avg_pool2d_backward": "self",
    "aten.nll_loss_backward": "self",
}
"""By operator the argument of which its kernel asks the shape and reads nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """What one operator moves, in bytes."""

    operator: str
    """As "aten.relu_"."""
    part: str = ""
    """Of CONVOLUTION_BACKWARD: INPUT_GRAD, WEIGHT_GRAD or BIAS_GRAD."""
    read: int
    written: int
    buffers: int = 0
    """To and from its launchers' buffers."""

    @property
    def nbytes(self) -> int:
        return self.read + self.written + self.buffers


@contextlib.contextmanager
def counting(device: torch.device | str) -> Iterator[list[Move]]:
    """The list to which, while open, each operator that moves anything on devices of that type is appended."""
    operators = _Operators(torch.device(device).type)
    with runtime.on_allocate(operators.buffer_taken), operators:
        yield operators.moves


class _Operators(TorchDispatchMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self._device = device
        self._buffers: list[torch.Tensor] = []
        """Of the operator that runs just now; kept, so that no two of them get one storage."""
        self._thread: int | None = None

    def buffer_taken(self, nbytes: int, what: str, tensor: torch.Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._buffers.append(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._thread, self._buffers = threading.get_ident(), []
        try:
            result = func(*args, **kwargs)
        finally:
            self._thread, buffers = None, self._buffers
            self._buffers = []
        if func._schema.name.replace("::", ".") == CONVOLUTION_BACKWARD:
            found = self._gradients(_named(func, args, kwargs), result)
        else:
            found = [self._move(func, _named(func, args, kwargs), result, buffers)]
        self.moves.extend(move for move in found if move.nbytes)
        return result

    def _gradients(self, given: dict[str, object], result: tuple) -> Iterator[Move]:
        dy, x, w = (given[name] for name in ("grad_output", "input", "weight"))
        parts = {INPUT_GRAD: (dy, w), WEIGHT_GRAD: (dy, x), BIAS_GRAD: (dy,)}
        for (part, operands), gradient, asked in zip(parts.items(), result, given["output_mask"], strict=True):
            if asked:
                read, written = self._bytes(operands), self._bytes([gradient])
                yield Move(operator=CONVOLUTION_BACKWARD, part=part, read=read, written=written)

    def _move(
        self, func: torch._ops.OpOverload, given: dict[str, object], result: object, buffers: list[torch.Tensor]
    ) -> Move:
        operator = func._schema.name.replace("::", ".")
        nothing = Move(operator=operator, read=0, written=0)
        if operator in UNINITIALISED or torch.Tag.inplace_view in func.tags:
            return nothing
        read, written = [], []
        for argument in func._schema.arguments:
            tensors = list(_tensors(given.get(argument.name)))
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written:
                written += tensors
            is_overwritten = is_written and (argument.is_out or operator in OVERWRITES)
            if not is_overwritten and UNREAD.get(operator) != argument.name:
                read += tensors
        theirs = {_storage(tensor) for tensor in _tensors(given)}
        results = list(_tensors(result))
        made = [tensor for tensor in results if _storage(tensor) not in theirs]
        if results and not made and not written:
            return nothing
        ours = {_storage(tensor) for tensor in results} | theirs
        taken = sum(buffer.untyped_storage().nbytes() for buffer in buffers if _storage(buffer) not in ours)
        return Move(operator=operator, read=self._bytes(read), written=self._bytes(written + made), buffers=2 * taken)

    def _bytes(self, tensors: Iterable[torch.Tensor]) -> int:
        """That the tensors view, each of them once."""
        views: dict[int, dict[tuple, int]] = {}
        whole: dict[int, int] = {}
        for tensor in tensors:
            if tensor.device.type == self._device:
                # What an expanded axis repeats lies there once.
                axes = tuple((n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n)
                view = tensor.storage_offset() * tensor.itemsize, tensor.itemsize, axes
                views.setdefault(_storage(tensor), {})[view] = tensor.itemsize * prod(n for n, _ in axes)
                whole[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return sum(min(sum(seen.values()), whole[storage]) for storage, seen in views.items())


def _named(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, object]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _tensors(tree: object) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
