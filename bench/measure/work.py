"""What a launch executes and asks for, against what the convolution needs: from its geometry, tile and grid.

    (work, *others) = work_of("forward", geometry, torch.float16, launches)
    work.multiply_adds / useful_multiply_adds(geometry)      # > 1: blocks that stick out, and the halo
    work.bytes_requested / compulsory_bytes(...)             # > 1: what caches are there for

Multiply-adds executed are those of whole blocks: rows, columns and terms past the last are multiplied too, as zeros.
Useful ones multiply two elements that exist, so the halo's are not among them; they are the same for the three
operations, and a ReLU that is fused into one adds none. Bytes requested are those of every tile load of every step of
every program, masked lanes included, of every store, and of the split-K workspace both ways. Compulsory bytes are each
element of an operand that is used, once, and the result, once.

Counted where a kernel's tile does not say by how much it exceeds a minimum: the minimum, so that a time computed from
it stays a lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch

from kernels.geometry import ConvGeometry
from kernels.runtime import Launch
from kernels.tiles import MASK
from kernels.variants import OPERATIONS as VARIANTS

PRODUCT, DEPTHWISE, SUM, COPY, UNKNOWN = "matrix product", "depthwise", "sum of splits", "copy", "unknown"

# Which operand a kernel that only copies reads, for the product after it (kernels/few_channels.py).
COPIES = {"pad_kernel": "x", "class_filters_kernel": "w"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One launch."""

    kind: str
    """PRODUCT, DEPTHWISE, SUM, COPY, or UNKNOWN, of which nothing is counted."""
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
    left = sum(operands.values())
    for launch in launches:
        name, programs = launch.kernel.metadata.name, prod(launch.grid)
        splits = max((work.splits for work in found), default=1)
        if name.startswith("sum_splits"):
            elements = launch.arguments["ELEMENTS"]  # of the filter that was launched for: windows' is wider
            read = splits * elements * accumulator_bytes(dtype)
            work = Work(
                kind=SUM, programs=programs, steps=splits, compulsory=result,
                bytes_requested=read + elements * dtype.itemsize,
            )  # fmt: skip
        elif name in COPIES:
            read = operands[COPIES[name]]
            left -= read
            work = Work(kind=COPY, programs=programs, compulsory=read, bytes_requested=2 * read)
        elif not {"BLOCK_M", "BLOCK_N"} <= launch.arguments.keys():
            work = Work(kind=UNKNOWN, programs=programs)
        else:
            rule = _depthwise if name.startswith("depthwise") else _product
            masked = op.endswith(MASK)
            work = rule(name, geometry, dtype, programs, launch.arguments, left, result, masked=masked)
        found.append(work)
    return found


def least_work(
    op: str, geometry: ConvGeometry, dtype: torch.dtype, launches: Sequence[Launch], main: int
) -> list[Work]:
    """Of a variant's launches, of which `main` multiplies: what it executes and asks for nobody here can tell.

    So it has the useful multiply-adds and the compulsory bytes, which are no more than what it does if it multiplies
    each pair of elements once; the others have nothing.
    """
    return [
        Work(
            kind=UNKNOWN,
            programs=prod(launch.grid),
            multiply_adds=useful_multiply_adds(geometry) if index == main else 0,
            compulsory=compulsory_bytes(op, geometry, dtype) if index == main else 0,
        )
        for index, launch in enumerate(launches)
    ]


