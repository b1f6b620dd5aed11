"""A kernel executed by Triton's interpreter, on CPU tensors.

Executed as Triton does, but for three things: loads and stores are NumPy's, on the tensors themselves instead of
copies, row by row where a row's elements lie side by side; a block that repeats one value, or one row, is not written
out; and bfloat16 is computed in float32 and rounded at the end.
"""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from threadpoolctl import ThreadpoolController
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, TensorHandle

from kernels.addresses import Addresses, compact, separable, span, windows


class _InPlace(GridExecutor):
    """Interprets on CPU tensors as they are.

    Triton's own takes what it is given for a device's, and makes host tensors of it by functions that refer to
    themselves: so it keeps every argument's memory until Python next looks for cycles.
    """

    def _init_args_hst(self, args_dev: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args_dev, kwargs

    def _restore_args_dev(self, *_: object) -> None:
        pass


def interpret(
    kernel: InterpretedFunction, grid: tuple[int, int], args: tuple, output: torch.Tensor, constants: dict
) -> None:
    """Runs every program of `grid`, one after the other; `output` is the one of `args` that the kernel writes.

    Patches `triton.language` meanwhile: the caller keeps other threads out.
    """
    # Triton's interpreter rounds to bfloat16 wrongly where a mantissa overflows (1.999 becomes 1.0) and multiplies
    # bfloat16 bit patterns as integers, so such kernels run on float32 copies: products of bfloat16 values are exact
    # there, and sums are float32 on a GPU too.
    wide = [arg.float() if _is_bfloat16(arg) else arg for arg in args]
    _with_room(partial(_execute, kernel, grid, wide, constants))
    if _is_bfloat16(output):
        output.copy_(next(copy for arg, copy in zip(args, wide, strict=True) if arg is output))


_UNUSED = ", ".join(f"unused{i}=None" for i in range(33 * 1024 // 8))
_with_room = eval(f"lambda call, {_UNUSED}: call()")
"""Calls `call`, from a frame so large that all below it share one block of memory.

CPython keeps frames in blocks of 16 KiB, and asks the system for another at each call that leaves the last: a kernel
whose calls happened to cross there took twice its time, according to how deep its caller was (Python 3.11). This frame
has arguments for 33 KiB, so it takes a block of 64 KiB, and leaves almost half of it.
"""


def _execute(kernel: InterpretedFunction, grid: tuple[int, int], args: list, constants: dict) -> None:
    builder = triton_interpreter.interpreter_builder
    with np.errstate(all="ignore"), _blas().limit(limits=1, user_api="blas"):
        usual = dict(vars(builder))
        # Overflow checks make every integer operation ten; a compiled kernel has none either.
        builder.options = replace(builder.options, sanitize_overflow=False)
        # Triton's own pair copies one element at a time, which was half of a training step's time.
        builder.create_masked_load, builder.create_masked_store = _load, _store
        builder.create_load, builder.create_store = _load_all, _store_all
        builder.create_addptr, builder.create_broadcast, builder.create_splat = _add, _broadcast, _splat
        try:
            executor = _InPlace(kernel.rewrite(), kernel.arg_names, grid)
            executor(*args, **constants)
        finally:
            vars(builder).clear()
            vars(builder).update(usual)


def _add(pointers: TensorHandle, offsets: TensorHandle) -> TensorHandle:
    """Pointers to elements so many further on."""
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    in_bytes = compact(offsets.data).astype(np.uint64) * np.uint64(itemsize)
    in_bytes = np.broadcast_to(in_bytes, offsets.data.shape)
    return TensorHandle(Addresses.of(pointers.data).plus(in_bytes), pointers.dtype)


def _broadcast(argument: TensorHandle, shape: tuple[int, ...]) -> TensorHandle:
    if isinstance(argument.data, Addresses):
        return TensorHandle(argument.data.broadcast(shape), argument.dtype.scalar)
    return TensorHandle(np.broadcast_to(argument.data, shape), argument.dtype.scalar)


def _splat(type_: tl.block_type, argument: TensorHandle) -> TensorHandle:
    """A block of one value."""
    return _broadcast(TensorHandle(np.asarray(argument.data).reshape(-1)[:1], argument.dtype), type_.shape)


def _load_all(pointers: TensorHandle, *_: object) -> TensorHandle:
    return _load(pointers, TensorHandle(np.broadcast_to(True, pointers.data.shape), tl.int1), None)


def _store_all(pointers: TensorHandle, value: TensorHandle, *_: object) -> None:
    _store(pointers, value, TensorHandle(np.broadcast_to(True, pointers.data.shape), tl.int1))


def _load(pointers: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *_: object) -> TensorHandle:
    """A block's elements; masked ones are never read, and are `other`, or 0."""
    element = pointers.get_element_ty()
    dtype = triton_interpreter._get_np_dtype(element)
    valid = mask.data.astype(bool, copy=False)
    rows = _load_runs(pointers.data, valid, other, dtype)
    if rows is not None:
        return TensorHandle(rows, element)
    addresses = np.asarray(pointers.data)
    filler = np.zeros((), dtype) if other is None else other.data
    if valid.all():
        return TensorHandle(_gather(addresses, dtype), element)
    if not valid.any():
        return TensorHandle(np.broadcast_to(filler, addresses.shape), element)
    readable = np.where(valid, addresses, addresses.flat[valid.argmax()])
    return TensorHandle(np.where(valid, _gather(readable, dtype), filler), element)


def _store(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *_: object) -> None:
    """Writes a block's unmasked elements."""
    values, valid = value.data, mask.data.astype(bool, copy=False)
    if _store_runs(pointers.data, values, valid):
        return
    addresses = np.asarray(pointers.data)
    if not valid.all():
        addresses, values = addresses[valid], np.broadcast_to(values, valid.shape)[valid]
    if addresses.size:
        memory, places = _memory(addresses, values.dtype)
        memory[places] = values


def _load_runs(
    addresses: Addresses | np.ndarray, valid: np.ndarray, other: TensorHandle | None, dtype: np.dtype
) -> np.ndarray | None:
    """A block whose rows, or columns, are runs of memory; None for any other."""
    runs = addresses.runs(dtype.itemsize) if isinstance(addresses, Addresses) else None
    passing = separable(valid, runs[0]) if runs else None
    filler = np.zeros(1, dtype) if other is None else compact(other.data)
    if passing is None or (filler != filler.flat[0]).any():  # a constant that was cast is written out
        return None
    axis, starts = runs
    across, length = passing
    memory, places = windows(starts[across], length, dtype)
    if length == addresses.shape[axis] and across.all():
        rows = memory[places]
    else:
        rows = np.full((len(starts), addresses.shape[axis]), filler.flat[0], dtype)
        rows[across, :length] = memory[places]
    return rows if axis == 1 else rows.T


def _store_runs(addresses: Addresses | np.ndarray, values: np.ndarray, valid: np.ndarray) -> bool:
    """Writes a block whose rows, or columns, are runs of memory; False if it is not of that kind."""
    runs = addresses.runs(values.dtype.itemsize) if isinstance(addresses, Addresses) else None
    passing = separable(valid, runs[0]) if runs else None
    if passing is None:
        return False
    axis, starts = runs
    across, length = passing
    memory, places = windows(starts[across], length, values.dtype)
    values = np.broadcast_to(values, addresses.shape)
    memory[places] = (values if axis == 1 else values.T)[across, :length]
    return True


def _gather(addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
    memory, places = _memory(addresses, dtype)
    return memory.take(places)


def _memory(addresses: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The memory from the lowest to the highest address as one array, and each address's place in it."""
    first, last = int(addresses.min()), int(addresses.max())
    places = (addresses - np.uint64(first)).view(np.int64) >> (dtype.itemsize.bit_length() - 1)
    return span(first, last, dtype), places


@cache
def _blas() -> ThreadpoolController:
    """The matrix library under NumPy, which multiplies interpreted blocks.

    One thread of it: between two products its others wait by spinning, and take the core that the interpreter needs.
    """
    return ThreadpoolController()


def _is_bfloat16(arg: object) -> bool:
    return isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16
