"""Few input channels, as a first layer has: the windows of a filter row instead of its taps.

A tap of 3 channels fills no block of a reduction. But the S taps of one filter row lie side by side in the image, as
one window of S * Ci elements, and the window of the next output pixel begins SW pixels further. So

    y[n,co,p,q] = b[co] + sum_{r,k} z[n, p*SH+r*DH, q*SW*C + k] * w[co,r,k]   k over the S*C elements of a window

is a convolution of R x 1 taps of S*C channels that overlap, over a copy z of x whose zeros are written out: the halo
around the image, and channels up to C, a power of two, so that a pixel is loaded at once. The kernels need no more for
it than a pixel's pitch of its own. Memory: z [N, H+2*PH, WIDTH, C], dense.

The input gradient has few columns instead, Ci for each residue class (input_grad.py). All classes together have
SH*SW*Ci, and what they read overlaps: an input pixel h = SH*i + a reads the output rows i + d with
0 <= a + PH - SH*d < R. So all are one convolution of dy, of stride 1, with SH*SW*Ci output channels,

    packed[n,(a,b,ci),i,j] = sum_{co,d,e} dy[n,co,i+d,j+e] * w[co,ci,a+PH-SH*d,b+PW-SW*e]   zero where w ends

whose result is dealt out to its pixels afterwards. A dy that is infinite or NaN also reaches the pixels of its d and e
that its filter misses, through those zeros.
"""

from dataclasses import dataclass, replace

import torch
import triton.language as tl

from kernels import runtime, tiles
from kernels.geometry import ConvGeometry


