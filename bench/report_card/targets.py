"""What a row of the card is held to, with the reason beside each figure; `judge` says which of it a row misses.

Overheads are set by what other convolutions in Triton have at the same shapes (fp16, N = 256, 3x3 of 64 channels),
compiled by the same Triton: Inductor's template and FlagGems', and a plain matrix product as the practical limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.report_card.card import DTYPES, OPERATIONS, Row
from kernels.runtime import MULTIPROCESSORS

HALF = ("fp16", "bf16")
ON_TENSOR_CORES = (*HALF, "tf32")
VECTOR = 16
"""Bytes of the widest load of a thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The most overhead of rows of one kind: those of stride 1 whose channels are all at least `channels`."""

    ops: tuple[str, ...]
    arch: str
    dtypes: tuple[str, ...]
    channels: int
    most: float
    per: str = "overhead"
    """The figure of the row: "overhead" (for 1,000 multiply-adds of a warp) or "others_per_fma"."""
    reason: str


PIXELS = ("forward", "input_grad")

# Of several that a row falls under, the one with the most channels holds. Layers with a stride, with fewer than 64
# channels, with groups, and those whose loop is unrolled have none: they are reported.
TARGETS = (
    Target(
        ops=PIXELS, arch="sm_80", dtypes=HALF, channels=64, most=1.25,
        reason="Inductor's forward has 1.46; a plain GEMM of this 64-wide tile 0.93, and a halo costs its tests",
    ),
    Target(
        ops=PIXELS, arch="sm_80", dtypes=HALF, channels=128, most=0.90,
        reason="a tile of 128 columns spreads the same addresses over twice the products",
    ),
    Target(
        ops=PIXELS, arch="sm_90", dtypes=HALF, channels=64, most=1.30,
        reason="Inductor's forward has 1.43, a plain GEMM 0.97",
    ),
    Target(ops=PIXELS, arch="sm_90", dtypes=HALF, channels=128, most=0.95, reason="as on sm_80"),
    *(
        Target(
            ops=("weight_grad",), arch=arch, dtypes=HALF, channels=channels, most=most,
            reason="both operands are found pixel by pixel, in each step anew; Inductor's has 10 others an HMMA",
        )
        for arch in ("sm_80", "sm_90")
        for channels, most in ((64, 1.6), (128, 1.3))
    ),
    Target(
        ops=OPERATIONS, arch="sm_75", dtypes=("fp32",), channels=64, most=0.14, per="others_per_fma",
        reason="Inductor's forward has 0.14, FlagGems' 0.19 to 0.29",
    ),
)  # fmt: skip

# (check, op, dtype, arch) -> why rows of it are let off; "*" is any.
EXCEPTIONS = {
    ("loads", "input_grad", "tf32", "*"): (
        "TF32's tensor cores take both operands with the reduction side by side, and the weight lies the other way: "
        "hardware turns only 16-bit elements (ldmatrix.trans, wgmma's major-ness), so it is copied 4 bytes at a time"
    ),
    ("loads", "weight_grad", "tf32", "*"): "the same, of both operands",
}


def judge(row: Row) -> list[str]:
    """What the row misses of its targets, each in a few words; nothing where it is good."""
    return [words for check, words in _misses(row) if exception(check, row) is None]


def exception(check: str, row: Row) -> str | None:
    """Why the row is let off a check, or None where it is not."""
    kinds = ((check, op, dtype, arch) for op in (row.op, "*") for dtype in (row.dtype, "*") for arch in (row.arch, "*"))
    return next((EXCEPTIONS[kind] for kind in kinds if kind in EXCEPTIONS), None)


def _misses(row: Row) -> Iterator[tuple[str, str]]:
    """(check, words) of what the row misses, exceptions or no."""
    if row.spills:
        where = "" if row.mix.get("spill") else ", outside the main loop"
        yield "spills", f"{row.spills} spill instructions{where}"
    if not row.blocks:
        yield "fits", f"does not fit on a multiprocessor: {row.occupancy_limit}"
    if needs_tensor_cores(row) and not row.tensor_core_instructions:
        yield "tensor cores", "no tensor cores"
    if may_load_vectors(row) and not row.tensor_copies:
        # An unrolled kernel's own narrow loads, of the bias for example, stand among its main loop's.
        narrow = [width for width in row.global_loads if width < VECTOR and not row.unrolled]
        if narrow or VECTOR not in row.global_loads:
            yield "loads", f"global loads of {min(row.global_loads, default=0)} bytes"
    if row.op == "weight_grad" and row.programs < MULTIPROCESSORS[row.arch]:
        yield "wave", f"{row.programs} programs for {MULTIPROCESSORS[row.arch]} multiprocessors"
    target = target_of(row)
    figure = target and getattr(row, target.per)
    if figure is not None and figure > target.most:
        yield "overhead", f"overhead {figure:.2f} > {target.most:.2f}"


def needs_tensor_cores(row: Row) -> bool:
    """sm_75's are left to FMA units by Triton; a depthwise convolution has no matrix product."""
    return row.dtype in ON_TENSOR_CORES and row.arch != "sm_75" and not row.depthwise


def may_load_vectors(row: Row) -> bool:
    """Whether the channels of both operands are whole vectors."""
    elements = VECTOR // DTYPES[row.dtype][0].itemsize
    return not row.depthwise and all(count % elements == 0 for count in row.channels)


def target_of(row: Row) -> Target | None:
    """The overhead that the row is held to, if it is to any."""
    if row.unrolled or row.groups > 1 or max(row.stride) > 1:
        return None
    found = [
        target
        for target in TARGETS
        if row.op in target.ops
        and row.arch == target.arch
        and row.dtype in target.dtypes
        and min(row.channels) >= target.channels
    ]
    return max(found, key=lambda target: target.channels, default=None)
