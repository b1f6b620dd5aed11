"""What a launch executes and asks for, against what the convolution needs: from its geometry, tile and grid.

    (work, *others) = work_of("forward", geometry, torch.float16, launches)
    work.multiply_adds / useful_multiply_adds(geometry)      # > 1: blocks that stick out, and the halo
    work.bytes_requested / compulsory_bytes(...)             # > 1: what caches are there for

Multiply-adds executed are those of whole blocks: rows, columns and terms past the last are multiplied too, as zeros.
Useful ones multiply two elements that exist, so the halo's are not among them; they are the same for the three
operations. Bytes requested are those of every tile load of every step of every program, masked lanes included, of every
store, and of the split-K workspace both ways. Compulsory bytes are each element of an operand that is used, once, and
the result, once.

Counted where a kernel's tile does not say by how much it exceeds a minimum: the minimum, so that a time computed from
it stays a lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch

from kernels.geometry import ConvGeometry
from kernels.runtime import Launch

PRODUCT, DEPTHWISE, SUM, UNKNOWN = "matrix product", "depthwise", "sum of splits", "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One launch."""

    kind: str
    """PRODUCT, DEPTHWISE, SUM, or UNKNOWN, of which nothing is counted."""
    programs: int
    parts: tuple[tuple[int, int], ...] = ()
    """(programs, multiply-adds that each executes), most work first; empty where it is not known who does what."""
    multiply_adds: int = 0
    """Of all programs."""
    steps: int = 0
    """Of the main loop of the program with the most."""
    splits: int = 1
    """Programs that share one tile's reduction."""
    bytes_requested: int = 0
    compulsory: int = 0
    """Bytes of operands and result that only this launch of the operation can move. A workspace may stay in L2."""


def work_of(op: str, geometry: ConvGeometry, dtype: torch.dtype, launches: Sequence[Launch]) -> list[Work]:
    """Of each launch of an operation, in order. `launches` need `grid`, `arguments` and `kernel.metadata.name`."""
    found: list[Work] = []
    operands, result = operand_bytes(op, geometry, dtype), result_bytes(op, geometry, dtype)
    for launch in launches:
        name, programs = launch.kernel.metadata.name, prod(launch.grid)
        splits = max((work.splits for work in found), default=1)
        if name.startswith("sum_splits"):
            elements = prod(geometry.w_shape)
            read = splits * elements * accumulator_bytes(dtype)
            work = Work(
                kind=SUM, programs=programs, steps=splits, compulsory=result,
                bytes_requested=read + elements * dtype.itemsize,
            )  # fmt: skip
        elif not {"BLOCK_M", "BLOCK_N"} <= launch.arguments.keys():
            work = Work(kind=UNKNOWN, programs=programs)
        else:
            rule = _depthwise if name.startswith("depthwise") else _product
            work = rule(op, geometry, dtype, programs, launch.arguments, operands, result)
        found.append(work)
    return found


