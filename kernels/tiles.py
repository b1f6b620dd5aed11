"""Tile choices: data, and the rules that pick from it.

A tile is the block of the implicit GEMM that one program computes. GPU tiles are chosen by generation and by the width
of the operands. Triton's interpreter has its own: it pays for each Python operation and for each element loaded,
whatever the block, so that few large blocks win.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

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
    """Terms of the reduction that are multiplied at once."""
    num_warps: int = 4
    """Warps of 32 threads that share the block."""
    num_stages: int = 3
    """Steps of the main loop in flight at once, by asynchronous copies."""
    parts: int = 1
    """Blocks of K terms that one step multiplies one after the other. Of one tap, they share addresses and masks."""
    flat: bool = False
    """Whether a block of the filter runs over (r, s, channel) as one axis, instead of staying within one tap."""


# Half precision's matrix instructions take 16 terms at once; no block of any dtype is made smaller.
SMALLEST = 16

# Steps of the main loop that a part of a weight gradient's reduction has at least: it takes two to fill the pipeline.
LEAST_STEPS = 4

# Triton refuses blocks of more elements.
LARGEST_BLOCK = 2**20

# What fits the bits of one integer: taps of a filter (a larger one is walked as one flat axis), patches of an image.
MOST_BITS = 62

# The tables: (first generation they serve, bytes of an operand) -> tiles, the better one first where the cost below is
# equal. tests/test_gate.py compiles what they give for SimpleNet, CustomNet and ResNet18, and fails on a spill.

# Of forward and input gradient.
PIXEL_TILES = {
    # No tensor cores under Triton before sm_80: everything is FFMA, 64 sums to a thread and more. Half precision is
    # widened in registers, and spills with more sums or at twice the depth.
    (75, 2): (
        Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),
        Tile(M=64, N=32, K=16, num_warps=2, num_stages=1),  # four warps would load 8 bytes a thread
    ),
    # Two warps on the smallest, for 64 sums to a thread: with 32, a quarter of the loop is loads.
    (75, 4): (
        Tile(M=64, N=128, K=16, num_warps=4, num_stages=1),
        Tile(M=128, N=64, K=16, num_warps=4, num_stages=1),
        Tile(M=64, N=64, K=16, num_warps=2, num_stages=1),
    ),
    (75, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),),
    # 64 channels of fp16 are one 128-byte line a row. Parts: Triton prefetches from shared memory into registers on
    # these generations, and copies every one of them once more, unless a step holds several products. It then gives
    # each warp whole rows of the block, so that more warps would read the columns more often: 32 rows to a warp.
    # Thinner parts, of one matrix instruction's depth, hold fewer registers.
    (80, 2): (
        Tile(M=128, N=128, K=16, parts=2, num_warps=4, num_stages=4),
        Tile(M=128, N=64, K=16, parts=4, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=16, parts=4, num_warps=2, num_stages=3),
        Tile(M=128, N=32, K=16, parts=4, num_warps=2, num_stages=3),  # four warps would load 8 bytes a thread
    ),
    # As many bytes as the fp16 tiles, for TF32.
    (80, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=128, N=64, K=16, parts=2, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=16, parts=2, num_warps=2, num_stages=3),
    ),
    (80, 8): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=2),),
    # Two parts of 64 columns spill there; tensor cores are the limit either way.
    (86, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=16, parts=2, num_warps=2, num_stages=3),
    ),
    (90, 2): (
        Tile(M=128, N=128, K=64, num_warps=8, num_stages=3),
        Tile(M=64, N=128, K=64, num_warps=4, num_stages=4),
        Tile(M=128, N=64, K=64, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=64, num_warps=4, num_stages=4),
    ),
    (90, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=32, num_warps=4, num_stages=4),
    ),
    # Matrix instructions of 128 rows, whose sums lie in a memory of their own.
    (100, 2): (
        Tile(M=128, N=128, K=64, num_warps=4, num_stages=3),
        Tile(M=128, N=64, K=64, num_warps=4, num_stages=3),
    ),
    (100, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),
        Tile(M=128, N=32, K=32, num_warps=8, num_stages=3),  # four warps spill
    ),
    # 99 KiB of shared memory, and no prefetching.
    (120, 2): (
        Tile(M=128, N=128, K=64, num_warps=8, num_stages=3),
        Tile(M=128, N=64, K=32, parts=2, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=32, parts=2, num_warps=4, num_stages=3),
    ),
    (120, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=32, num_warps=4, num_stages=3),
    ),
}

# Of forward over few channels, where each element has a mask and an address of its own in registers: the shallowest
# blocks, and more warps to hold them.
FLAT_TILES = {
    (75, 2): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=1),),
    (75, 4): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=1),),
    (75, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),),
    (80, 2): (Tile(M=128, N=64, K=16, num_warps=8, num_stages=2),),
    (80, 4): (Tile(M=128, N=64, K=16, num_warps=8, num_stages=2),),
    (80, 8): (Tile(M=64, N=32, K=16, num_warps=4, num_stages=2),),
    (120, 4): (Tile(M=64, N=64, K=16, num_warps=8, num_stages=2),),
}

# Of the weight gradient, whose reduction runs over pixels.
WEIGHT_TILES = {
    (75, 2): (
        Tile(M=64, N=64, K=16, num_warps=4, num_stages=1),
        Tile(M=64, N=32, K=16, num_warps=2, num_stages=1),
        Tile(M=32, N=64, K=16, num_warps=2, num_stages=1),
        Tile(M=32, N=32, K=16, num_warps=1, num_stages=1),
    ),
    (75, 4): (
        Tile(M=128, N=64, K=16, num_warps=4, num_stages=1),
        Tile(M=64, N=64, K=32, num_warps=2, num_stages=1),
    ),
    (75, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=1),),
    (80, 2): (
        Tile(M=128, N=128, K=64, num_warps=8, num_stages=3),
        Tile(M=64, N=64, K=64, num_warps=2, num_stages=3),  # 64 x 32 sums to a warp: fewer shared loads
    ),
    (80, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=64, N=64, K=32, num_warps=2, num_stages=3),
    ),
    (80, 8): (Tile(M=32, N=32, K=16, num_warps=4, num_stages=2),),
    # On an H100, 3x3 of 128 channels took 43 us by the first, and 48 with twice the warps; of 64, 59 us by the last but
    # one, and 73 by the last, though its loop has fewer other instructions.
    (90, 2): (
        Tile(M=128, N=128, K=64, num_warps=4, num_stages=3),
        Tile(M=128, N=64, K=64, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=64, num_warps=4, num_stages=3),
        Tile(M=64, N=64, K=128, num_warps=4, num_stages=3),
    ),
    # Two warps: four would use the matrix instructions that take 32-bit operands only with pixels side by side, and on
    # an H100 took 688 us for 146.
    (90, 4): (
        Tile(M=128, N=64, K=32, num_warps=2, num_stages=3),
        Tile(M=64, N=64, K=32, num_warps=2, num_stages=3),
    ),
    (120, 8): (Tile(M=64, N=32, K=16, num_warps=4, num_stages=1),),  # on FMA units there; two stages spill
    (120, 2): (
        Tile(M=128, N=128, K=64, num_warps=8, num_stages=3),
        Tile(M=64, N=64, K=64, num_warps=4, num_stages=3),
    ),
    (120, 4): (
        Tile(M=128, N=128, K=32, num_warps=8, num_stages=3),
        Tile(M=64, N=64, K=32, num_warps=4, num_stages=3),
    ),
}

# AMD's, of every operation: their shared memory (64 KiB) holds two steps of the main loop. Compiled, never run.
AMD_TILES = {
    2: (Tile(M=64, N=64, K=32, num_warps=4, num_stages=2),),
    4: (Tile(M=64, N=64, K=16, num_warps=4, num_stages=2),),
    8: (Tile(M=32, N=32, K=16, num_warps=4, num_stages=2),),
}

# IEEE fp32 has no tensor cores on any generation; the TF32 tiles would spill. Two warps on 64 x 64, for 64 sums to a
# thread, but on sm_100, where they spill; 32 columns have a tile of their own, since half of a wider one spills.
IEEE_FP32_TILES = (
    Tile(M=128, N=64, K=16, num_warps=4, num_stages=2),
    Tile(M=64, N=128, K=16, num_warps=4, num_stages=3),
    Tile(M=64, N=64, K=16, num_warps=2, num_stages=3),
    Tile(M=64, N=32, K=32, num_warps=2, num_stages=2),
    Tile(M=256, N=16, K=16, num_warps=4, num_stages=2),
)
IEEE_FP32_TILES_OF_SM_100 = tuple(
    replace(tile, num_warps=4, num_stages=2) if tile.M == tile.N else tile for tile in IEEE_FP32_TILES
)
IEEE_WEIGHT_TILES = (
    Tile(M=128, N=64, K=16, num_warps=4, num_stages=2),
    Tile(M=64, N=64, K=16, num_warps=2, num_stages=3),
    Tile(M=64, N=32, K=32, num_warps=4, num_stages=3),
)

# What spills where a mask is loaded beside the operand that it masks, and what takes its place: (operation, generations
# from, and up to, tile) -> tile.
MASKED = {
    ("input_grad", 86, 90, Tile(M=128, N=64, K=32, num_warps=4, num_stages=3)):
        Tile(M=128, N=64, K=16, parts=2, num_warps=8, num_stages=3),
    ("input_grad", 120, 130, Tile(M=128, N=64, K=32, num_warps=4, num_stages=3)):
        Tile(M=128, N=64, K=16, parts=2, num_warps=8, num_stages=3),
    ("input_grad", 80, 100, Tile(M=64, N=32, K=32, num_warps=2, num_stages=2)):
        Tile(M=64, N=32, K=16, num_warps=2, num_stages=2),
    ("input_grad", 120, 130, Tile(M=64, N=32, K=32, num_warps=2, num_stages=2)):
        Tile(M=64, N=32, K=16, num_warps=2, num_stages=2),
    ("input_grad", 80, 130, Tile(M=64, N=64, K=16, num_warps=8, num_stages=2)):
        Tile(M=64, N=64, K=16, num_warps=8, num_stages=1),
    ("forward", 100, 120, Tile(M=256, N=16, K=16, num_warps=4, num_stages=2)):
        Tile(M=256, N=16, K=16, num_warps=8, num_stages=2),
    ("weight_grad", 80, 86, Tile(M=128, N=64, K=16, num_warps=4, num_stages=2)):
        Tile(M=64, N=64, K=16, num_warps=2, num_stages=3),
    ("weight_grad", 86, 90, Tile(M=128, N=64, K=16, num_warps=4, num_stages=2)):
        Tile(M=64, N=64, K=16, num_warps=2, num_stages=2),
    ("weight_grad", 100, 130, Tile(M=128, N=64, K=16, num_warps=4, num_stages=2)):
        Tile(M=64, N=64, K=16, num_warps=4, num_stages=2),
    ("input_grad", 100, 120, Tile(M=64, N=32, K=32, num_warps=2, num_stages=2)):
        Tile(M=64, N=32, K=16, num_warps=4, num_stages=2),
    ("input_grad", 120, 130, Tile(M=128, N=128, K=32, num_warps=8, num_stages=3)):
        Tile(M=128, N=128, K=16, num_warps=8, num_stages=3),
    ("input_grad", 100, 120, Tile(M=128, N=64, K=64, num_warps=4, num_stages=3)):
        Tile(M=128, N=64, K=32, num_warps=4, num_stages=3),
    ("weight_grad", 100, 130, Tile(M=32, N=64, K=64, num_warps=4, num_stages=3)):
        Tile(M=32, N=64, K=32, num_warps=4, num_stages=3),
    ("weight_grad", 80, 90, Tile(M=128, N=128, K=64, num_warps=8, num_stages=3)):
        Tile(M=64, N=64, K=64, num_warps=2, num_stages=3),
    ("weight_grad", 86, 90, Tile(M=64, N=64, K=16, num_warps=2, num_stages=3)):
        Tile(M=64, N=64, K=16, num_warps=2, num_stages=2),
}  # fmt: skip

MASK = "_masked"

# What ranks tiles for a grid, in units of one multiply-add of a block. They only rank.
LOADING = 32  # a step loads M + N elements for each M * N products: this many products' worth for each
ALONE = 0.5  # blocks' worth of time that a multiprocessor waits, for memory, however many blocks it holds

# The interpreter's prices, measured on one thread of a 2-core AMD EPYC (numpy 2.4, Triton 3.8). They only rank blocks.
INTERPRETED_STEP = 3e-3  # seconds of Python for one step of a main loop
INTERPRETED_LOAD = 15e-9  # seconds for an element's address, mask and load
INTERPRETER_ROWS = 8192  # more rows than this to a block, and its temporaries leave the cache


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def _powers_down_from(power: int) -> list[int]:
    """`power`, half of it, ... 1."""
    return [power >> bits for bits in range(power.bit_length())]


def few_channels(geometry: ConvGeometry) -> bool:
    """Whether one tap has too few channels to fill a block, so that a block should span several of a filter row."""
    return geometry.Ci_group < SMALLEST and geometry.S > 1


def takes_windows(target: Target, geometry: ConvGeometry) -> bool:
    """Whether a block spans taps by reading windows of a copy of x (few_channels.py), instead of tap by tap.

    The interpreter gains nothing from wide loads; the taps of a dilated filter row do not lie side by side.
    """
    g = geometry
    side_by_side = g.groups == g.DW == 1
    return target.name != INTERPRETER and few_channels(g) and side_by_side and g.S <= SMALLEST and g.R <= MOST_BITS


def packs_classes(target: Target, geometry: ConvGeometry) -> bool:
    """Whether the input gradient of few channels computes all residue classes at once (few_channels.py).

    One class has too few columns for a block, all together have at most a block of them. Their taps are counted from
    one pixel, which padding beyond the filter would put outside.
    """
    g = geometry
    columns = g.SH * g.SW * g.Ci
    dense = g.groups == g.DH == g.DW == 1 and g.PH < g.R and g.PW < g.S
    return target.name != INTERPRETER and few_channels(g) and dense and g.Ci < columns <= 64


def padded_channels(geometry: ConvGeometry) -> int:
    """Channels of a window's pixel: a power of two, so that one load takes a pixel; 4 are 8 bytes of fp16."""
    return max(4, power_of_two(geometry.Ci))


