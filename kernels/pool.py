"""Max-pooling, with a ReLU before it where asked, and its gradient.

    y[n,c,p,q]  = max_{r,s} f(x[n,c,p*SH+r*DH-PH,q*SW+s*DW-PW])   over the places inside x;  f is relu or nothing
    index[n,c,p,q] = r*S + s of the place that won, or NOWHERE if no gradient goes back: relu, and nothing is positive
    dx[n,c,h,w] = sum of dy[n,c,p,q] over the windows (p, q) that (h, w) won
    take(ddx)[n,c,p,q] = ddx[n,c,h,w] at the place (h, w) that won (p, q), 0 for NOWHERE: the transpose of dx

The first of equal places wins, unless one is NaN: then the last NaN does, as in PyTorch. The index is an offset within
the window, one byte for up to 255 places, and all that a backward pass needs.

A window that reaches over the edge reads its nearest place inside once more. That changes no maximum, so no load has a
mask. The gradient is gathered, by residue classes (input_grad.py): an input pixel asks each window that covers it
whether it won, so that each sum has a fixed order, in fp32 (fp64 for fp64).

Memory: x, dx and ddx [N, H, W, C]; y, dy and index [N, P, Q, C]; results but the index in any strides. Row offsets are
int64.
"""

from math import gcd

import torch
import triton.language as tl

from kernels import runtime, tiles
from kernels.geometry import ConvGeometry, PoolGeometry


