"""Tile choices: data, and the rules that pick from it.

A tile is the block of the implicit GEMM that one program computes. GPU tiles are chosen by generation and by the width
of the operands. Triton's interpreter has its own: it pays for each Python operation and for each element loaded,
whatever the block, so that few large blocks win.
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
    flat: bool = False
    """Whether a block of the filter runs over (r, s, channel) as one axis, instead of staying within one tap."""


# Half precision's matrix instructions take 16 terms at once; no block of any dtype is made smaller.
SMALLEST = 16

# Triton refuses blocks of more elements.
LARGEST_BLOCK = 2**20

# Taps that fit the bits of one integer; a larger filter is walked as one flat axis.
MOST_TAP_BITS = 62

# (first generation it serves, bytes of an operand) -> tile of forward and input gradient. tests/test_compile_ahead.py
# compiles them for SimpleNet's convolutions and fails on a spill.
PIXEL_TILES = {
    # No tensor cores under Triton before sm_80: everything is FFMA. Half precision spills at twice the depth.
    (75, 2): (Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),),
    (75, 4): (Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),),
    (75, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),),
    # 64 channels of fp16 are one 128-byte line a row: 16-byte asynchronous copies, fully coalesced.
    (80, 2): (Tile(M=128, N=64, K=64, num_warps=4, num_stages=3),),
    # As many bytes as the fp16 tile, for TF32.
    (80, 4): (Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),),
    (80, 8): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=2),),
    # The compiler holds more addresses at once for sm_120: twice the warps, half the registers' worth for each.
    (120, 2): (Tile(M=128, N=64, K=64, num_warps=8, num_stages=3),),
    (120, 4): (Tile(M=128, N=64, K=32, num_warps=8, num_stages=3),),
}

# The same for forward over few channels, where each element has a mask and an address of its own in registers: the
# shallowest blocks, and more warps to hold them.
FLAT_TILES = {
    (75, 2): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=1),),
    (75, 4): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=1),),
    (75, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),),
    (80, 2): (Tile(M=128, N=64, K=16, num_warps=8, num_stages=2),),
    (80, 4): (Tile(M=128, N=64, K=16, num_warps=8, num_stages=2),),
    (80, 8): (Tile(M=64, N=32, K=16, num_warps=4, num_stages=2),),
    (120, 4): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=2),),
}

# The same for the weight gradient, whose reduction runs over pixels: square, since both operands are loaded by pixel,
# and small, since Co x R*S*Ci has few blocks to share among the multiprocessors.
WEIGHT_TILES = {
    (75, 2): (Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),),
    (75, 4): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=1),),
    (75, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),),
    (80, 2): (Tile(M=64, N=64, K=64, num_warps=4, num_stages=3),),
    (80, 4): (Tile(M=64, N=64, K=32, num_warps=4, num_stages=3),),
    (80, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=2),),
}

# AMD's, of every operation: their shared memory (64 KiB) holds two steps of the main loop. Compiled, never run.
AMD_TILES = {
    2: (Tile(M=64, N=64, K=32, num_warps=4, num_stages=2),),
    4: (Tile(M=64, N=64, K=16, num_warps=4, num_stages=2),),
    8: (Tile(M=32, N=32, K=16, num_warps=4, num_stages=2),),
}

# IEEE fp32 has no tensor cores on any generation; the TF32 tiles would spill.
IEEE_FP32_TILES = (Tile(M=64, N=64, K=16, num_warps=8, num_stages=2),)

# The interpreter's prices, measured on one thread of a 2-core AMD EPYC (numpy 2.4, Triton 3.8). They only rank blocks.
INTERPRETED_STEP = 3e-3  # seconds of Python for one step of a main loop
INTERPRETED_LOAD = 15e-9  # seconds for an element's address, mask and load
INTERPRETER_ROWS = 8192  # more rows than this to a block, and its temporaries leave the cache


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def few_channels(geometry: ConvGeometry) -> bool:
    """Whether one tap has too few channels to fill a block, so that a block should span several taps."""
    return geometry.Ci_group < SMALLEST and geometry.R * geometry.S > 1


def choose(op: str, target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> Tile:
    """The tile that a launch takes: the first of `candidates`."""
    return candidates(op, target, geometry, dtype, precision)[0]


def candidates(
    op: str, target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str
) -> tuple[Tile, ...]:
    """Tiles that may serve "forward", "input_grad" or "weight_grad", the best guess first; one for the interpreter."""
    rule = {"forward": _forward_tiles, "input_grad": _input_grad_tiles, "weight_grad": _weight_grad_tiles}[op]
    return tuple(dict.fromkeys(rule(target, geometry, dtype, precision)))


def _forward_tiles(target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> list[Tile]:
    """Rows are output pixels, columns output channels of a group."""
    g = geometry
    flat = few_channels(g) or g.R * g.S > MOST_TAP_BITS
    terms = g.R * g.S * g.Ci_group if flat else g.Ci_group
    table = FLAT_TILES if flat else PIXEL_TILES
    found = _pixel_tiles(table, target, dtype, precision, g.N * g.P * g.Q, g.Co_group, terms)
    return [replace(tile, flat=flat) for tile in found]


def _input_grad_tiles(target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> list[Tile]:
    """Rows are input pixels of one residue class, columns input channels of a group."""
    g = geometry
    return _pixel_tiles(PIXEL_TILES, target, dtype, precision, g.residue_class_pixels, g.Ci_group, g.Co_group)


def _weight_grad_tiles(target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> list[Tile]:
    """Rows are output channels of a group, columns filter places, terms output pixels."""
    g = geometry
    places = g.R * g.S * g.Ci_group
    if target.name == INTERPRETER:
        rows = g.N * g.P * g.Q
        M = min(power_of_two(g.Co_group), 512)
        # Wide blocks load dy less often, but the last one is partly empty.
        N = min(
            (min(power_of_two(places), N) for N in (512, 256, 128, 64)),
            key=lambda N: -(-places // N) * (INTERPRETED_STEP + INTERPRETED_LOAD * rows * (N + M)),
        )
        return [Tile(M=M, N=N, K=min(power_of_two(rows), INTERPRETER_ROWS, LARGEST_BLOCK // max(M, N)), flat=True)]
    flat = few_channels(g)
    return [
        replace(tile, M=_fit(tile.M, g.Co_group), N=_fit(tile.N, places if flat else g.Ci_group), flat=flat)
        for tile in _lookup(WEIGHT_TILES, target, dtype, precision)
    ]


def depthwise_tile(target: Target, rows: int, channels: int, dtype: torch.dtype) -> Tile:
    """A depthwise kernel's tile: M pixels by N channels, whose products are added one tap at a time.

    One stage: Triton pipelines the loads of a matrix product, and there is none.
    """
    if target.name == INTERPRETER:
        N = min(power_of_two(channels), 256)
        return Tile(M=min(power_of_two(rows), INTERPRETER_ROWS, LARGEST_BLOCK // N), N=N, K=1)
    # A line of 128 bytes of channels, and eight sums to a thread: at sixteen it held 150 registers, too many for the
    # several blocks on a multiprocessor that hide each other's loads.
    N = min(power_of_two(channels), 128 // dtype.itemsize)
    num_warps = 4 if dtype == torch.float64 else 8
    return Tile(M=8 * 32 * num_warps // N, N=N, K=1, num_warps=num_warps, num_stages=1)


def splits(target: Target, *, programs: int, steps: int) -> int:
    """Parts that a weight gradient's reduction is cut into: enough programs for two waves, at least 4 steps each.

    A function of shape and device alone, so that sums are added in the same order in every run.
    """
    if target.name == INTERPRETER:
        return 1
    wanted = -(-2 * target.multiprocessors // programs)
    return max(1, min(wanted, steps // 4))


def _pixel_tiles(
    table: dict, target: Target, dtype: torch.dtype, precision: str, rows: int, columns: int, terms: int
) -> list[Tile]:
    if target.name == INTERPRETER:
        # The block that wastes least on the last step; among equals the largest.
        K = min((256, 128, 64), key=lambda K: -(-terms // K) * K) if terms > 32 else power_of_two(terms)
        N = min(power_of_two(columns), 256)
        M = min(power_of_two(rows), INTERPRETER_ROWS, LARGEST_BLOCK // max(N, K))
        return [Tile(M=M, N=N, K=K)]
    return [
        replace(tile, N=_fit(tile.N, columns), K=_fit(tile.K, terms))
        for tile in _lookup(table, target, dtype, precision)
    ]


def _lookup(table: dict, target: Target, dtype: torch.dtype, precision: str) -> tuple[Tile, ...]:
    if target.name.startswith("gfx"):
        return AMD_TILES[dtype.itemsize]
    generation = int(target.name.removeprefix("sm_"))
    if generation >= 80 and dtype == torch.float32 and precision == "ieee":
        return IEEE_FP32_TILES
    served = [first for first, size in table if first <= generation and size == dtype.itemsize]
    return table[max(served), dtype.itemsize]


def _fit(block: int, extent: int) -> int:
    """The largest power of two up to `block` that divides the extent, if it is not too small: a block without a
    remainder needs no mask, and a masked one loses its 16-byte loads."""
    divisor = min(block, extent & -extent)
    return divisor if divisor >= SMALLEST else max(SMALLEST, min(block, power_of_two(extent)))
