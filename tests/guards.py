"""Guard bands around every tensor a kernel is given, and a check of every address that it is interpreted with.

A guarded tensor lies inside a larger buffer filled with one NaN that no arithmetic makes, told from others by its bits.
Operands keep their strides: the gaps between their elements hold it too. Outputs, workspaces and copies, all that
`runtime.empty` gives, hold it everywhere until something is written. So

  - what is read outside a tensor, or before it is written, makes a NaN of the result that it goes into;
  - what is written outside a tensor, or into an operand, changes bits that `Guards.check` compares;
  - an element that is never written keeps its bits.

In the interpreter every address is checked as well, before it is used: a value that `tl.where` throws away shows
nowhere, and is a fault on a GPU all the same. So are addresses that are masked, see MAY_POINT_ANYWHERE.

bfloat16 is interpreted on float32 copies of the operands: the bands, the poison and the addresses checked are those of
these copies. What PyTorch itself computes for the kernels, an odd "same" padding for one, is copied the same way. That
such an operand is not written into is not checked.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from kernels import interpreter, runtime
from kernels.addresses import Addresses, compact

BAND = 64
"""Elements of poison on each side."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POISON = {
    torch.float64: 0x7FFE_5A5A_5A5A_5A5A,
    torch.float32: 0x7FE5_0000,  # bfloat16's, widened
    torch.float16: 0x7E5A,
    torch.bfloat16: 0x7FE5,
    torch.uint8: 0xA5,
    torch.int32: 0x5A5A_5A5A,
}

MAY_POINT_ANYWHERE = {"bias_grad_kernel"}
"""Kernels whose masked loads may point outside their tensor: no loop of theirs is pipelined, which is what makes
asynchronous copies, and those read masked addresses."""


class Guards:
    """The buffers of one computation under guard; see `guarded`."""

    def __init__(self) -> None:
        self._given: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory, and a copy of it
        self._taken: list[tuple[str, torch.Tensor]] = []  # what for, memory
        self._storages: set[int] = set()
        self._kernel = ""
        self._spans: list[tuple[int, int]] = []  # of the launch under way: first address, end

    def place(self, tensor: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """A copy of the same strides, BAND + shift elements into a buffer of poison."""
        copy, memory = _enclosed(tensor.detach(), shift)
        self._given.append((memory, memory.clone()))
        self._storages.add(memory.data_ptr())
        return copy

    def check(self) -> None:
        """Raises AssertionError if anything was written outside a tensor or into an operand, or was never written."""
        for memory, before in self._given:
            assert torch.equal(_bits(memory), _bits(before)), "an operand, or what lies around it, was written"
        for what, memory in self._taken:
            poison = _bits(memory) == POISON[memory.dtype]
            assert poison[:BAND].all(), f"{what}: written before its first element"
            assert poison[-BAND:].all(), f"{what}: written past its last element"
            assert not poison[BAND:-BAND].any(), f"{what}: {poison[BAND:-BAND].sum()} elements were never written"

    def empty(self, like: torch.Tensor, what: str) -> torch.Tensor:
        """A tensor of poison of the same strides, which are dense."""
        memory = _poisoned(like.numel() + 2 * BAND, like)
        self._hold(memory, what)
        # Not by `as_strided`: to autograd it would be a view.
        return like.new_empty(0).set_(memory.untyped_storage(), BAND, like.shape, like.stride())

    def enter(self, kernel: str, args: list) -> None:
        """Encloses those of a launch's arguments that are not, in place, and takes their addresses."""
        for place, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() not in self._storages:
                args[place], memory = _enclosed(arg)
                self._hold(memory, f"{kernel}'s argument {place}")
        self._kernel = kernel
        self._spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in args if isinstance(t, torch.Tensor)]

    def check_addresses(self, verb: str, addresses: np.ndarray | Addresses, mask: np.ndarray) -> None:
        """Raises AssertionError if those that are not masked, or for loads any, do not lie in one tensor."""
        terms = addresses.terms if isinstance(addresses, Addresses) else (compact(addresses),)
        terms = [term.view(np.int64) for term in terms]  # offsets may be negative; no two terms vary along one axis
        if self._inside(sum(int(term.min()) for term in terms), sum(int(term.max()) for term in terms)):
            return
        used = np.asarray(addresses)[mask.astype(bool)]
        assert not used.size or self._inside(int(used.min()), int(used.max())), f"{self._kernel} {verb} outside"
        assert verb == "writes" or self._kernel in MAY_POINT_ANYWHERE, f"{self._kernel} masks an address outside"

    def _inside(self, low: int, high: int) -> bool:
        return any(first <= low and high < end for first, end in self._spans)

    def _hold(self, memory: torch.Tensor, what: str) -> None:
        self._taken.append((what, memory))
        self._storages.add(memory.data_ptr())


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """While open, all that launchers take is guarded, and interpreted addresses are checked; then checks the rest."""
    guards = Guards()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "empty", _empty(guards, runtime.empty))
        patch.setattr(interpreter, "_execute", _execute(guards, interpreter._execute))
        patch.setattr(interpreter, "_load", _checked(guards, "reads", interpreter._load))
        patch.setattr(interpreter, "_store", _checked(guards, "writes", interpreter._store))
        yield guards
    guards.check()


def _empty(guards: Guards, empty: Callable) -> Callable:
    return lambda shape, what, **options: guards.empty(empty(shape, what, **options), what)


def _execute(guards: Guards, execute: Callable) -> Callable:
    def guarded_execute(kernel, grid, args, constants):
        guards.enter(kernel.fn.__name__, args)
        execute(kernel, grid, args, constants)

    return guarded_execute


def _checked(guards: Guards, verb: str, access: Callable) -> Callable:
    def checked(pointers, *arguments):
        mask = arguments[0 if verb == "reads" else 1]
        guards.check_addresses(verb, pointers.data, mask.data)
        return access(pointers, *arguments)

    return checked


def _poisoned(count: int, like: torch.Tensor) -> torch.Tensor:
    bits = torch.full((count,), POISON[like.dtype], dtype=BITS[like.itemsize], device=like.device)
    return bits.view(like.dtype)


def _enclosed(tensor: torch.Tensor, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(a copy of the same strides, the buffer of poison that it lies in)."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    memory = _poisoned(reach + shift + 2 * BAND, tensor)
    copy = memory.as_strided(tensor.shape, tensor.stride(), BAND + shift)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
    copy[once] = tensor[once]
    return copy, memory


def _bits(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(BITS[memory.itemsize])