@runtime.kernel
def max_pool_kernel(
    x_ptr, y_ptr, index_ptr,
    ROWS, H, W, P, Q,
    stride_yn, stride_yc, stride_yp, stride_yq,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS = N*P*Q output pixels.
    PLACE: tl.constexpr = index_ptr.dtype.element_ty
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N

    # Rows and columns past the last repeat it, inside the tensors, and are not stored.
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    row = tl.minimum(o_m, ROWS - 1)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if C % BLOCK_N == 0 else tl.minimum(o_n, C - 1)
    p_x = x_ptr + channel[None, :]  # [1, BN]

    # The input pixel at each window's corner, and the window's first and last row and column inside the image.
    q = row % Q
    p = row // Q % P
    n = row // Q // P
    h = p * SH - PH
    w = q * SW - PW
    r_first = tl.maximum(DH - 1 - h, 0) // DH
    s_first = tl.maximum(DW - 1 - w, 0) // DW
    r_last = tl.minimum((H - 1 - h) // DH, R - 1)
    s_last = tl.minimum((W - 1 - w) // DW, S - 1)
    first_row = n * H + h

    # A place's number is one more than the place; 0 becomes nowhere. Without a ReLU the first place inside has won
    # until another is above -inf.
    best = tl.full((BLOCK_M, BLOCK_N), 0 if RELU else float("-inf"), ACC)
    number = tl.full((BLOCK_M, BLOCK_N), 0, PLACE)
    if not RELU:
        number += (r_first * S + (s_first + 1)).to(PLACE)[:, None]
    for tap_r in range(R):
        r = tl.minimum(tl.maximum(r_first, tap_r), r_last)  # [BM]
        first_pixel = (first_row + r * DH) * W + w
        # Unrolled, so that a row's loads are under way together.
        for tap_s in tl.static_range(S):
            s = tl.minimum(tl.maximum(s_first, tap_s), s_last)
            pixel = (first_pixel + s * DW).to(tl.int64) * C
            b_x = tl.load(p_x + pixel[:, None]).to(ACC)  # [BM, BN]
            wins = (b_x > best) | (b_x != b_x)
            if best.dtype == tl.float64:
                best = tl.where(wins, b_x, best)  # in float64 no GPU has the maximum below
            else:
                best = tl.maximum(best, b_x, propagate_nan=tl.PropagateNan.ALL)
            # Places come in order, so the last to win is the largest.
            number = tl.maximum(number, wins.to(PLACE) * (r * S + (s + 1)).to(PLACE)[:, None])

    stored = (o_m < ROWS)[:, None] & (o_n < C)[None, :]
    o_y = n.to(tl.int64) * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    p_y = y_ptr + o_y[:, None] + (o_n.to(tl.int64) * stride_yc)[None, :]
    tl.store(p_y, best.to(y_ptr.dtype.element_ty), stored)
    tl.store(index_ptr + (row.to(tl.int64) * C)[:, None] + o_n[None, :], number - 1, stored)


@runtime.kernel
def max_pool_grad_kernel(
    dy_ptr, index_ptr, dx_ptr,
    N, H, W, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr, INVERSE_R: tl.constexpr, INVERSE_S: tl.constexpr,
    CLASSES: tl.constexpr, CLASSES_W: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # See input_grad.py for a residue class's pixels and places. Those of the same pixels are side by side in the grid,
    # since they read the same windows.
    PLACE: tl.constexpr = index_ptr.dtype.element_ty
    COMMON_H: tl.constexpr = SH // STEP_R
    COMMON_W: tl.constexpr = SW // STEP_S
    DP: tl.constexpr = DH // COMMON_H
    DQ: tl.constexpr = DW // COMMON_W
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % TILES_N
    residue = tl.program_id(0) // TILES_N % CLASSES
    tile_m = tl.program_id(0) // TILES_N // CLASSES
    a = residue // CLASSES_W
    b = residue % CLASSES_W
    rows = (H - a + (SH - 1)) // SH
    columns = (W - b + (SW - 1)) // SW
    # The product is of two numbers below the stride, and so may need 64 bits. A class that no window meets has no
    # place.
    r_first = ((a + PH) // COMMON_H % STEP_R * tl.full((), INVERSE_R, tl.int64) % STEP_R).to(tl.int32)
    s_first = ((b + PW) // COMMON_W % STEP_S * tl.full((), INVERSE_S, tl.int64) % STEP_S).to(tl.int32)
    r_first = tl.where((a + PH) % COMMON_H == 0, r_first, R)
    s_first = tl.where((b + PW) % COMMON_W == 0, s_first, S)

    # Rows and columns past the last repeat one, inside the tensors, and are not stored.
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    j = o_m % columns
    i = o_m // columns % rows
    n = tl.minimum(o_m // columns // rows, N - 1)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if C % BLOCK_N == 0 else tl.minimum(o_n, C - 1)

    p_index = index_ptr + channel[None, :]  # [1, BN]
    p_dy = dy_ptr + channel[None, :]
    # The windows that hold each pixel at the class's first place; from place to place DP rows and DQ columns back.
    p = i + (a + PH - r_first * DH) // SH
    q_first = j + (b + PW - s_first * DW) // SW
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for r in range(r_first, R, STEP_R):
        p_inside = tl.minimum(tl.maximum(p, 0), P - 1)
        first_pixel = (n * P + p_inside) * Q
        q = q_first
        for s in range(s_first, S, STEP_S):
            q_inside = tl.minimum(tl.maximum(q, 0), Q - 1)
            pixel = ((first_pixel + q_inside).to(tl.int64) * C)[:, None]  # [BM, 1]
            inside = ((p == p_inside) & (q == q_inside))[:, None]
            won = (tl.load(p_index + pixel) == tl.full((), r * S + s, PLACE)) & inside  # [BM, BN]
            acc += tl.where(won, tl.load(p_dy + pixel).to(ACC), 0.0)
            q -= DQ
        p -= DP

    h = a + i * SH
    w = b + j * SW
    o_dx = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    p_dx = dx_ptr + o_dx[:, None] + (o_n.to(tl.int64) * stride_xc)[None, :]
    stored = (o_m // columns // rows < N)[:, None] & (o_n < C)[None, :]
    tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), stored)


@runtime.kernel
def max_pool_take_kernel(
    ddx_ptr, index_ptr, z_ptr,
    ROWS, H, W, P, Q,
    stride_zn, stride_zc, stride_zp, stride_zq,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    NOWHERE: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS = N*P*Q output pixels.
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N

    # Rows and columns past the last repeat it, inside the tensors, and are not stored.
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    row = tl.minimum(o_m, ROWS - 1)
    q = row % Q
    p = row // Q % P
    n = row // Q // P
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if C % BLOCK_N == 0 else tl.minimum(o_n, C - 1)

    place = tl.load(index_ptr + (row.to(tl.int64) * C)[:, None] + channel[None, :]).to(tl.int32)  # [BM, BN]
    won = place != NOWHERE
    place = tl.where(won, place, 0)
    first_row = n * H + p * SH - PH  # [BM]
    first_column = q * SW - PW
    pixel = (first_row[:, None] + place // S * DH) * W + (first_column[:, None] + place % S * DW)
    # Without a winner the first place may lie outside; its address is kept inside, and it is not read.
    o_x = tl.where(won, pixel, 0).to(tl.int64) * C + channel[None, :]
    b_ddx = tl.load(ddx_ptr + o_x, won, other=0.0)

    o_z = n.to(tl.int64) * stride_zn + p.to(tl.int64) * stride_zp + q.to(tl.int64) * stride_zq
    p_z = z_ptr + o_z[:, None] + (o_n.to(tl.int64) * stride_zc)[None, :]
    tl.store(p_z, b_ddx, (o_m < ROWS)[:, None] & (o_n < C)[None, :])


def index_dtype(geometry: PoolGeometry) -> torch.dtype:
    """The smallest type that holds every place of a window, and `nowhere`."""
    return torch.uint8 if geometry.R * geometry.S <= 255 else torch.int32


def nowhere(geometry: PoolGeometry) -> int:
    """The index of an output that no place won: -1, which a byte reads as 255."""
    return 255 if index_dtype(geometry) == torch.uint8 else -1


def _tile(target: runtime.Target, rows: int, channels: int, dtype: torch.dtype) -> tiles.Tile:
    """M pixels by N channels."""
    if target.name != runtime.INTERPRETER:
        return tiles.depthwise_tile(target, rows, channels, dtype)
    # What a block holds past the tensor's end costs as much as what it holds of it.
    N = min(tiles.power_of_two(channels), 256)
    most = min(tiles.power_of_two(rows), tiles.INTERPRETER_ROWS, tiles.LARGEST_BLOCK // N)
    M = min(
        (1 << bits for bits in range(most.bit_length())),
        key=lambda M: -(-rows // M) * (tiles.INTERPRETED_STEP + tiles.INTERPRETED_LOAD * M * N),
    )
    return tiles.Tile(M=M, N=N, K=1)


def max_pool(
    x: torch.Tensor,
    geometry: PoolGeometry,
    *,
    relu: bool = False,
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, C, H, W) -> y (N, C, P, Q) in `memory_format`, index (N, C, P, Q), channels-last, of `index_dtype`.

    x is copied if it is not channels-last.
    """
    g = geometry
    target = runtime.target_for(x.device)
    y = runtime.empty(g.y_shape, "pooled output", dtype=x.dtype, device=x.device, memory_format=memory_format)
    index = _channels_last_empty(g.y_shape, "window index", index_dtype(g), x.device)
    if y.numel() == 0:
        return y, index
    rows = g.N * g.P * g.Q
    tile = _tile(target, rows, g.C, x.dtype)
    runtime.launch(
        max_pool_kernel,
        target,
        (-(-rows // tile.M) * -(-g.C // tile.N), 1),
        runtime.channels_last(x, "input as channels-last"), y, index,
        rows, g.H, g.W, g.P, g.Q, *y.stride(),
        **g.constants, RELU=relu,
        INDEX=runtime.index_type(g.N * (g.H + g.PH) * (g.W + g.PW), rows + tile.M),
        ACC=runtime.accumulator(x.dtype), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=y,
    )  # fmt: skip
    return y, index


def max_pool_grad(
    dy: torch.Tensor,
    index: torch.Tensor,
    geometry: PoolGeometry,
    *,
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """dy and index (N, C, P, Q) -> dx (N, C, H, W) in `memory_format`; copies operands that are not channels-last."""
    g = geometry
    target = runtime.target_for(dy.device)
    dx = runtime.empty(g.x_shape, "input gradient", dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    if dx.numel() == 0:
        return dx
    common_h, common_w = gcd(g.SH, g.DH), gcd(g.SW, g.DW)
    step_r, step_s = g.SH // common_h, g.SW // common_w
    classes_h, classes_w = min(g.SH, g.H), min(g.SW, g.W)
    rows = g.N * -(-g.H // g.SH) * -(-g.W // g.SW)
    tile = _tile(target, rows, g.C, dy.dtype)
    runtime.launch(
        max_pool_grad_kernel,
        target,
        (classes_h * classes_w * -(-rows // tile.M) * -(-g.C // tile.N), 1),
        runtime.channels_last(dy, "output gradient as channels-last"),
        runtime.channels_last(index, "window index as channels-last"),
        dx,
        g.N, g.H, g.W, g.P, g.Q, *dx.stride(),
        **g.constants, STEP_R=step_r, STEP_S=step_s,
        INVERSE_R=pow(g.DH // common_h, -1, step_r), INVERSE_S=pow(g.DW // common_w, -1, step_s),
        CLASSES=classes_h * classes_w, CLASSES_W=classes_w,
        INDEX=runtime.index_type(g.N * g.P * g.Q, rows + tile.M),
        ACC=runtime.accumulator(dy.dtype), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=dx,
    )  # fmt: skip
    return dx


def max_pool_take(
    ddx: torch.Tensor,
    index: torch.Tensor,
    geometry: PoolGeometry,
    *,
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """ddx (N, C, H, W), index (N, C, P, Q) -> (N, C, P, Q) in `memory_format`: ddx at the places that won.

    Copies operands that are not channels-last.
    """
    g = geometry
    target = runtime.target_for(ddx.device)
    z = runtime.empty(g.y_shape, "taken gradient", dtype=ddx.dtype, device=ddx.device, memory_format=memory_format)
    if z.numel() == 0:
        return z
    rows = g.N * g.P * g.Q
    tile = _tile(target, rows, g.C, ddx.dtype)
    runtime.launch(
        max_pool_take_kernel,
        target,
        (-(-rows // tile.M) * -(-g.C // tile.N), 1),
        runtime.channels_last(ddx, "input gradient as channels-last"),
        runtime.channels_last(index, "window index as channels-last"),
        z,
        rows, g.H, g.W, g.P, g.Q, *z.stride(),
        **g.constants, NOWHERE=nowhere(g),
        INDEX=runtime.index_type(g.N * (g.H + g.PH) * (g.W + g.PW), rows + tile.M), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=z,
    )  # fmt: skip
    return z


def _channels_last_empty(shape: tuple[int, ...], what: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return runtime.empty(shape, what, dtype=dtype, device=device, memory_format=torch.channels_last)


def _of_convolution(geometry: ConvGeometry) -> PoolGeometry:
    """The pooling that slides a window where a convolution slides its filter, over the convolution's input."""
    g = geometry
    return PoolGeometry.of(g.x_shape, (g.R, g.S), (g.SH, g.SW), (g.PH, g.PW), (g.DH, g.DW))


@runtime.operation("relu_max_pool")
def _(geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    return max_pool(runtime.meta_channels_last(geometry.x_shape, dtype), _of_convolution(geometry), relu=True)


@runtime.operation("relu_max_pool_grad")
def _(geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> torch.Tensor:
    g = _of_convolution(geometry)
    dy, index = (runtime.meta_channels_last(g.y_shape, kind) for kind in (dtype, index_dtype(g)))
    return max_pool_grad(dy, index, g)