@runtime.kernel
def pad_kernel(
    x_ptr, z_ptr,
    PIXELS, HEIGHT, WIDTH, H, W,
    CI: tl.constexpr, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # PIXELS = N*HEIGHT*WIDTH of z; a program writes BLOCK of them.
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = pixel % WIDTH - PW
    h = pixel // WIDTH % HEIGHT - PH
    n = pixel // WIDTH // HEIGHT
    c = tl.arange(0, C)
    inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W) & (pixel < PIXELS))[:, None] & (c < CI)[None, :]  # [BLOCK, C]
    o_x = tl.where(inside, ((n * H + h) * W + w)[:, None] * CI + c[None, :], 0)
    tl.store(z_ptr + pixel[:, None] * C + c[None, :], tl.load(x_ptr + o_x, inside, other=0.0), pixel[:, None] < PIXELS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A convolution over few channels as one over windows."""

    z: torch.Tensor
    """x with its zeros, [N, HEIGHT, WIDTH, C]."""
    geometry: ConvGeometry
    """Of the R x 1 taps: Ci is the elements of a window, in whole blocks of a reduction, and there is no halo."""
    used: int
    """Elements of a window that lie under the filter, S * C; those after them are the next pixels'."""

    @property
    def row(self) -> int:
        """Pixels of z from an image row to the next."""
        return self.z.shape[2]

    @property
    def pixel(self) -> int:
        """C: elements of z from a pixel to the next."""
        return self.z.shape[3]


def geometry_of_windows(geometry: ConvGeometry) -> ConvGeometry:
    """Of the R x 1 taps. W counts where windows begin, so that there are Q of them."""
    g = geometry
    length = -(-g.S * tiles.padded_channels(g) // tiles.SMALLEST) * tiles.SMALLEST
    return replace(g, Ci=length, H=g.H + 2 * g.PH, W=(g.Q - 1) * g.SW + 1, S=1, PH=0, PW=0)


def product_of(op: str, target: runtime.Target, geometry: ConvGeometry) -> tuple[str, ConvGeometry]:
    """What "forward", "input_grad" or "weight_grad" of a layer multiplies: (op, geometry) by which tiles are chosen."""
    if op == "input_grad":
        packed = tiles.packs_classes(target, geometry)
        return ("forward", geometry_of_classes(geometry)) if packed else (op, geometry)
    return op, geometry_of_windows(geometry) if tiles.takes_windows(target, geometry) else geometry


def windows(x: torch.Tensor, geometry: ConvGeometry, target: runtime.Target) -> Windows:
    """x (N, Ci, H, W), channels-last -> its windows."""
    g = geometry
    taps, channels = geometry_of_windows(g), tiles.padded_channels(g)
    # The last window ends within its row, and a row is a multiple of 16 pixels: then pointers to every other pixel are
    # multiples of 16 bytes, as the compiler can see.
    needed = (g.Q - 1) * g.SW + taps.Ci // channels
    height, width = taps.H, -(-max(needed, g.W + g.PW) // 16) * 16
    z = runtime.empty((g.N, height, width, channels), "input with its zeros", dtype=x.dtype, device=x.device)
    pixels = g.N * height * width
    block = min(tiles.power_of_two(pixels), 1024)
    runtime.launch(
        pad_kernel,
        target,
        (-(-pixels // block), 1),
        x, z, pixels, height, width, g.H, g.W,
        CI=g.Ci, C=channels, PH=g.PH, PW=g.PW, BLOCK=block, num_warps=4, num_stages=1, output=z,
    )  # fmt: skip
    return Windows(z=z, geometry=taps, used=g.S * channels)


def filter_rows(w: torch.Tensor, geometry: ConvGeometry, windows: Windows) -> torch.Tensor:
    """w (Co, Ci, R, S) -> (Co, length of a window, R, 1), channels-last, zero where there is no weight."""
    rows = empty_filter_rows(w, windows).zero_()
    _taps(rows, geometry, windows).copy_(w)
    return rows


def empty_filter_rows(like: torch.Tensor, windows: Windows) -> torch.Tensor:
    """(Co, length of a window, R, 1), channels-last, uninitialised; dtype and device of `like`."""
    shape = windows.geometry.w_shape
    layout = torch.channels_last
    return runtime.empty(shape, "filter rows", dtype=like.dtype, device=like.device, memory_format=layout)


def of_filter_rows(rows: torch.Tensor, geometry: ConvGeometry, windows: Windows, dw: torch.Tensor) -> None:
    """(Co, length of a window, R, 1) -> into dw (Co, Ci, R, S)."""
    dw.copy_(_taps(rows, geometry, windows))


def _taps(rows: torch.Tensor, geometry: ConvGeometry, windows: Windows) -> torch.Tensor:
    """A view of filter rows, (Co, length of a window, R, 1), as weights (Co, Ci, R, S)."""
    taps = rows[:, : windows.used, :, 0].unflatten(1, (geometry.S, windows.pixel))  # (Co, S, C, R)
    return taps[:, :, : geometry.Ci].permute(0, 2, 3, 1)


@runtime.kernel
def class_filters_kernel(
    w_ptr, filters_ptr,
    ELEMENTS, CO,
    CI: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, LAST_R: tl.constexpr, LAST_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # w [Co, R, S, Ci]; filters [SH*SW*Ci, D, E, Co]. The first of D taps reads filter row LAST_R + a.
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    co = o % CO
    e = o // CO % E
    d = o // CO // E % D
    column = o // CO // E // D
    ci = column % CI
    r = column // CI // SW + LAST_R - SH * d
    s = column // CI % SW + LAST_S - SW * e
    inside = (r >= 0) & (r < R) & (s >= 0) & (s < S) & (o < ELEMENTS)
    o_w = tl.where(inside, ((co * R + r) * S + s) * CI + ci, 0)
    tl.store(filters_ptr + o, tl.load(w_ptr + o_w, inside, other=0.0), o < ELEMENTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """The input gradient of all residue classes as one convolution of dy."""

    filters: torch.Tensor
    """(SH*SW*Ci, Co, D, E), channels-last."""
    geometry: ConvGeometry
    """Of that convolution; its output has a pixel for each SH x SW input pixels, more than the geometry tells."""


def geometry_of_classes(geometry: ConvGeometry) -> ConvGeometry:
    """Of the convolution of dy that gives all residue classes of dx; PH < R and PW < S."""
    g = geometry
    before_h, before_w = (g.R - 1 - g.PH) // g.SH, (g.S - 1 - g.PW) // g.SW  # output rows and columns read before i, j
    D, E = (g.SH - 1 + g.PH) // g.SH + before_h + 1, (g.SW - 1 + g.PW) // g.SW + before_w + 1
    columns = g.SH * g.SW * g.Ci
    return replace(g, Ci=g.Co, H=g.P, W=g.Q, Co=columns, R=D, S=E, SH=1, SW=1, PH=before_h, PW=before_w)


def classes(w: torch.Tensor, geometry: ConvGeometry, target: runtime.Target) -> Classes:
    """w (Co, Ci, R, S), channels-last -> the filters of all classes; PH < R and PW < S."""
    g, forward = geometry, geometry_of_classes(geometry)
    layout = torch.channels_last
    filters = runtime.empty(
        forward.w_shape, "filters of all classes", dtype=w.dtype, device=w.device, memory_format=layout
    )
    block = min(tiles.power_of_two(filters.numel()), 256)
    runtime.launch(
        class_filters_kernel,
        target,
        (-(-filters.numel() // block), 1),
        w, filters, filters.numel(), g.Co,
        CI=g.Ci, R=g.R, S=g.S, SH=g.SH, SW=g.SW, D=forward.R, E=forward.S,
        LAST_R=g.PH + g.SH * forward.PH, LAST_S=g.PW + g.SW * forward.PW,
        BLOCK=block, num_warps=4, num_stages=1, output=filters,
    )  # fmt: skip
    return Classes(filters=filters, geometry=forward)


def unpack(packed: torch.Tensor, geometry: ConvGeometry, dx: torch.Tensor) -> None:
    """(N, SH*SW*Ci, ceil(H/SH), ceil(W/SW)) -> into dx (N, Ci, H, W)."""
    g = geometry
    for a in range(min(g.SH, g.H)):
        for b in range(min(g.SW, g.W)):
            pixels = dx[:, :, a :: g.SH, b :: g.SW]
            first = (a * g.SW + b) * g.Ci
            pixels.copy_(packed[:, first : first + g.Ci, : pixels.shape[2], : pixels.shape[3]])
