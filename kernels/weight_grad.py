"""dw[co,ci,r,s] = sum_{n,p,q} dy[n,co,p,q] * x[n,ci,p*SH+r*DH-PH,q*SW+s*DW-PW]

Implicit GEMM: M = Co rows, N = R*S*Ci columns, K = N*P*Q terms, each group by itself; fp32 accumulator (fp64 for
fp64). The reduction is long and the result small, so it is split over programs: see split_k.py.

Memory: dy [N, P, Q, Co] and x [N, H, W, Ci], dense; dw in any strides. Row offsets are int64.
"""

import torch
import triton.language as tl

from kernels import depthwise, runtime, split_k, tiles
from kernels.geometry import ConvGeometry


@runtime.kernel
def weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    ROWS, STEPS, H, W, P, Q,
    stride_wz, stride_wk, stride_wc, stride_wr, stride_ws,
    CI: tl.constexpr, CO: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr, TILES_N: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # CI, CO: channels of one group. ROWS = N*P*Q output pixels; each split takes STEPS blocks of BLOCK_K of them.
    PITCH_X: tl.constexpr = GROUPS * CI
    N_BLOCKS: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    TILES_M: tl.constexpr = (CO + BLOCK_M - 1) // BLOCK_M

    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N % TILES_M
    group = tl.program_id(0) // TILES_N // TILES_M
    split = tl.program_id(1)

    # Filter places of this tile. With enough channels a tile lies within one tap, and (r, s) are scalars. Places past
    # the last have r = R, which is outside.
    if FLAT:
        place = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        r = place // (S * CI)
        s = place // CI % S
        c = place % CI
        in_filter = r < R
    else:
        r = tile_n // N_BLOCKS // S
        s = tile_n // N_BLOCKS % S
        c = tile_n % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        in_filter = c < CI

    # Channels past the last repeat it, inside the tensor, and are not stored.
    o_co = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    co = o_co if CO % BLOCK_M == 0 else tl.minimum(o_co, CO - 1)
    ci = c if CI % BLOCK_N == 0 or FLAT else tl.minimum(c, CI - 1)
    p_dy = dy_ptr + (group * CO + co)[None, :]  # [1, BM]
    p_x = x_ptr + (group * CI + ci)[None, :]  # [1, BN]
    tap_pixel = r * DH * W + s * DW

    o_k = (split * STEPS).to(INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK] output pixels
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for _ in range(STEPS):
        q = o_k % Q
        p = o_k // Q % P
        n = o_k // Q // P
        in_rows = o_k < ROWS
        h = p * SH - PH
        w = q * SW - PW
        first_pixel = (n * H + h) * W + w  # [BK]
        # Halo addresses are kept inside the tensor: asynchronous copies read them although they are masked.
        if FLAT:
            # The taps inside are a range of filter rows and a range of filter columns.
            r_first = (tl.maximum(-h, 0) + (DH - 1)) // DH
            r_end = tl.where(in_rows, tl.minimum((tl.maximum(H - h, 0) + (DH - 1)) // DH, R), 0)
            s_first = (tl.maximum(-w, 0) + (DW - 1)) // DW
            s_end = (tl.maximum(W - w, 0) + (DW - 1)) // DW
            inside = (r[None, :] >= r_first[:, None]) & (r[None, :] < r_end[:, None])  # [BK, BN]
            inside &= (s[None, :] >= s_first[:, None]) & (s[None, :] < s_end[:, None])
            first = first_pixel.to(tl.int64) * PITCH_X
            o_x = tl.where(inside, first[:, None] + (tap_pixel.to(tl.int64) * PITCH_X)[None, :], 0)
            b_x = tl.load(p_x + o_x, inside, other=0.0)
        else:
            h_tap = h + r * DH
            w_tap = w + s * DW
            inside = (h_tap >= 0) & (h_tap < H) & (w_tap >= 0) & (w_tap < W) & in_rows  # [BK]
            # Chosen before the multiplication, so that rows are seen to start at multiples of Ci: 16-byte loads.
            pixel = tl.where(inside, first_pixel + tap_pixel, 0)
            b_x = tl.load(p_x + pixel.to(tl.int64)[:, None] * PITCH_X, inside[:, None], other=0.0)
        row = tl.where(in_rows, o_k, 0).to(tl.int64) * (GROUPS * CO)
        b_dy = tl.load(p_dy + row[:, None], in_rows[:, None], other=0.0)  # [BK, BM]
        acc = tl.dot(tl.trans(b_dy), b_x, acc, input_precision=PRECISION, out_dtype=ACC)
        o_k += BLOCK_K

    o_row = split.to(tl.int64) * stride_wz + (group * CO + o_co).to(tl.int64) * stride_wk
    o_place = c * stride_wc + r * stride_wr + s * stride_ws
    p_dw = dw_ptr + o_row[:, None] + o_place[None, :]
    tl.store(p_dw, acc.to(dw_ptr.dtype.element_ty), (o_co < CO)[:, None] & in_filter[None, :])


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    geometry: ConvGeometry,
    *,
    precision: str = "ieee",
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """dy (N, Co, P, Q), x (N, Ci, H, W) -> dw (Co, Ci/groups, R, S) in `memory_format`.

    Both of one floating dtype on one device. They are copied if they are not channels-last; on a GPU a workspace of
    splits * dw elements in the accumulator's type is taken besides. `precision` is "ieee" or "tf32" and concerns
    float32 alone. A depthwise convolution is depthwise.py's.
    """
    g = geometry
    target = runtime.target_for(dy.device)
    dw = runtime.empty(g.w_shape, "weight gradient", dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    rows = g.N * g.P * g.Q
    if rows == 0:
        return dw.zero_()
    dy = runtime.channels_last(dy, "output gradient as channels-last")
    x = runtime.channels_last(x, "input as channels-last")
    if g.depthwise:
        depthwise.weight_grad(dy, x, g, target, dw)
        return dw
    tile = tiles.choose("weight_grad", target, g, dy.dtype, precision)
    tiles_n = -(-g.R * g.S * g.Ci_group // tile.N) if tile.flat else g.R * g.S * -(-g.Ci_group // tile.N)
    programs = -(-g.Co_group // tile.M) * tiles_n
    steps = -(-rows // tile.K)
    splits = tiles.splits(target, programs=programs * g.groups, steps=steps)
    partial, strides = split_k.workspace(g, splits, dw)
    runtime.launch(
        weight_grad_kernel,
        target,
        (programs * g.groups, splits),
        dy, x, partial,
        rows, -(-steps // splits), g.H, g.W, g.P, g.Q, *strides,
        CI=g.Ci_group, CO=g.Co_group, **g.constants,
        GROUPS=g.groups, TILES_N=tiles_n,
        FLAT=tile.flat,
        INDEX=runtime.index_type(g.halo_pixels, rows + splits * tile.K),
        ACC=runtime.accumulator(dy.dtype),
        PRECISION=precision,
        BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_K=tile.K,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=partial,
    )  # fmt: skip
    split_k.add_up(partial, dw, g, target)
    return dw


@runtime.operation("weight_grad")
def _(geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> torch.Tensor:
    dy = runtime.meta_channels_last(geometry.y_shape, dtype)
    return weight_grad(dy, runtime.meta_channels_last(geometry.x_shape, dtype), geometry, precision=precision)
