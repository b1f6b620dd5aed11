"""Sizes of a 2-D convolution or pooling, and every check of their arguments.

    x (N, Ci, H, W)   w (Co, Ci/groups, R, S)   y (N, Co, P, Q)
    P = (H + 2*PH - DH*(R-1) - 1) // SH + 1,   Q likewise from W, PW, DW, S, SW

A pooling slides a window of R x S places over each of C channels instead.

Stride, padding and dilation are in pixels. Nothing here knows of a tensor's memory or of a kernel.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


def integer(value: int, name: str, *, of: str = "conv2d") -> int:
    """Anything that counts as an int (NumPy's, a one-element tensor).

    Raises TypeError for what does not, naming the argument, and the function `of` which it is one.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{of}: {name} must be an int, got {value!r}")


def pair(value: int | Sequence[int], name: str, *, of: str = "conv2d") -> tuple[int, int]:
    """An int, or a sequence of one or two ints, as (rows, columns): an argument of the function `of`.

    Raises TypeError if it is neither and RuntimeError if it has another length, as PyTorch does.
    """
    if not isinstance(value, (list, tuple)):
        return (integer(value, f"{name} (an int or a pair)", of=of),) * 2
    if len(value) not in (1, 2):
        raise RuntimeError(
            f"{of}: expected {name} to be a single integer value or a list of 2 values to match the "
            f"{'convolution ' if of == 'conv2d' else ''}dimensions, but got {name}={list(value)}"
        )
    return integer(value[0], name, of=of), integer(value[-1], name, of=of)


def check_dimensions(x_shape: Sequence[int], w_shape: Sequence[int]) -> None:
    """Raises RuntimeError unless both shapes have four dimensions."""
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise RuntimeError(
            f"conv2d: Expected {len(w_shape)}-dimensional input for {len(w_shape)}-dimensional weight "
            f"{list(w_shape)}, but got input {list(x_shape)}; two-dimensional convolution takes four dimensions each"
        )


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

        Raises RuntimeError naming the offending values where `torch.nn.functional.conv2d` would raise one, in PyTorch's
        own words and more, and for what kernels cannot count: an empty filter, one that spans 2**31 pixels, padding of
        2**30 pixels, 2**31 channels. Raises TypeError for what is no int.
        """
        check_dimensions(x_shape, w_shape)
        (N, Ci, H, W), (Co, Ci_group, R, S) = x_shape, w_shape
        SH, SW = pair(stride, "stride")
        PH, PW = pair(padding, "padding")
        DH, DW = pair(dilation, "dilation")
        groups = integer(groups, "groups")
        if groups <= 0:
            raise RuntimeError(f"conv2d: non-positive groups is not supported, got {groups}")
        if min(SH, SW) <= 0:
            raise RuntimeError(f"conv2d: non-positive stride is not supported, got {(SH, SW)}")
        if min(PH, PW) < 0:
            raise RuntimeError(f"conv2d: negative padding is not supported, got {(PH, PW)}")
        if min(DH, DW) <= 0:
            raise RuntimeError(f"conv2d: dilation should be greater than zero, got {(DH, DW)}")
        if Co < groups or Co % groups:
            raise RuntimeError(
                f"conv2d: Given groups={groups}, expected weight to be "
                f"{'at least' if Co < groups else 'divisible by'} {groups} at dimension 0, "
                f"but got weight of size {list(w_shape)}"
            )
        if Ci != Ci_group * groups:
            raise RuntimeError(
                f"conv2d: Given groups={groups}, weight of size {list(w_shape)}, expected input {list(x_shape)} "
                f"to have {Ci_group * groups} channels, but got {Ci} channels instead"
            )
        if R == 0 or S == 0:
            raise RuntimeError(f"conv2d: kernel size should be greater than zero, but got weight {list(w_shape)}")
        if (H == 0 or W == 0) and N != 0 and Ci != 0:
            raise RuntimeError(
                f"conv2d: Only zero batch or zero channel inputs are supported, but got input shape: {list(x_shape)}"
            )
        if H + 2 * PH <= DH * (R - 1) or W + 2 * PW <= DW * (S - 1):
            raise RuntimeError(
                f"conv2d: Calculated padded input size per channel: ({H + 2 * PH} x {W + 2 * PW}). "
                f"Kernel size: ({DH * (R - 1) + 1} x {DW * (S - 1) + 1}). "
                "Kernel size can't be greater than actual input size"
            )
        geometry = cls(
            N=N, Ci=Ci, H=H, W=W, Co=Co, R=R, S=S,
            # A stride beyond the padded image leaves one output pixel; capped, it fits a kernel's integers.
            SH=min(SH, H + 2 * PH), SW=min(SW, W + 2 * PW),
            # Nothing is dilated where there is one row, or one column.
            PH=PH, PW=PW, DH=DH if R > 1 else 1, DW=DW if S > 1 else 1, groups=groups,
        )  # fmt: skip
        if max(DH * (R - 1) * max(W, geometry.Q) + DW * (S - 1), R * S * Ci_group) >= 2**31:
            raise RuntimeError(
                f"conv2d: a filter of weight {list(w_shape)} with dilation {(DH, DW)} spans 2**31 pixels or more"
            )
        # Beyond, row numbers or channel numbers of a kernel would wrap.
        if max(PH, PW) >= 2**30 or max(Co, groups * Ci_group) >= 2**31:
            raise RuntimeError(
                f"conv2d: padding {(PH, PW)} must stay below 2**30 pixels, and weight {list(w_shape)} with "
                f"groups={groups} below 2**31 channels"
            )
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
    def constants(self) -> dict[str, int]:
        """The filter's size and its steps, under the names by which every kernel knows them at compile time."""
        return dict(
            R=self.R, S=self.S, SH=self.SH, SW=self.SW, PH=self.PH, PW=self.PW, DH=self.DH, DW=self.DW
        )  # fmt: skip

    @property
    def depthwise(self) -> bool:
        """Whether each output channel sees one input channel alone: the kernels of depthwise.py serve it."""
        return self.groups > 1 and self.Ci_group == 1

    @property
    def halo_pixels(self) -> int:
        """Pixels of the zero-padded input and one dilation more, over the batch: what pixel arithmetic stays below."""
        return self.N * (self.H + 2 * self.PH + self.DH) * (self.W + 2 * self.PW + self.DW)

    @property
    def output_halo_pixels(self) -> int:
        """Pixels of the output with all that the input gradient's taps may point at around it, over the batch."""
        return self.N * (self.P + self.DH * self.R) * (self.Q + self.DW * self.S)

    @property
    def filter_span(self) -> int:
        """Pixels, of x or of y, that lie between a tap and another of the same filter, the halo around it included."""
        return (self.DH * self.R + self.PH + 2) * max(self.W, self.Q) + self.DW * self.S + self.PW + 2

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


def window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """The arguments of a pooling as pairs (rows, columns); a stride of None or () is the window's size.

    Raises TypeError for what is no int or sequence of them, and RuntimeError for a sequence of another length.
    """
    if stride is None or (isinstance(stride, (list, tuple)) and not stride):
        stride = kernel_size
    named = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    return tuple(pair(value, name, of="max_pool2d") for name, value in named.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolGeometry:
    """One pooling's sizes, in pixels; build it with `PoolGeometry.of`, which checks them."""

    N: int
    """Images in the batch."""
    C: int
    """Channels."""
    H: int
    """Input rows."""
    W: int
    """Input columns."""
    R: int
    """Window rows."""
    S: int
    """Window columns."""
    SH: int
    """Stride over rows."""
    SW: int
    """Stride over columns."""
    PH: int
    """Rows around the image that a window may reach into, and that never win."""
    PW: int
    """Columns likewise."""
    DH: int
    """Dilation of window rows."""
    DW: int
    """Dilation of window columns."""
    P: int
    """Output rows."""
    Q: int
    """Output columns."""

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> "PoolGeometry":
        """The geometry of max_pool2d(x, ...) for x_shape (N, C, H, W); a stride that is left out is the window's size.

        Raises RuntimeError naming the offending values where `torch.nn.functional.max_pool2d` would raise one, for
        windows or padding of 2**30 pixels, and for a dilated window that misses the whole image, where PyTorch's
        gradient is written outside its tensor. Raises TypeError for what is no int.
        """
        (R, S), (SH, SW), (PH, PW), (DH, DW) = window(kernel_size, stride, padding, dilation)
        if len(x_shape) != 4 or 0 in x_shape[1:]:
            raise RuntimeError(
                "max_pool2d: Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
                f"but got: {list(x_shape)}"
            )
        N, C, H, W = x_shape
        for name, (rows, columns) in (("kernel size", (R, S)), ("stride", (SH, SW)), ("dilation", (DH, DW))):
            if min(rows, columns) <= 0:
                raise RuntimeError(f"max_pool2d: {name} should be greater than zero, but got {(rows, columns)}")
        if min(PH, PW) < 0:
            raise RuntimeError(f"max_pool2d: pad must be non-negative, but got {(PH, PW)}")
        if PH > R // 2 or PW > S // 2:
            raise RuntimeError(
                f"max_pool2d: pad should be at most half of kernel size, but got pad={(PH, PW)} and "
                f"kernel_size={(R, S)}"
            )
        if max(DH * (R - 1), DW * (S - 1), R * S) >= 2**30:
            raise RuntimeError(f"max_pool2d: a window of {(R, S)} with dilation {(DH, DW)} spans 2**30 pixels or more")
        P = _outputs(H, R, SH, PH, DH, ceil_mode)
        Q = _outputs(W, S, SW, PW, DW, ceil_mode)
        if P < 1 or Q < 1:
            raise RuntimeError(
                f"max_pool2d: Given input size: ({C}x{H}x{W}). Calculated output size: ({C}x{P}x{Q}). "
                "Output size is too small"
            )
        # A stride beyond the padded image leaves one output pixel; capped, it fits a kernel's integers.
        SH, SW = min(SH, H + 2 * PH), min(SW, W + 2 * PW)
        if _misses(H, P, SH, PH, DH) or _misses(W, Q, SW, PW, DW):
            raise RuntimeError(
                f"max_pool2d: a window of {(R, S)} with padding {(PH, PW)} and dilation {(DH, DW)} holds no pixel of "
                f"the input {list(x_shape)}"
            )
        return cls(N=N, C=C, H=H, W=W, R=R, S=S, SH=SH, SW=SW, PH=PH, PW=PW, DH=DH, DW=DW, P=P, Q=Q)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)"""
        return self.N, self.C, self.H, self.W

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """(N, C, P, Q)"""
        return self.N, self.C, self.P, self.Q

    @property
    def constants(self) -> dict[str, int]:
        """What every kernel knows at compile time, by name."""
        return dict(
            C=self.C, R=self.R, S=self.S, SH=self.SH, SW=self.SW, PH=self.PH, PW=self.PW, DH=self.DH, DW=self.DW
        )  # fmt: skip


def _outputs(size: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows along one axis. Under `ceil_mode` the last may end beyond the padding, but starts before that after x."""
    room = size + 2 * padding - dilation * (window - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _misses(size: int, outputs: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether some window that begins before the image steps over all of it."""
    before = range(min(outputs, -(-padding // stride))) if dilation > size else ()
    return any((i * stride - padding) % dilation >= size for i in before)
