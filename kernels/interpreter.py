"""A kernel executed by Triton's interpreter, on CPU tensors.

Executed as Triton does, but for three things: loads and stores are NumPy's gather and scatter, on the tensors
themselves instead of copies, and bfloat16 is computed in float32 and rounded at the end.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import triton.runtime.interpreter as triton_interpreter
from threadpoolctl import ThreadpoolController
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, TensorHandle


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
    builder = triton_interpreter.interpreter_builder
    with np.errstate(all="ignore"), _blas().limit(limits=1, user_api="blas"):
        usual = dict(vars(builder))
        # Overflow checks make every integer operation ten; a compiled kernel has none either.
        builder.options = replace(builder.options, sanitize_overflow=False)
        # Triton's own pair copies one element at a time, which was half of a training step's time.
        builder.create_masked_load, builder.create_masked_store = _load, _store
        try:
            executor = _InPlace(kernel.rewrite(), kernel.arg_names, grid)
            executor(*wide, **constants)
        finally:
            vars(builder).clear()
            vars(builder).update(usual)
    if _is_bfloat16(output):
        output.copy_(next(copy for arg, copy in zip(args, wide, strict=True) if arg is output))


def _load(pointers: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *_: object) -> TensorHandle:
    """A block's elements, gathered by NumPy; masked ones are never read, and are `other`, or 0."""
    element = pointers.get_element_ty()
    dtype = triton_interpreter._get_np_dtype(element)
    addresses, valid = pointers.data, mask.data.astype(bool, copy=False)
    filler = np.zeros((), dtype) if other is None else other.data
    if valid.all():
        return TensorHandle(_gather(addresses, dtype), element)
    if not valid.any():
        return TensorHandle(np.broadcast_to(filler, addresses.shape), element)
    readable = np.where(valid, addresses, addresses.flat[valid.argmax()])
    return TensorHandle(np.where(valid, _gather(readable, dtype), filler), element)


def _store(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *_: object) -> None:
    """Scatters a block's unmasked elements, by NumPy."""
    addresses, values, valid = pointers.data, value.data, mask.data.astype(bool, copy=False)
    if not valid.all():
        addresses, values = addresses[valid], np.broadcast_to(values, valid.shape)[valid]
    if addresses.size:
        memory, places = _memory(addresses, values.dtype)
        memory[places] = values


def _gather(addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
    memory, places = _memory(addresses, dtype)
    return memory.take(places)


def _memory(addresses: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The memory from the lowest to the highest address as one array, and each address's place in it."""
    first, last = int(addresses.min()), int(addresses.max())
    count = (last - first) // dtype.itemsize + 1
    span = SimpleNamespace(
        __array_interface__={"version": 3, "typestr": dtype.str, "shape": (count,), "data": (first, False)}
    )
    places = (addresses - np.uint64(first)).view(np.int64) >> (dtype.itemsize.bit_length() - 1)
    return np.asarray(span), places


@cache
def _blas() -> ThreadpoolController:
    """The matrix library under NumPy, which multiplies interpreted blocks.

    One thread of it: between two products its others wait by spinning, and take the core that the interpreter needs.
    """
    return ThreadpoolController()


def _is_bfloat16(arg: object) -> bool:
    return isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16