def _product(
    name: str, g: ConvGeometry, dtype: torch.dtype, programs: int, arguments: dict, operands: int, result: int,
    *, masked: bool,
) -> Work:  # fmt: skip
    M, N, K = (arguments[f"BLOCK_{axis}"] for axis in "MNK")
    loaded_rows = M * (2 if masked else 1)  # in every kernel the rows are those of dy, and the mask lies beside them
    # What the kernel multiplies, as it was told: windows and residue classes are other sizes than the layer's.
    CI, CO, R, S, groups = (arguments[size] for size in ("CI", "CO", "R", "S", "GROUPS"))
    flat = arguments.get("FLAT", False)
    splits = 1
    if name == "forward_kernel":
        steps = _up(R * S * CI, K) if flat else R * S * _up(CI, K)
        shares = [(_up(arguments["ROWS"], M) * _up(CO, N) * groups, steps)]
    elif name == "input_grad_kernel":
        tiles = _up(g.residue_class_pixels, M) * _up(CI, N) * groups
        shares = [(tiles, taps * _up(CO, K)) for taps in class_taps(g)]
    else:
        places = _up(R * S * CI, N) if flat else R * S * _up(CI, N)
        tiles = _up(CO, M) * places * groups
        splits = max(1, programs // tiles)
        blocks = _up(arguments["TERMS"], K) if flat else arguments["TERMS"]  # patches
        each = _up(blocks, splits)
        # Flat splits do all their steps, the last ones past the last pixel; the others stop at the last patch.
        full, rest = (splits, 0) if flat else divmod(blocks, each)
        shares = [(full, each), (int(rest > 0), rest), (splits - full - (rest > 0), 0)]
        shares = [(tiles * count, steps) for count, steps in shares if count]
    has_bias = name == "forward_kernel" and arguments.get("b_ptr", ...) is not None  # tensors are not told
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
        bytes_requested=total_steps * (loaded_rows + N) * K * dtype.itemsize
        + tiles_stored * (M * N * stored + N * dtype.itemsize * has_bias),
        compulsory=operands + (result if splits == 1 else 0),
    )


def _depthwise(
    name: str, g: ConvGeometry, dtype: torch.dtype, programs: int, arguments: dict, operands: int, result: int,
    *, masked: bool,
) -> Work:  # fmt: skip
    M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
    splits = 1
    if name == "depthwise_forward_kernel":
        tiles, steps, loaded, stored = _up(g.N * g.P * g.Q, M) * _up(g.Co, N), g.R * g.S, M * N + N, M * N
    elif name == "depthwise_input_grad_kernel":
        step_r, step_s = g.SH // gcd(g.SH, g.DH), g.SW // gcd(g.SW, g.DW)
        tiles = _up(g.N * g.H * g.W, M) * _up(g.Ci, N)
        steps = _up(g.R, step_r) * _up(g.S, step_s) * (g.Co // g.Ci)
        # Where the stride makes classes, each pixel of the block has a tap of its own.
        loaded, stored = M * N + (N if step_r == step_s == 1 else M * N), M * N
    else:
        tiles = _up(g.Co, N) * g.R * g.S
        splits = max(1, programs // tiles)
        steps, loaded, stored = _up(_up(g.N * g.P * g.Q, M), splits), 2 * M * N, N
    loaded += M * N if masked else 0
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
    return sum(operand_bytes(op, g, dtype).values()) + result_bytes(op, g, dtype)


def operand_bytes(op: str, g: ConvGeometry, dtype: torch.dtype) -> dict[str, int]:
    """By operand: "x", "w", "y" (the output gradient), "bias", "mask"."""
    rows = _pairs(g.P, g.SH, g.PH, g.DH, g.R, g.H)
    columns = _pairs(g.Q, g.SW, g.PW, g.DW, g.S, g.W)
    # A 1x1 filter of stride 2 reads every fourth pixel alone; padding may be wider than the filter.
    pixels_x = len({h for h, _, _ in rows}) * len({w for w, _, _ in columns})
    pixels_y = len({p for _, p, _ in rows}) * len({q for _, q, _ in columns})
    taps = len({r for _, _, r in rows}) * len({s for _, _, s in columns})
    elements = {"x": g.N * g.Ci * pixels_x, "y": g.N * g.Co * pixels_y, "w": g.Co * g.Ci_group * taps, "bias": g.Co}
    elements["mask"] = elements["y"]
    read = {"forward": ("x", "w", "bias"), "input_grad": ("y", "w"), "weight_grad": ("x", "y")}[unfused(op)]
    read += ("mask",) if op.endswith(MASK) else ()
    return {operand: elements[operand] * dtype.itemsize for operand in read}


def result_bytes(op: str, g: ConvGeometry, dtype: torch.dtype) -> int:
    shapes = {"forward": g.y_shape, "input_grad": g.x_shape, "weight_grad": g.w_shape}
    return dtype.itemsize * prod(shapes[unfused(op)])


def unfused(op: str) -> str:
    """ "forward" for "forward_relu" and for variants, "input_grad" for "input_grad_masked"."""
    return "forward" if op in VARIANTS else op.removesuffix("_relu").removesuffix(MASK)


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
