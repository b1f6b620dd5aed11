"""Depthwise convolution: output channel k sees input channel k // MULTIPLIER alone, MULTIPLIER = Co / Ci.

    y[n,k,p,q]   = b[k] + sum_{r,s} x[n,k//MULTIPLIER,p*SH+r*DH-PH,q*SW+s*DW-PW] * w[k,r,s]
    dx[n,c,h,w]  = sum_{k of c} sum_{r,s} dy[n,k,p,q] * w[k,r,s]   over the (p, q) with h = p*SH+r*DH-PH, likewise w
    dw[k,r,s]    = sum_{n,p,q} dy[n,k,p,q] * x[n,k//MULTIPLIER,p*SH+r*DH-PH,q*SW+s*DW-PW]

With RELU, y is max(that, 0). Where a ReLU follows, `mask` is its output, and dy counts as 0 where that is not positive.

There is no channel to reduce over, so a matrix product would be nearly all padding: here a program holds a block of
(pixels, channels) and multiplies element by element, channels side by side in memory. Accumulators are fp32 (fp64 for
fp64), and no product is rounded to TF32.

Memory: x [N, H, W, Ci], dy and mask [N, P, Q, Co] and w [R, S, Co], dense, so that a tap's weights are loaded 16 bytes
at once; results in any strides. Row offsets are int64.
"""

from math import gcd

import torch
import triton.language as tl

from kernels import runtime, split_k, tiles
from kernels.geometry import ConvGeometry