def _product(
    op: str, g: ConvGeometry, dtype: torch.dtype, programs: int, arguments: dict, operands: int, result: int
) -> Work:
    M, N, K = (arguments[f"BLOCK_{axis}"] for axis in "MNK")
    # Whether a block of the filter spans several taps; kernels that do not say are taken to waste nothing on it.
    flat = arguments.get("FLAT", g.Ci_group % K != 0 and op == "forward")
    splits = 1
    if op == "forward":
        steps = _up(g.R * g.S * g.Ci_group, K) if flat else g.R * g.S * _up(g.Ci_group, K)
        tiles = _up(g.N * g.P * g.Q, M) * _up(g.Co_group, N) * g.groups
        shares = [(tiles, steps)]
    elif op == "input_grad":
        tiles = _up(g.residue_class_pixels, M) * _up(g.Ci_group, N) * g.groups
        shares = [(tiles, taps * _up(g.Co_group, K)) for taps in class_taps(g)]
    else:
        places = _up(g.R * g.S * g.Ci_group, N) if flat else g.R * g.S * _up(g.Ci_group, N)
        tiles = _up(g.Co_group, M) * places * g.groups
        splits = max(1, programs // tiles)
        shares = [(tiles * splits, _up(_up(g.N * g.P * g.Q, K), splits))]
    total_steps = sum(count * steps for count, steps in shares)
    known = programs == sum(count for count, _ in shares)
    stored = accumulator_bytes(dtype) if splits > 1 else dtype.itemsize
    tiles_stored = sum(count for count, _ in shares)
    return Work(
        kind=PRODUCT,
        programs=programs,
        parts=tuple((count, steps * M * N * K) for count, steps in sorted(shares, key=lambda share: -share[1]))
        if known
        else (),
        multiply_adds=total_steps * M * N * K,
        steps=max(steps for _, steps in shares),
        splits=splits,
        bytes_requested=total_steps * (M + N) * K * dtype.itemsize
        + tiles_stored * (M * N * stored + N * dtype.itemsize * (op == "forward")),
        compulsory=operands + (result if splits == 1 else 0),
    )


def _depthwise(
    op: str, g: ConvGeometry, dtype: torch.dtype, programs: int, arguments: dict, operands: int, result: int
) -> Work:
    M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
    splits = 1
    if op == "forward":
        tiles, steps, loaded, stored = _up(g.N * g.P * g.Q, M) * _up(g.Co, N), g.R * g.S, M * N + N, M * N
    elif op == "input_grad":
        step_r, step_s = g.SH // gcd(g.SH, g.DH), g.SW // gcd(g.SW, g.DW)
        tiles = _up(g.N * g.H * g.W, M) * _up(g.Ci, N)
        steps = _up(g.R, step_r) * _up(g.S, step_s) * (g.Co // g.Ci)
        # Where the stride makes classes, each pixel of the block has a tap of its own.
        loaded, stored = M * N + (N if step_r == step_s == 1 else M * N), M * N
    else:
        tiles = _up(g.Co, N) * g.R * g.S
        splits = max(1, programs // tiles)
        steps, loaded, stored = _up(_up(g.N * g.P * g.Q, M), splits), 2 * M * N, N
    count = tiles * splits
    width = accumulator_bytes(dtype) if splits > 1 else dtype.itemsize
    return Work(
        kind=DEPTHWISE,
        programs=programs,
        parts=((count, steps * M * N),) if programs == count else (),
        multiply_adds=count * steps * M * N,
        steps=steps,
        splits=splits,
        bytes_requested=count * (steps * loaded * dtype.itemsize + stored * width),
        compulsory=operands + (result if splits == 1 else 0),
    )


def class_taps(g: ConvGeometry) -> list[int]:
    """Taps of each residue class of input pixels: see kernels/input_grad.py. One class, all taps, for stride 1."""

    def along(extent: int, stride: int, padding: int, dilation: int, taps: int) -> list[int]:
        return [
            sum((residue + padding - tap * dilation) % stride == 0 for tap in range(taps))
            for residue in range(min(stride, extent))
        ]

    rows = along(g.H, g.SH, g.PH, g.DH, g.R)
    columns = along(g.W, g.SW, g.PW, g.DW, g.S)
    return [r * s for r in rows for s in columns]


def useful_multiply_adds(g: ConvGeometry) -> int:
    """Products of an element of x, or dx, with one of w: those with the halo's zeros are not among them."""
    rows = _pairs(g.P, g.SH, g.PH, g.DH, g.R, g.H)
    columns = _pairs(g.Q, g.SW, g.PW, g.DW, g.S, g.W)
    return g.N * len(rows) * len(columns) * g.Co * g.Ci_group


def zero_insertion_multiply_adds(g: ConvGeometry) -> int:
    """Of an input gradient computed as a convolution of stride 1 over an output gradient with zeros put in between."""
    return prod(g.x_shape) * g.R * g.S * g.Co_group


def compulsory_bytes(op: str, g: ConvGeometry, dtype: torch.dtype) -> int:
    """Each element of an operand that is used once, and the result once."""
    return operand_bytes(op, g, dtype) + result_bytes(op, g, dtype)


def operand_bytes(op: str, g: ConvGeometry, dtype: torch.dtype) -> int:
    rows = _pairs(g.P, g.SH, g.PH, g.DH, g.R, g.H)
    columns = _pairs(g.Q, g.SW, g.PW, g.DW, g.S, g.W)
    # A 1x1 filter of stride 2 reads every fourth pixel alone; padding may be wider than the filter.
    pixels_x = len({h for h, _, _ in rows}) * len({w for w, _, _ in columns})
    pixels_y = len({p for _, p, _ in rows}) * len({q for _, q, _ in columns})
    taps = len({r for _, _, r in rows}) * len({s for _, _, s in columns})
    x, y, w = g.N * g.Ci * pixels_x, g.N * g.Co * pixels_y, g.Co * g.Ci_group * taps
    bias = g.Co if op == "forward" else 0
    return dtype.itemsize * ({"forward": x + w, "input_grad": y + w, "weight_grad": x + y}[op] + bias)


def result_bytes(op: str, g: ConvGeometry, dtype: torch.dtype) -> int:
    return dtype.itemsize * prod({"forward": g.y_shape, "input_grad": g.x_shape, "weight_grad": g.w_shape}[op])


def accumulator_bytes(dtype: torch.dtype) -> int:
    return max(4, dtype.itemsize)


def _pairs(
    outputs: int, stride: int, padding: int, dilation: int, taps: int, inputs: int
) -> list[tuple[int, int, int]]:
    """(input row, output row, filter row) that meet inside the image; or columns."""
    return [
        (row, output, tap)
        for output in range(outputs)
        for tap in range(taps)
        if 0 <= (row := output * stride + tap * dilation - padding) < inputs
    ]


def _up(count: int, block: int) -> int:
    """Blocks that hold `count`."""
    return -(-count // block)