@lru_cache(maxsize=1024)  # of shapes; a launch must not wait for the ranking
def candidates(
    op: str, target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str
) -> tuple[Tile, ...]:
    """Tiles that may serve an operation, the best guess first; one for the interpreter.

    op is "forward", "input_grad" or "weight_grad", with `masked(op)` of them where a mask is loaded beside an operand.
    """
    op, is_masked, _ = op.partition(MASK)
    rule = {"forward": _forward_tiles, "input_grad": _input_grad_tiles, "weight_grad": _weight_grad_tiles}[op]
    found = rule(target, geometry, dtype, precision)
    return tuple(dict.fromkeys(_beside_a_mask(op, target, tile) if is_masked else tile for tile in found))


def masked(op: str, mask: torch.Tensor | None) -> str:
    """The name of the operation with this mask."""
    return op if mask is None else op + MASK


def _beside_a_mask(op: str, target: Target, tile: Tile) -> Tile:
    if target.name == INTERPRETER or target.name.startswith("gfx"):
        return tile
    generation = _generation(target)
    for (name, first, end, spilling), other in MASKED.items():
        if name == op and first <= generation < end and spilling == tile:
            return other
    return tile


def _forward_tiles(target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> list[Tile]:
    """Rows are output pixels, columns output channels of a group."""
    g = geometry
    flat = few_channels(g) or g.R * g.S > MOST_BITS
    terms = g.R * g.S * g.Ci_group if flat else g.Ci_group
    table = FLAT_TILES if flat else PIXEL_TILES
    found = _pixel_tiles(table, target, dtype, precision, g.N * g.P * g.Q, g.Co_group, terms, g.groups)
    return [replace(tile, flat=flat) for tile in found]


def _input_grad_tiles(target: Target, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> list[Tile]:
    """Rows are input pixels of one residue class, columns input channels of a group."""
    g = geometry
    rows, copies = g.residue_class_pixels, prod(g.residue_classes) * g.groups
    return _pixel_tiles(PIXEL_TILES, target, dtype, precision, rows, g.Ci_group, g.Co_group, copies)


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
    found = _lookup(WEIGHT_TILES, target, dtype, precision)
    return [
        replace(tile, flat=flat) for tile in _fitting(found, {"M": g.Co_group, "N": places if flat else g.Ci_group})
    ]


def transposes_weights(op: str, target: Target, dtype: torch.dtype, precision: str) -> bool:
    """Whether "forward" or "input_grad" reads a transposed copy of the weights: columns and reduction change places.

    FMA units want columns side by side in shared memory, where forward's lie an image's channels apart: threads that
    read neighbouring ones then meet in the same bank, and take twice as long. Matrix instructions of sm_90 and sm_100
    take 32-bit operands only with the reduction side by side, and without it each element is copied by itself.
    """
    if target.name == INTERPRETER or target.name.startswith("gfx"):
        return False
    generation = _generation(target)
    if op == "forward":
        return generation < 80 or (dtype == torch.float32 and precision == "ieee")
    return 90 <= generation < 120 and dtype == torch.float32 and precision == "tf32"


def _generation(target: Target) -> int:
    return int(target.name.removeprefix("sm_"))


def patch(tile: Tile, geometry: ConvGeometry) -> tuple[int, int]:
    """(rows, columns) of the output pixels that one step of a weight gradient reduces over.

    tile.K pixels of one image: of all shapes the one that covers it with the fewest over the edge, among equals the
    widest. Or, where that is less, the smallest that cover a whole image, of as many images as make tile.K.
    """
    g = geometry
    shapes = [(tile.K // columns, columns) for columns in _powers_down_from(tile.K)]
    rows, columns = min(shapes, key=lambda shape: -(-g.P // shape[0]) * -(-g.Q // shape[1]))
    whole = power_of_two(g.P), power_of_two(g.Q)
    return whole if whole[0] * whole[1] < tile.K else (rows, columns)


def depthwise_tile(target: Target, rows: int, channels: int, dtype: torch.dtype) -> Tile:
    """A depthwise kernel's tile: M pixels by N channels, whose products are added one tap at a time.

    One stage: Triton pipelines the loads of a matrix product, and there is none.
    """
    if target.name == INTERPRETER:
        N = min(power_of_two(channels), 256)
        return Tile(M=min(power_of_two(rows), INTERPRETER_ROWS, LARGEST_BLOCK // N), N=N, K=1)
    # A line of 128 bytes of channels, or what divides them and still is loaded 16 bytes at once; and eight sums to a
    # thread: at sixteen it held 150 registers, too many for the several blocks that hide each other's loads.
    divisor = channels & -channels
    N = min(power_of_two(channels) if divisor * dtype.itemsize < 16 else divisor, 128 // dtype.itemsize)
    num_warps = 4 if dtype == torch.float64 else 8
    return Tile(M=8 * 32 * num_warps // N, N=N, K=1, num_warps=num_warps, num_stages=1)


def passing(tile: Tile, dtype: torch.dtype) -> float:
    """Steps of the main loop that take as long as to write a block's sums for split-K, and to read them again.

    By bytes, of which those to and from memory count four times those that the caches mostly serve.
    """
    wide = 8 if dtype == torch.float64 else 4
    return 4 * 2 * tile.M * tile.N * wide / ((tile.M + tile.N) * tile.K * dtype.itemsize)


def splits(target: Target, *, programs: int, steps: int, passing: float = 4) -> int:
    """Parts that a weight gradient's reduction of so many steps is cut into, LEAST_STEPS each and more.

    Enough for a program on every multiprocessor, and then so many that the busiest one is done soonest, if a part costs
    `passing` steps besides: its sum is written, and read again. A function of shape, tile and device alone, so that
    sums are added in the same order in every run.
    """
    if target.name == INTERPRETER:
        return 1
    most = max(1, steps // LEAST_STEPS)
    least = min(most, -(-target.multiprocessors // programs))
    enough = min(most, -(-4 * target.multiprocessors // programs))

    def seconds(parts: int) -> float:
        return (_busiest(target, programs * parts) + ALONE) * (-(-steps // parts) + passing)

    return min(range(least, enough + 1), key=seconds)


def _busiest(target: Target, programs: int) -> int:
    """Programs on the multiprocessor that has most of them."""
    return -(-programs // target.multiprocessors)


def _pixel_tiles(
    table: dict, target: Target, dtype: torch.dtype, precision: str, rows: int, columns: int, terms: int, copies: int
) -> list[Tile]:
    """For `copies` products (groups, residue classes) of so many rows, columns and terms."""
    if target.name == INTERPRETER:
        # The block that wastes least on the last step; among equals the largest.
        K = min((256, 128, 64), key=lambda K: -(-terms // K) * K) if terms > 32 else power_of_two(terms)
        N = min(power_of_two(columns), 256)
        M = min(power_of_two(rows), INTERPRETER_ROWS, LARGEST_BLOCK // max(N, K))
        return [Tile(M=M, N=N, K=K)]

    def seconds(tile: Tile) -> float:
        """Of the busiest multiprocessor, in some unit."""
        programs = -(-rows // tile.M) * -(-columns // tile.N) * copies
        work = tile.M * tile.N + LOADING * (tile.M + tile.N)
        return (_busiest(target, programs) + ALONE) * work

    found = _fitting(_lookup(table, target, dtype, precision), {"N": columns})
    # Narrow tiles are for few columns.
    found = [tile for tile in found if min(SMALLEST * 4, max(tile.N for tile in found)) <= tile.N]
    return sorted((_with_depth(tile, terms) for tile in found), key=seconds)


def _fitting(found: tuple[Tile, ...], extents: dict[str, int]) -> list[Tile]:
    """Those whose blocks divide the extents {"M" or "N": columns}; if there is none, the smallest made to."""

    def size(tile: Tile) -> tuple[int, ...]:
        return tuple(getattr(tile, axis) for axis in extents)

    fitting = [tile for tile in found if all(extents[axis] % getattr(tile, axis) == 0 for axis in extents)]
    return fitting or [
        replace(tile, **{axis: _fit(getattr(tile, axis), extents[axis]) for axis in extents})
        for tile in found
        if size(tile) == min(map(size, found))
    ]


def _with_depth(tile: Tile, terms: int) -> Tile:
    """The tile with as much of its depth as divides the terms, fewer parts before thinner ones."""
    for parts in _powers_down_from(tile.parts):
        if terms % (parts * tile.K) == 0:
            return replace(tile, parts=parts)
    whole = tile.K if tile.parts == 1 else max(tile.K, 2 * SMALLEST)
    return replace(tile, K=_fit(whole, terms), parts=1)


def _lookup(table: dict, target: Target, dtype: torch.dtype, precision: str) -> tuple[Tile, ...]:
    if target.name.startswith("gfx"):
        return AMD_TILES[dtype.itemsize]
    generation = _generation(target)
    if generation >= 80 and dtype == torch.float32 and precision == "ieee":
        of_pixels = IEEE_FP32_TILES_OF_SM_100 if 100 <= generation < 120 else IEEE_FP32_TILES
        return IEEE_WEIGHT_TILES if table is WEIGHT_TILES else of_pixels
    served = [first for first, size in table if first <= generation and size == dtype.itemsize]
    return table[max(served), dtype.itemsize]


def _fit(block: int, extent: int) -> int:
    """The largest power of two up to `block` that divides the extent, if it is not too small: a block without a
    remainder needs no mask, and a masked one loses its 16-byte loads."""
    divisor = min(block, extent & -extent)
    return divisor if divisor >= SMALLEST else max(SMALLEST, min(block, power_of_two(extent)))
