"""y[n,co,p,q] = b[co] + sum_{ci,r,s} x[n,ci,p*SH+r*DH-PH,q*SW+s*DW-PW] * w[co,ci,r,s]

Implicit GEMM: M = N*P*Q rows, N = Co columns, K = R*S*Ci terms, each group by itself. One program computes a
(BLOCK_M, BLOCK_N) tile in an fp32 accumulator (fp64 for fp64): the matrix that unfold would write is read straight
from the image, element by element, and never exists.

Memory: x [N, H, W, Ci] and w [Co, R, S, Ci/groups], dense; y in any strides. Row offsets are int64.
"""

import torch
import triton.language as tl

from kernels import depthwise, runtime, tiles
from kernels.geometry import ConvGeometry


@runtime.kernel
def forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    ROWS, H, W, P, Q,
    stride_yn, stride_yc, stride_yp, stride_yq,
    CI: tl.constexpr, CO: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # CI, CO: channels of one group. ROWS = N*P*Q output pixels.
    TERMS: tl.constexpr = R * S * CI
    PITCH: tl.constexpr = GROUPS * CI
    K_BLOCKS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N

    # Neighbouring programs share their pixels, which are many, rather than their weights, which stay in L2 anyway.
    tiles_m = (ROWS + (BLOCK_M - 1)) // BLOCK_M
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N % tiles_m
    group = tl.program_id(0) // TILES_N // tiles_m

    # The output pixels of this tile, and the input pixel under each one's first tap (in the halo, perhaps).
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    q = o_m % Q
    p = o_m // Q % P
    n = o_m // Q // P
    h = p * SH - PH
    w = q * SW - PW
    first_pixel = (n * H + h) * W + w

    # Taps that fall inside the image are a range of filter rows and a range of filter columns; none past the last row.
    r_first = tl.minimum((tl.maximum(-h, 0) + (DH - 1)) // DH, R)
    r_end = tl.where(o_m < ROWS, tl.minimum((tl.maximum(H - h, 0) + (DH - 1)) // DH, R), 0)
    s_first = tl.minimum((tl.maximum(-w, 0) + (DW - 1)) // DW, S)
    s_end = tl.minimum((tl.maximum(W - w, 0) + (DW - 1)) // DW, S)

    # Columns past the last channel repeat it, inside the tensor, and are not stored.
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = (group * CO + tl.minimum(o_n, CO - 1)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)  # [BK]
    p_w = w_ptr + channel[None, :] * TERMS + o_k[:, None]  # [BK, BN]

    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    if FLAT:
        # Few channels: one step reduces over several taps at once. Terms past the last have r = R, which is outside.
        first = first_pixel.to(tl.int64) * PITCH + group * CI  # [BM]
        for k in range(0, TERMS, BLOCK_K):
            term = k + o_k  # [BK], (r*S + s)*CI + c
            r = term // (S * CI)
            s = term // CI % S
            inside = (r[None, :] >= r_first[:, None]) & (r[None, :] < r_end[:, None])  # [BM, BK]
            inside &= (s[None, :] >= s_first[:, None]) & (s[None, :] < s_end[:, None])
            # Halo addresses are kept inside the tensor: asynchronous copies read them although they are masked.
            o_term = (r * DH * W + s * DW).to(tl.int64) * PITCH + term % CI
            o_x = tl.where(inside, first[:, None] + o_term[None, :], 0)
            b_x = tl.load(x_ptr + o_x, inside, other=0.0)
            b_w = tl.load(p_w + tl.where(term < TERMS, k, -o_k)[:, None], (term < TERMS)[:, None], other=0.0)
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        # The taps inside, as one integer a row, so that the loop tests one bit: bit r*S+s, over both ranges. The sum of
        # 2**(r*S) over a range of r is a geometric series.
        one = tl.full((BLOCK_M,), 1, BITS)
        row_bits = ((one << tl.maximum(r_end, r_first) * S) - (one << r_first * S)) // (2**S - 1)
        taps_inside = row_bits * ((one << tl.maximum(s_end, s_first)) - (one << s_first))  # [BM]
        p_x = x_ptr + group * CI + o_k[None, :]  # [1, BK]
        row_step = W * DH
        # One flattened loop over (tap, channel block), so that loads of the next tap are in flight during this one.
        for step in range(R * S * K_BLOCKS):
            tap = step // K_BLOCKS  # r*S + s
            c = step % K_BLOCKS * BLOCK_K
            inside = ((taps_inside >> tap) & 1) != 0  # [BM]
            # Halo addresses are kept inside the tensor: asynchronous copies read them although they are masked.
            pixel = tl.where(inside, first_pixel + (tap // S * row_step + tap % S * DW), 0)
            o_x = pixel.to(tl.int64)[:, None] * PITCH
            if CI % BLOCK_K == 0:
                b_x = tl.load(p_x + (o_x + c), inside[:, None], other=0.0)
                b_w = tl.load(p_w + step * BLOCK_K)
            else:
                # Lanes past the last channel go back to the first, inside the tensor, and are masked.
                in_group = c + o_k < CI
                lane = tl.where(in_group, c, -o_k)
                b_x = tl.load(p_x + lane[None, :] + o_x, inside[:, None] & in_group[None, :], other=0.0)
                b_w = tl.load(p_w + (tap * CI + lane)[:, None], in_group[:, None], other=0.0)
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACC)

    if b_ptr is not None:
        acc += tl.load(b_ptr + channel).to(ACC)[None, :]
    o_y = n.to(tl.int64) * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    p_y = y_ptr + o_y[:, None] + (channel * stride_yc)[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), (o_m < ROWS)[:, None] & (o_n < CO)[None, :])


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    *,
    precision: str = "ieee",
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y (N, Co, P, Q) in `memory_format`.

    All of one floating dtype on one device. x and w are copied if they are not channels-last, bias if it is not dense.
    `precision` is "ieee" or "tf32" and concerns float32 alone. A depthwise convolution is depthwise.py's.
    """
    g = geometry
    target = runtime.target_for(x.device)
    y = runtime.empty(g.y_shape, "output", dtype=x.dtype, device=x.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    x = runtime.channels_last(x, "input as channels-last")
    w = runtime.channels_last(w, "weight as channels-last")
    bias = bias if bias is None else runtime.dense(bias, "dense bias")
    if g.depthwise:
        depthwise.forward(x, w, bias, g, target, y)
        return y
    rows = g.N * g.P * g.Q
    tile = tiles.choose("forward", target, g, x.dtype, precision)
    runtime.launch(
        forward_kernel,
        target,
        (-(-rows // tile.M) * -(-g.Co_group // tile.N) * g.groups, 1),
        x, w, bias, y,
        rows, g.H, g.W, g.P, g.Q, *y.stride(),
        CI=g.Ci_group, CO=g.Co_group, **g.constants,
        GROUPS=g.groups,
        FLAT=tile.flat,
        INDEX=runtime.index_type(g.halo_pixels, rows + tile.M),
        BITS=runtime.index_type(2 ** (g.R * g.S)),
        ACC=runtime.accumulator(x.dtype),
        PRECISION=precision,
        BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_K=tile.K,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=y,
    )  # fmt: skip
    return y


@runtime.operation("forward")
def _(geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> torch.Tensor:
    x = runtime.meta_channels_last(geometry.x_shape, dtype)
    w = runtime.meta_channels_last(geometry.w_shape, dtype)
    bias = torch.empty(geometry.Co, dtype=dtype, device="meta")
    return forward(x, w, bias, geometry, precision=precision)