@runtime.kernel
def depthwise_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    ROWS, H, W, P, Q,
    stride_yn, stride_yc, stride_yp, stride_yq,
    CI: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    RELU: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS = N*P*Q output pixels.
    CO: tl.constexpr = CI * MULTIPLIER
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N

    # The output pixels of this tile, and the input pixel under each one's first tap (in the halo, perhaps).
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    q = o_m % Q
    p = o_m // Q % P
    n = o_m // Q // P
    h = p * SH - PH
    w = q * SW - PW
    first_pixel = (n * H + h) * W + w

    # Columns past the last channel repeat it, inside the tensor, and are not stored.
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if CO % BLOCK_N == 0 else tl.minimum(o_n, CO - 1)
    p_x = x_ptr + (channel // MULTIPLIER)[None, :]  # [1, BN]
    p_w = w_ptr + channel  # [BN]

    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for tap in range(R * S):
        h_tap = h + tap // S * DH
        w_tap = w + tap % S * DW
        inside = (h_tap >= 0) & (h_tap < H) & (w_tap >= 0) & (w_tap < W) & (o_m < ROWS)  # [BM]
        # Halo addresses are kept inside the tensor, as everywhere: should the loop be pipelined, they are read.
        pixel = tl.where(inside, first_pixel + (tap // S * DH * W + tap % S * DW), 0)
        b_x = tl.load(p_x + pixel.to(tl.int64)[:, None] * CI, inside[:, None], other=0.0)
        acc += b_x.to(ACC) * tl.load(p_w).to(ACC)[None, :]
        p_w += CO

    if b_ptr is not None:
        acc += tl.load(b_ptr + channel).to(ACC)[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)
    o_y = n.to(tl.int64) * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    p_y = y_ptr + o_y[:, None] + (channel.to(tl.int64) * stride_yc)[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), (o_m < ROWS)[:, None] & (o_n < CO)[None, :])


@runtime.kernel
def depthwise_input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr, mask_ptr,
    ROWS, H, W, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw,
    CI: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    COMMON_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_R: tl.constexpr, INVERSE_S: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS = N*H*W input pixels. COMMON_H = gcd(SH, DH): see input_grad.py for residue classes. There a program serves
    # one class; here each pixel finds the first tap of its own, since a filter of one channel is read from anywhere.
    STEP_R: tl.constexpr = SH // COMMON_H
    STEP_S: tl.constexpr = SW // COMMON_W
    TAPS_R: tl.constexpr = (R + STEP_R - 1) // STEP_R
    TAPS_S: tl.constexpr = (S + STEP_S - 1) // STEP_S
    CO: tl.constexpr = CI * MULTIPLIER
    TILES_N: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N

    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    w = o_m % W
    h = o_m // W % H
    n = o_m // W // H

    # Each pixel's first tap (r0, s0), and the output pixel it reads. Pixels that no tap meets have none.
    # The product is of two numbers below the stride, and so may need 64 bits.
    r0 = ((h + PH) // COMMON_H % STEP_R * tl.full((), INVERSE_R, tl.int64) % STEP_R).to(INDEX)
    s0 = ((w + PW) // COMMON_W % STEP_S * tl.full((), INVERSE_S, tl.int64) % STEP_S).to(INDEX)
    met = ((h + PH) % COMMON_H == 0) & ((w + PW) % COMMON_W == 0) & (o_m < ROWS)
    # Rows before the first output row are negative, so the division is of a multiple of SH, or its result is not used.
    p0 = (h + PH - r0 * DH) // SH
    q0 = (w + PW - s0 * DW) // SW
    first_pixel = (n * P + p0) * Q + q0

    # Columns past the last channel repeat it, inside the tensor, and are not stored.
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if CI % BLOCK_N == 0 else tl.minimum(o_n, CI - 1)
    channel = channel.to(tl.int64) * MULTIPLIER  # its first output channel
    p_dy = dy_ptr + channel[None, :]  # [1, BN]
    if mask_ptr is not None:
        p_mask = mask_ptr + channel[None, :]
    p_w = w_ptr + channel[None, :]  # [1, BN]

    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for step in range(TAPS_R * TAPS_S * MULTIPLIER):
        k = step % MULTIPLIER
        t = step // MULTIPLIER // TAPS_S
        u = step // MULTIPLIER % TAPS_S
        r = r0 + t * STEP_R
        s = s0 + u * STEP_S
        p = p0 - t * (DH // COMMON_H)
        q = q0 - u * (DW // COMMON_W)
        inside = met & (r < R) & (s < S) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)  # [BM]
        # Halo addresses are kept inside the tensor, as everywhere: should the loop be pipelined, they are read.
        pixel = tl.where(inside, first_pixel - (t * (DH // COMMON_H) * Q + u * (DW // COMMON_W)), 0)
        o_dy = pixel.to(tl.int64)[:, None] * CO + k
        b_dy = tl.load(p_dy + o_dy, inside[:, None], other=0.0)
        if mask_ptr is not None:
            b_dy = tl.where(tl.load(p_mask + o_dy, inside[:, None], other=0.0) <= 0, 0.0, b_dy)
        if STEP_R == 1 and STEP_S == 1:
            b_w = tl.load(p_w + (tl.full((), CO, tl.int64) * (t * S + u) + k))  # [1, BN]: one tap for all pixels
        else:
            # Pixels without a tap at this step load no other one's weight, for zero times infinity is NaN.
            tap = tl.where(inside, r * S + s, 0)
            b_w = tl.load(p_w + (tap.to(tl.int64) * CO + k)[:, None], inside[:, None], other=0.0)  # [BM, BN]
        acc += b_dy.to(ACC) * b_w.to(ACC)

    o_dx = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    p_dx = dx_ptr + o_dx[:, None] + (o_n.to(tl.int64) * stride_xc)[None, :]
    tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), (o_m < ROWS)[:, None] & (o_n < CI)[None, :])


@runtime.kernel
def depthwise_weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr, mask_ptr,
    ROWS, STEPS, H, W, P, Q,
    stride_wz, stride_wk, stride_wr, stride_ws,
    CI: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS = N*P*Q output pixels; each split takes STEPS blocks of BLOCK_M of them. A program serves one tap (r, s).
    CO: tl.constexpr = CI * MULTIPLIER
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % TILES_N
    r = tl.program_id(0) // TILES_N // S
    s = tl.program_id(0) // TILES_N % S
    split = tl.program_id(1)

    # Columns past the last channel repeat it, inside the tensor, and are not stored.
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if CO % BLOCK_N == 0 else tl.minimum(o_n, CO - 1)
    p_dy = dy_ptr + channel[None, :]  # [1, BN]
    if mask_ptr is not None:
        p_mask = mask_ptr + channel[None, :]
    p_x = x_ptr + (channel // MULTIPLIER)[None, :]  # [1, BN]

    o_m = (split * STEPS).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for _ in range(STEPS):
        q = o_m % Q
        p = o_m // Q % P
        n = o_m // Q // P
        h = p * SH + (r * DH - PH)
        w = q * SW + (s * DW - PW)
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (o_m < ROWS)  # [BM]
        # Halo addresses are kept inside the tensor, as everywhere: should the loop be pipelined, they are read.
        pixel = tl.where(inside, (n * H + h) * W + w, 0)
        row = tl.where(inside, o_m, 0)
        b_x = tl.load(p_x + pixel.to(tl.int64)[:, None] * CI, inside[:, None], other=0.0)
        b_dy = tl.load(p_dy + row.to(tl.int64)[:, None] * CO, inside[:, None], other=0.0)
        if mask_ptr is not None:
            b_mask = tl.load(p_mask + row.to(tl.int64)[:, None] * CO, inside[:, None], other=0.0)
            b_dy = tl.where(b_mask <= 0, 0.0, b_dy)
        acc += b_dy.to(ACC) * b_x.to(ACC)
        o_m += BLOCK_M

    # `tl.sum` is a jitted helper, which a kernel that is also interpreted cannot call; this is what it calls.
    total = tl.reduce(acc, 0, tl.standard._sum_combine)  # [BN]
    o_dw = split.to(tl.int64) * stride_wz + r * stride_wr + s * stride_ws + o_n.to(tl.int64) * stride_wk
    tl.store(dw_ptr + o_dw, total.to(dw_ptr.dtype.element_ty), o_n < CO)


def _by_tap(w: torch.Tensor) -> torch.Tensor:
    """w (Co, 1, R, S) -> [R, S, Co], a copy where there is more than one tap."""
    return runtime.dense(w[:, 0].permute(1, 2, 0), "filter by tap")


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    target: runtime.Target,
    y: torch.Tensor,
    *,
    relu: bool,
) -> None:
    """x (N, Ci, H, W) and w (Co, 1, R, S), channels-last, bias (Co,), dense, or None -> into y (N, Co, P, Q)."""
    g = geometry
    rows = g.N * g.P * g.Q
    tile = tiles.depthwise_tile(target, rows, g.Co, x.dtype)
    runtime.launch(
        depthwise_forward_kernel,
        target,
        (-(-rows // tile.M) * -(-g.Co // tile.N), 1),
        x, _by_tap(w), bias, y,
        rows, g.H, g.W, g.P, g.Q, *y.stride(),
        CI=g.Ci, MULTIPLIER=g.Co // g.Ci, **g.constants,
        RELU=relu, INDEX=runtime.index_type(g.halo_pixels, rows + tile.M),
        ACC=runtime.accumulator(x.dtype), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=y,
    )  # fmt: skip


def input_grad(
    dy: torch.Tensor,
    w: torch.Tensor,
    geometry: ConvGeometry,
    target: runtime.Target,
    dx: torch.Tensor,
    *,
    mask: torch.Tensor | None,
) -> None:
    """dy (N, Co, P, Q), w (Co, 1, R, S) and mask as dy or None, channels-last -> into dx (N, Ci, H, W)."""
    g = geometry
    rows = g.N * g.H * g.W
    tile = tiles.depthwise_tile(target, rows, g.Ci, dy.dtype)
    common_h, common_w = gcd(g.SH, g.DH), gcd(g.SW, g.DW)
    runtime.launch(
        depthwise_input_grad_kernel,
        target,
        (-(-rows // tile.M) * -(-g.Ci // tile.N), 1),
        dy, _by_tap(w), dx, mask,
        rows, g.H, g.W, g.P, g.Q, *dx.stride(),
        CI=g.Ci, MULTIPLIER=g.Co // g.Ci, **g.constants,
        COMMON_H=common_h, COMMON_W=common_w,
        INVERSE_R=pow(g.DH // common_h, -1, g.SH // common_h), INVERSE_S=pow(g.DW // common_w, -1, g.SW // common_w),
        INDEX=runtime.index_type(g.halo_pixels, g.output_halo_pixels, rows + tile.M),
        ACC=runtime.accumulator(dy.dtype), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=dx,
    )  # fmt: skip


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    geometry: ConvGeometry,
    target: runtime.Target,
    dw: torch.Tensor,
    *,
    mask: torch.Tensor | None,
) -> None:
    """dy (N, Co, P, Q), x (N, Ci, H, W) and mask as dy or None, channels-last -> into dw (Co, 1, R, S); N > 0."""
    g = geometry
    rows = g.N * g.P * g.Q
    tile = tiles.depthwise_tile(target, rows, g.Co, dy.dtype)
    programs = -(-g.Co // tile.N) * g.R * g.S
    steps = -(-rows // tile.M)
    splits = tiles.splits(target, programs=programs, steps=steps)
    partial, (stride_wz, stride_wk, _, stride_wr, stride_ws) = split_k.workspace(dw, splits)
    runtime.launch(
        depthwise_weight_grad_kernel,
        target,
        (programs, splits),
        dy, x, partial, mask,
        rows, -(-steps // splits), g.H, g.W, g.P, g.Q, stride_wz, stride_wk, stride_wr, stride_ws,
        CI=g.Ci, MULTIPLIER=g.Co // g.Ci, **g.constants,
        INDEX=runtime.index_type(g.halo_pixels, rows + splits * tile.M),
        ACC=runtime.accumulator(dy.dtype), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=partial,
    )  # fmt: skip
    split_k.add_up(partial, dw, target)
