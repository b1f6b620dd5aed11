"""What a row of the card is held to, with the reason beside each figure; `judge` says which of it a row misses.

Overheads are set by what other convolutions in Triton have at the same shapes (fp16, N = 256, 3x3 of 64 channels),
compiled by the same Triton: Inductor's template and FlagGems', and a plain matrix product as the practical limit.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

from bench.measure.work import unfused
from bench.report_card.card import DTYPES, OPERATIONS, Row
from kernels.runtime import MULTIPROCESSORS
from kernels.tiles import LEAST_STEPS

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


PIXELS = ("forward", "forward_relu", "input_grad")

# Of several that a row falls under, the one with the most channels holds. Layers with a stride, with fewer than 64
# channels, with groups, and those whose loop is unrolled have none: they are reported. So are those with a mask, which
# is compared and selected by in the loop.
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
        for arch, channels, most in (("sm_80", 64, 1.6), ("sm_80", 128, 1.3), ("sm_90", 128, 1.3))
    ),
    Target(
        ops=("weight_grad",), arch="sm_90", dtypes=HALF, channels=64, most=1.65,
        reason="1.6 as on sm_80 was aimed at: 128 pixels a step have 1.30, but took an H100 73 us, and 64 pixels 59 us",
    ),
    Target(
        ops=OPERATIONS, arch="sm_75", dtypes=("fp32",), channels=64, most=0.14, per="others_per_fma",
        reason="Inductor's forward has 0.14, FlagGems' 0.19 to 0.29",
    ),
)  # fmt: skip

CHECKS = ("spills", "fits", "tensor cores", "loads", "copies", "wave", "overhead")

def judge(row: Row, checks: Collection[str] = CHECKS) -> list[str]:
    """What the row misses of its targets, each in a few words; nothing where it is good."""
    return [words for check, words in _misses(row) if check in checks]


def _misses(row: Row) -> Iterator[tuple[str, str]]:
    """(check, words) of what the row misses."""
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
    if pipelines(row) and may_load_vectors(row) and not row.copies_in_flight:
        yield "copies", "no copies in flight"
    if unfused(row.op) == "weight_grad" and row.programs < MULTIPROCESSORS[row.arch] and could_be_split(row):
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


def pipelines(row: Row) -> bool:
    """Whether its loop is to copy ahead: a branch in a loop's body, for one, ends that without a word.

    With two stages a block waits for all it copied; an unrolled loop has its loads in registers.
    """
    return row.stages > 2 and row.arch != "sm_75" and not (row.unrolled or row.depthwise or row.tensor_copies)


def could_be_split(row: Row) -> bool:
    """Whether a program reduces over enough steps for two parts.

    The last layers of ResNet have so few pixels that a full wave takes longer: 128 programs of 4 steps are done before
    172 of 3, of which some multiprocessors have two.
    """
    return row.multiply_adds >= 2 * LEAST_STEPS * row.programs * prod(row.tile)


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
