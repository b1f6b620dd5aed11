"""What a sum on a GPU takes beside its result: the buffers in which PyTorch's reduction kernel meets itself.

A sum over the outer dimensions of a tensor, as a bias gradient is in channels-last, has few results and long columns,
so its kernel cuts each column over many blocks, and every thread of every block leaves its part in a staging buffer.
On a large GPU that buffer alone is as large as a layer's activations, whatever the batch.

A model of setReduceConfig and ReduceConfig in PyTorch's aten/src/ATen/native/cuda/Reduce.cuh, for sums that keep the
dimension that is dense in memory.
"""

from dataclasses import dataclass

from bench.measure.occupancy import LANES

MOST_THREADS = 512
"""Of a block, divided by the results that a thread computes (MAX_NUM_THREADS)."""
LEAST_VALUES, MOST_VALUES = 16, 256
"""Values that a thread adds up, where blocks are numbered so (min_values_per_thread, max_values_per_thread)."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """Bytes that one sum takes and gives back; both 0 where each column is one block's."""

    staging: int
    semaphores: int


def buffers(results: int, terms: int, element: int, *, multiprocessors: int, threads: int) -> Buffers:
    """For `results` sums of `terms` values each, the results side by side in memory.

    element  bytes of what is added up in: 4, or 8 for float64
    threads  that a multiprocessor holds
    """
    if results == 0 or terms < MOST_VALUES:
        return Buffers(0, 0)
    at_once = next(count for count in (4, 2, 1) if results % count == 0)
    most = MOST_THREADS // at_once
    columns, rows = (_power_of_two(min(size, most)) for size in (results // at_once, terms))
    width = min(columns, LANES)
    height = min(rows, most // width)
    width = min(columns, most // height)
    values = -(-terms // height)
    grid = -(-results // (width * at_once))
    blocks = multiprocessors * (threads // (width * height))
    if values < MOST_VALUES or grid > blocks:
        return Buffers(0, 0)
    parts = max(min(-(-blocks // grid), -(-values // LEAST_VALUES)), -(-values // MOST_VALUES))
    if parts == 1:
        return Buffers(0, 0)
    return Buffers(element * results * parts * width * at_once, 4 * grid)


def _power_of_two(n: int) -> int:
    """The largest that is not above n."""
    return 1 << n.bit_length() - 1
