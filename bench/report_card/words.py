"""Figures of a row as the few characters of a table's cell. What is not known is "?", and said to be so below it."""

from bench.measure.bound import DRAM, ISSUE, SHARED
from bench.measure.gpus import FMA, TENSOR
from bench.report_card.card import Row

UNKNOWN = "?"
SHORT = {
    "registers": "regs", "shared memory": "smem", "warps": "warps", "blocks": "blocks", "tensor memory": "tmem",
    SHARED: "smem", DRAM: "DRAM", ISSUE: "issue", TENSOR: "tensor", FMA: "FMA",
}  # fmt: skip


def shape(row: Row) -> str:
    """As "3x3/2 64>128 32": filter, stride, channels, rows of the input; what is unusual after it."""
    (_, Ci, H, W), (Co, _, R, S) = row.x_shape, row.w_shape
    told = f"{R}x{S}{stride(row.stride)} {Ci}>{Co} {H}"
    told += f"x{W}" if W != H else ""
    usual = tuple(d * (taps - 1) // 2 for d, taps in zip(row.dilation, (R, S), strict=True))
    told += f" p{pair(row.padding)}" if tuple(row.padding) != usual else ""
    told += f" d{pair(row.dilation)}" if max(row.dilation) > 1 else ""
    return told + (f" g{row.groups}" if row.groups > 1 else "")


def stride(both: tuple[int, int]) -> str:
    return "" if max(both) == 1 else f"/{pair(both)}"


def pair(both: tuple[int, int]) -> str:
    return "x".join(map(str, dict.fromkeys(both)))


def tile(row: Row) -> str:
    return "x".join(map(str, row.tile))


def loads(row: Row) -> str:
    """Bytes of a thread's global loads, widest first; "a" for asynchronous copies, "TMA" for the tensor copy engine."""
    widths = "+".join(str(width) for width in sorted(map(int, row.global_loads), reverse=True))
    if row.tensor_copies:
        return f"{widths} TMA".strip()
    return (widths or "-") + ("a" if row.asynchronous else "")


def overhead(row: Row) -> str:
    """For 1,000 multiply-adds; "u" where the loop was unrolled and the whole kernel stands in."""
    if row.overhead is None:
        return UNKNOWN
    return f"{row.overhead:.2f}" + ("u" if row.unrolled else "")


def per_fma(row: Row) -> str:
    return "-" if row.others_per_fma is None else f"{row.others_per_fma:.3f}"


def microseconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds * 1e6:,.1f}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def by(row: Row) -> str:
    return SHORT.get(row.bound_by, row.bound_by.split(":")[0])


def occupancy(row: Row) -> str:
    return f"{row.occupancy:.0%} {SHORT[row.occupancy_limit]}"


def bytes_by_least(row: Row) -> str:
    """What all loads and stores ask for, by the compulsory bytes."""
    return f"{row.bytes_requested / row.compulsory_bytes:.1f}" if row.counted else UNKNOWN


def whole(figure: int | None) -> str:
    return UNKNOWN if figure is None else f"{figure:,}"


def decimals(figure: float | None, digits: int = 2) -> str:
    return UNKNOWN if figure is None else f"{figure:.{digits}f}"
