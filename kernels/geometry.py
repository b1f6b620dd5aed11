"""Sizes of a 2-D convolution, and every check of its arguments.

    x (N, Ci, H, W)   w (Co, Ci/groups, R, S)   y (N, Co, P, Q)
    P = (H + 2*PH - DH*(R-1) - 1) // SH + 1,   Q likewise from W, PW, DW, S, SW

Stride, padding and dilation are in pixels. Nothing here knows of a tensor's memory or of a kernel.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


def integer(value: int, name: str) -> int:
    """Anything that counts as an int (NumPy's, a one-element tensor); raises TypeError naming what does not."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"conv2d: {name} must be an int, got {value!r}") from None


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """An int, or a sequence of one or two ints, as (rows, columns).

    Raises TypeError if it is neither and RuntimeError if it has another length, as PyTorch does.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (integer(value, f"{name} (an int or a pair)"),) * 2
    if len(value) not in (1, 2):
        raise RuntimeError(f"conv2d: {name} must have one or two values, got {list(value)}")
    return integer(value[0], name), integer(value[-1], name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvGeometry:
    """One convolution's sizes; build it with `ConvGeometry.of`, which checks them."""

    N: int
    """Images in the batch."""
    Ci: int
    """Input channels of all groups together."""
    H: int
    """Input rows."""
    W: int
    """Input columns."""
    Co: int
    """Output channels of all groups together."""
    R: int
    """Filter rows."""
    S: int
    """Filter columns."""
    SH: int
    """Stride over rows."""
    SW: int
    """Stride over columns."""
    PH: int
    """Zero rows above and below the image."""
    PW: int
    """Zero columns left and right of the image."""
    DH: int
    """Dilation of filter rows."""
    DW: int
    """Dilation of filter columns."""
    groups: int
    """Independent groups that channels are split into."""

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> "ConvGeometry":
        """The geometry of conv2d(x, w, ...) for x_shape (N, Ci, H, W) and w_shape (Co, Ci/groups, R, S).

        Raises RuntimeError naming the offending values where `torch.nn.functional.conv2d` would raise one, and for no
        channels, an empty filter, or one that spans 2**31 pixels; TypeError for what is no int.
        """
        if len(x_shape) != 4 or len(w_shape) != 4:
            raise RuntimeError(
                f"conv2d: expected a 4-D input and a 4-D weight, got shapes {list(x_shape)} and {list(w_shape)}"
            )
        (N, Ci, H, W), (Co, Ci_group, R, S) = x_shape, w_shape
        SH, SW = pair(stride, "stride")
        PH, PW = pair(padding, "padding")
        DH, DW = pair(dilation, "dilation")
        groups = integer(groups, "groups")
        if groups <= 0:
            raise RuntimeError(f"conv2d: groups must be positive, got {groups}")
        if min(SH, SW) <= 0:
            raise RuntimeError(f"conv2d: stride must be positive, got {(SH, SW)}")
        if min(PH, PW) < 0:
            raise RuntimeError(f"conv2d: padding must not be negative, got {(PH, PW)}")
        if min(DH, DW) <= 0:
            raise RuntimeError(f"conv2d: dilation must be positive, got {(DH, DW)}")
        if Co < groups or Co % groups:
            raise RuntimeError(
                f"conv2d: {Co} output channels (weight {list(w_shape)}) cannot be split into {groups} groups"
            )
        if Ci != Ci_group * groups:
            raise RuntimeError(
                f"conv2d: weight {list(w_shape)} with groups={groups} expects {Ci_group * groups} input channels, "
                f"but the input {list(x_shape)} has {Ci}"
            )
        if prod(w_shape) == 0 or H == 0 or W == 0:
            raise RuntimeError(
                f"conv2d: only the batch may be empty, got input {list(x_shape)} and weight {list(w_shape)}"
            )
        # A stride beyond the padded image leaves one output pixel; capped, it fits a kernel's integers.
        SH, SW = min(SH, H + 2 * PH), min(SW, W + 2 * PW)
        geometry = cls(
            N=N, Ci=Ci, H=H, W=W, Co=Co, R=R, S=S, SH=SH, SW=SW, PH=PH, PW=PW, DH=DH, DW=DW, groups=groups
        )  # fmt: skip
        if geometry.P <= 0 or geometry.Q <= 0:
            raise RuntimeError(
                f"conv2d: the dilated filter, {DH * (R - 1) + 1} x {DW * (S - 1) + 1} pixels, is larger than the "
                f"padded input, {H + 2 * PH} x {W + 2 * PW} pixels"
            )
        if max(DH * (R - 1) * max(W, geometry.Q), DW * (S - 1)) >= 2**31:
            raise RuntimeError(f"conv2d: a {R} x {S} filter with dilation {(DH, DW)} spans 2**31 pixels or more")
        return geometry

    @property
    def P(self) -> int:
        """Output rows."""
        return (self.H + 2 * self.PH - self.DH * (self.R - 1) - 1) // self.SH + 1

    @property
    def Q(self) -> int:
        """Output columns."""
        return (self.W + 2 * self.PW - self.DW * (self.S - 1) - 1) // self.SW + 1

    @property
    def Ci_group(self) -> int:
        """Input channels of one group."""
        return self.Ci // self.groups

    @property
    def Co_group(self) -> int:
        """Output channels of one group."""
        return self.Co // self.groups

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """(N, Ci, H, W)"""
        return self.N, self.Ci, self.H, self.W

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        """(Co, Ci/groups, R, S)"""
        return self.Co, self.Ci_group, self.R, self.S

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """(N, Co, P, Q)"""
        return self.N, self.Co, self.P, self.Q

    @property
    def residue_classes(self) -> tuple[int, int]:
        """How many residue classes of input rows, and of columns, the stride makes: see input_grad.py."""
        return min(self.SH, self.H), min(self.SW, self.W)

    @property
    def residue_class_pixels(self) -> int:
        """Input pixels of the largest residue class, over the batch."""
        return self.N * -(-self.H // self.SH) * -(-self.W // self.SW)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward product, halo included: N*P*Q * Co * R*S*Ci/groups."""
        return prod(self.y_shape) * self.R * self.S * self.Ci_group
