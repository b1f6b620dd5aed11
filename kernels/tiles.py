"""Tile choices: data, and the rule that picks from it.

A tile is the block of the implicit GEMM that one program computes. GPU tiles are chosen by generation and by the
width of the operands; the interpreter has its own, because it pays about 40 us for each Python operation and
about 12 ns for each element loaded, whatever the block (one CPU thread of the machine the tests run on), so that few
large blocks win.
"""

from dataclasses import dataclass, replace

import torch

from kernels.geometry import ConvGeometry
from kernels.runtime import INTERPRETER, Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Block sizes of the GEMM and the launch options that go with them."""

    M: int
    """Rows of the block."""
    N: int
    """Columns of the block."""
    K: int
    """Terms of the reduction in one step of the main loop."""
    num_warps: int = 4
    """Warps of 32 threads that share the block."""
    num_stages: int = 3
    """Steps of the main loop in flight at once, by asynchronous copies."""


# tl.dot wants blocks of at least 16 on each side.
SMALLEST = 16

# Triton refuses blocks of more elements.
LARGEST_BLOCK = 2**20

# Rows of an interpreted block: enough that Python's price is spread thin, few enough that blocks stay in cache.
INTERPRETER_ROWS = 8192

# (first generation it serves, bytes of an operand) -> tile of forward and input gradient. Checked for spills by
# tests/test_compile_ahead.py.
PIXEL_TILES = {
    # No tensor cores under Triton before sm_80: everything is FFMA, and wider or deeper blocks spill.
    (75, 2): Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),
    (75, 4): Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),
    (75, 8): Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),
    # 64 channels of fp16 are one 128-byte line a row: 16-byte asynchronous copies, fully coalesced.
    (80, 2): Tile(M=128, N=64, K=64, num_warps=4, num_stages=3),
    # TF32 tiles are as many bytes as the fp16 ones.
    (80, 4): Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),
    (80, 8): Tile(M=64, N=32, K=16, num_warps=4, num_stages=2),
}

# The same for the weight gradient, whose reduction runs over pixels.
WEIGHT_TILES = {
    (75, 2): Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),
    (75, 4): Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),
    (75, 8): Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),
    (80, 2): Tile(M=64, N=64, K=64, num_warps=4, num_stages=3),
    (80, 4): Tile(M=64, N=64, K=32, num_warps=4, num_stages=3),
    (80, 8): Tile(M=32, N=32, K=16, num_warps=4, num_stages=2),
}

# IEEE fp32 has no tensor cores on any generation; sm_80's larger tile spills there as on sm_75.
IEEE_FP32_TILE = Tile(M=64, N=64, K=16, num_warps=4, num_stages=2)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def few_channels(geometry: ConvGeometry) -> bool:
    """Whether a filter row has too few channels for a step of its own, so that one step should span several taps."""
    return geometry.Ci_group < SMALLEST and geometry.R * geometry.S > 1


def pixel_tile(target: Target, dtype: torch.dtype, precision: str, *, rows: int, columns: int, terms: int) -> Tile:
    """The tile of a GEMM whose rows are pixels: `rows` x `columns`, reducing over runs of `terms` channels."""
    if target.name == INTERPRETER:
        K = min((256, 128, 64), key=lambda K: -(-terms // K) * K) if terms > 32 else power_of_two(terms)
        N = min(power_of_two(columns), 256)
        M = min(power_of_two(rows), INTERPRETER_ROWS, LARGEST_BLOCK // max(N, K))
        return Tile(M=M, N=N, K=K)
    tile = _lookup(PIXEL_TILES, target, dtype, precision)
    return replace(tile, N=_shrink(tile.N, columns), K=_shrink(tile.K, terms))


def weight_tile(target: Target, dtype: torch.dtype, precision: str, *, rows: int, columns: int, terms: int) -> Tile:
    """The tile of the weight gradient: `rows` output channels x `columns` filter places, reducing over `terms` pixels."""
    if target.name == INTERPRETER:
        M, N = min(power_of_two(rows), 512), min(power_of_two(columns), 512)
        return Tile(M=M, N=N, K=min(power_of_two(terms), INTERPRETER_ROWS, LARGEST_BLOCK // max(M, N)))
    tile = _lookup(WEIGHT_TILES, target, dtype, precision)
    return replace(tile, M=_shrink(tile.M, rows), N=_shrink(tile.N, columns))


def splits(target: Target, *, programs: int, steps: int) -> int:
    """Parts that a weight gradient's reduction is cut into: enough programs for two waves, at least 4 steps each.

    A function of shape and device alone, so that sums are added in the same order in every run.
    """
    if target.name == INTERPRETER:
        return 1
    wanted = -(-2 * target.multiprocessors // programs)
    return max(1, min(wanted, steps // 4))


def _lookup(table: dict[tuple[int, int], Tile], target: Target, dtype: torch.dtype, precision: str) -> Tile:
    generation = int(target.name.removeprefix("sm_"))
    if generation >= 80 and dtype == torch.float32 and precision == "ieee":
        return IEEE_FP32_TILE
    served = [first for first, size in table if first <= generation and size == dtype.itemsize]
    return table[max(served), dtype.itemsize]


def _shrink(block: int, extent: int) -> int:
    return max(SMALLEST, min(block, power_of_two(extent)))
