"""Addresses of a block in the interpreter, kept as the sum they were made of, so that rows are copied and not gathered.

A kernel points at a block by a row's address and a column's offset, p + rows[:, None] + columns[None, :]. Triton's
interpreter writes out every sum, an integer of 64 bits for each element, and then fetches each element by itself. Here
the terms stay apart until they are needed. Where one axis counts neighbours in memory, as channels are, a load copies
whole runs of it.
"""

from types import SimpleNamespace

import numpy as np


class Addresses:
    """A sum of arrays that broadcast to `shape`; no two vary along the same axes. Becomes an array when used as one."""

    dtype, itemsize = np.dtype(np.uint64), 8

    def __init__(self, shape: tuple[int, ...], terms: tuple[np.ndarray, ...]) -> None:
        self.shape, self.terms = shape, terms

    @classmethod
    def of(cls, data: "np.ndarray | Addresses") -> "Addresses":
        return data if isinstance(data, Addresses) else cls(data.shape, (compact(data),))

    def plus(self, offsets: np.ndarray) -> "Addresses":
        """With offsets, in bytes, of the same shape."""
        more = compact(offsets)
        terms = list(self.terms)
        for place, term in enumerate(terms):
            joint = np.broadcast_shapes(term.shape, more.shape)
            if joint in (term.shape, more.shape):  # no larger for being one
                terms[place] = term + more
                break
        else:
            terms.append(more)
        return Addresses(self.shape, tuple(terms))

    def broadcast(self, shape: tuple[int, ...]) -> "Addresses":
        return Addresses(tuple(shape), self.terms)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        total = self.terms[0]
        for term in self.terms[1:]:
            total = total + term
        return np.broadcast_to(total, self.shape)

    def runs(self, itemsize: int) -> "tuple[int, np.ndarray] | None":
        """(axis, first addresses) if the elements along one of two axes are neighbours in memory; else None.

        One address for each place on the other axis.
        """
        if len(self.shape) != 2 or len(self.terms) > 2:
            return None
        for axis in (1, 0):
            extent, across = self.shape[axis], self.shape[1 - axis]
            of_axis = [term for term in self.terms if term.shape[axis] > 1]
            if extent > 1 and len(of_axis) == 1 and of_axis[0].shape[1 - axis] == 1:
                offsets = of_axis[0].ravel()
                if (offsets[1:] - offsets[:-1] == itemsize).all():
                    others = sum(term.ravel() for term in self.terms if term is not of_axis[0])
                    return axis, np.broadcast_to(others + offsets[0], (across,))
        return None


def compact(array: np.ndarray) -> np.ndarray:
    """The array with one element along each axis that it only repeats along."""
    return array[tuple(slice(1) if stride == 0 else slice(None) for stride in array.strides)]


def span(first: int, last: int, dtype: np.dtype) -> np.ndarray:
    """The memory from one element's address to another's as an array."""
    count = (last - first) // dtype.itemsize + 1
    return np.asarray(
        SimpleNamespace(
            __array_interface__={"version": 3, "typestr": dtype.str, "shape": (count,), "data": (first, False)}
        )
    )


def windows(starts: np.ndarray, length: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(memory as overlapping rows of `length`, the row that begins at each of the addresses)."""
    first, last = int(starts.min()), int(starts.max())
    memory = span(first, last + (length - 1) * dtype.itemsize, dtype)
    rows = np.lib.stride_tricks.as_strided(
        memory, ((last - first) // dtype.itemsize + 1, length), (dtype.itemsize, dtype.itemsize)
    )
    return rows, (starts - np.uint64(first)).view(np.int64) >> (dtype.itemsize.bit_length() - 1)


def separable(mask: np.ndarray, axis: int) -> tuple[np.ndarray, int] | None:
    """(places across `axis`, how many of its first) that a mask of two axes lets through, if it is just those.

    None if it is not, or if it lets nothing through.
    """
    mask = mask.T if axis == 0 else mask
    if mask.strides[1] == 0:
        across, length = mask[:, 0], mask.shape[1]
    else:
        across, along = mask.any(axis=1), mask.any(axis=0)
        length = int(along.sum())
        if not along[:length].all() or not (mask == (across[:, None] & along)).all():
            return None
    return (across, length) if across.any() else None
