"""y[n,co,p,q] = b[co] + sum_{ci,r,s} x[n,ci,p*SH+r*DH-PH,q*SW+s*DW-PW] * w[co,ci,r,s]

Implicit GEMM: M = N*P*Q rows, N = Co columns, K = R*S*Ci terms, each group by itself. One program computes a
(BLOCK_M, BLOCK_N) tile in an fp32 accumulator (fp64 for fp64): the matrix that unfold would write is read straight
from the image, element by element, and never exists. With RELU, y is max(that, 0); NaN stays NaN.

Memory: x [N, H, W, Ci], dense; w [Co, R, S, Ci/groups], or transposed within each group [Ci/groups, R, S, Co/groups];
y in any strides. Row offsets are int64.
"""

from functools import partial

import torch
import triton.language as tl

from kernels import depthwise, few_channels, runtime, tiles, tuning
from kernels.geometry import ConvGeometry


@runtime.kernel
def forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mask_ptr,
    ROWS, STEPS, H, W, P, Q,
    stride_yn, stride_yc, stride_yp, stride_yq,
    stride_wk: tl.constexpr, stride_wt: tl.constexpr, stride_wc: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr, PITCH: tl.constexpr, USED: tl.constexpr, HALO: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SPAN: tl.constexpr, WEIGHT_INDEX: tl.constexpr, BITS: tl.constexpr,
    RELU: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # mask: None, or as x, which counts as 0 where the mask is not positive. CI, CO: channels of one group. PITCH:
    # elements from a pixel of x to the next. USED: channels that count, all but for few_channels.py. HALO: whether any
    # tap falls outside the image. ROWS = N*P*Q output pixels. STEPS of the main loop, known at the launch alone: a
    # short loop of known length is unrolled, and then holds all its loads in registers at once.
    TERMS: tl.constexpr = R * S * CI
    K_BLOCKS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N

    # Neighbouring programs share their pixels, which are many, rather than their weights, which stay in L2 anyway.
    tiles_m = (ROWS + (BLOCK_M - 1)) // BLOCK_M
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N % tiles_m
    group = tl.program_id(0) // TILES_N // tiles_m

    # The output pixels of this tile, and the input pixel under each one's first tap (in the halo, perhaps). Rows past
    # the last repeat it, and are not stored.
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    row = tl.minimum(o_m, ROWS - 1)
    q = row % Q
    p = row // Q % P
    n = row // Q // P
    h = p * SH - PH
    w = q * SW - PW
    first_pixel = (n * H + h) * W + w

    # Taps that fall inside the image are a range of filter rows and a range of filter columns.
    r_first = tl.minimum((tl.maximum(-h, 0) + (DH - 1)) // DH, R)
    r_end = tl.minimum((tl.maximum(H - h, 0) + (DH - 1)) // DH, R)
    s_first = tl.minimum((tl.maximum(-w, 0) + (DW - 1)) // DW, S)
    s_end = tl.minimum((tl.maximum(W - w, 0) + (DW - 1)) // DW, S)

    # Columns past the last channel repeat it, inside the tensor, and are not stored.
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = (o_n if CO % BLOCK_N == 0 else tl.minimum(o_n, CO - 1)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)  # [BK]
    p_w = w_ptr + group.to(tl.int64) * (CO * TERMS) + channel[None, :] * stride_wk  # [1, BN]

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
            if mask_ptr is not None:
                b_x = tl.where(tl.load(mask_ptr + o_x, inside, other=0.0) <= 0, 0.0, b_x)
            b_w = tl.load(p_w + tl.where(term < TERMS, term, 0)[:, None], (term < TERMS)[:, None], other=0.0)
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        # The taps inside, as one integer a row, so that the loop tests one bit: bit r*S+s, over both ranges. The sum of
        # 2**(r*S) over a range of r is a geometric series.
        one = tl.full((BLOCK_M,), 1, BITS)
        row_bits = ((one << tl.maximum(r_end, r_first) * S) - (one << r_first * S)) // (2**S - 1)
        taps_inside = row_bits * ((one << tl.maximum(s_end, s_first)) - (one << s_first))  # [BM]

        # A row's pointer is to the pixel under its first tap. A tap in the halo goes from there `back` to the nearest
        # pixel of the image: asynchronous copies read masked addresses too. Offsets count UNIT elements, so that the
        # compiler sees what they are multiples of, and loads 16 bytes at once.
        UNIT: tl.constexpr = BLOCK_K if CI % BLOCK_K == 0 else 1
        p_x = x_ptr + group * CI + first_pixel.to(tl.int64)[:, None] * PITCH  # [BM, 1]
        if mask_ptr is not None:
            p_mask = mask_ptr + group * CI + first_pixel.to(tl.int64)[:, None] * PITCH
        down = tl.minimum(tl.maximum(h, 0), H - 1) - h
        right = tl.minimum(tl.maximum(w, 0), W - 1) - w
        back = ((down * W + right).to(SPAN) * (PITCH // UNIT))[:, None]  # [BM, 1]
        if CI % BLOCK_K == 0:
            p_x += o_k[None, :]
            p_w += o_k.to(WEIGHT_INDEX)[:, None] * stride_wc
            if mask_ptr is not None:
                p_mask += o_k[None, :]

        # One flattened loop over (tap, channel block), so that loads of the next tap are in flight during this one. All
        # that changes with a step is a scalar and advances by addition, chosen by `where`: a branch ends pipelining.
        ROW_STARTS: tl.constexpr = (2 ** (R * S) - 1) // (2**S - 1) - 1  # bit r*S for each r > 0
        next_row = (tl.full((), DH, SPAN) * W - (S - 1) * DW) * PITCH // UNIT
        REST: tl.constexpr = (K_BLOCKS - PARTS) * BLOCK_K // UNIT  # of a tap's channels, after its first step
        UNIT_W: tl.constexpr = UNIT if stride_wc == 1 else stride_wt
        PART_W: tl.constexpr = BLOCK_K * stride_wc // UNIT_W
        bit = tl.full((), 1, BITS)
        o_x = tl.full((), 0, SPAN)
        o_w = tl.full((), 0, WEIGHT_INDEX)
        c = tl.full((), 0, tl.int32)
        for _ in range(STEPS):
            if HALO:
                inside = (taps_inside & bit)[:, None] != 0  # [BM, 1]
            else:
                inside = tl.full((BLOCK_M, 1), True, tl.int1)
            if CI % BLOCK_K == 0:
                o_tap = tl.where(inside, o_x, back).to(tl.int64) * UNIT  # [BM, 1]
                p_tap = p_x + o_tap  # [BM, BK]
                # Parts of one tap's channels share its addresses and its mask.
                for part in tl.static_range(PARTS):
                    mask = inside if USED == CI else inside & (c + part * BLOCK_K + o_k < USED)[None, :]
                    b_x = tl.load(p_tap + part * BLOCK_K, mask, other=0.0)
                    if mask_ptr is not None:
                        b_mask = tl.load(p_mask + o_tap + part * BLOCK_K, mask, other=0.0)
                        b_x = tl.where(b_mask <= 0, 0.0, b_x)
                    b_w = tl.load(p_w + (o_w + part * PART_W) * UNIT_W)
                    acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                # Lanes past the last channel go back to the first, inside the tensor, and are masked.
                in_group = c + o_k < CI
                lane = tl.where(in_group, o_k, -c)
                o_tap = tl.where(inside, o_x, back + c).to(tl.int64)  # [BM, 1]
                b_x = tl.load(p_x + o_tap + lane[None, :], inside & in_group[None, :], other=0.0)
                if mask_ptr is not None:
                    b_mask = tl.load(p_mask + o_tap + lane[None, :], inside & in_group[None, :], other=0.0)
                    b_x = tl.where(b_mask <= 0, 0.0, b_x)
                p_lane = p_w + lane.to(WEIGHT_INDEX)[:, None] * stride_wc  # [BK, BN]
                b_w = tl.load(p_lane + o_w * UNIT_W, in_group[:, None], other=0.0)
                acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
            if K_BLOCKS == PARTS:
                bit <<= 1
                o_x += tl.where((bit & ROW_STARTS) != 0, next_row, DW * PITCH // UNIT)
                o_w += stride_wt // UNIT_W
            else:
                c += PARTS * BLOCK_K
                last = c == K_BLOCKS * BLOCK_K  # of this tap's channels
                bit = tl.where(last, bit << 1, bit)
                next_tap = tl.where((bit & ROW_STARTS) != 0, next_row, DW * PITCH // UNIT)
                o_x += tl.where(last, next_tap - REST, PARTS * BLOCK_K // UNIT)
                o_w += tl.where(last, stride_wt // UNIT_W - (K_BLOCKS - PARTS) * PART_W, PARTS * PART_W)
                c = tl.where(last, 0, c)

    if b_ptr is not None:
        acc += tl.load(b_ptr + group * CO + channel).to(ACC)[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)
    o_y = n.to(tl.int64) * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    p_y = y_ptr + o_y[:, None] + ((group * CO + channel) * stride_yc)[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), (o_m < ROWS)[:, None] & (o_n < CO)[None, :])


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    *,
    relu: bool = False,
    precision: str = "ieee",
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """x (N, Ci, H, W), w (Co, Ci/groups, R, S), bias (Co,) or None -> y (N, Co, P, Q), or relu(y), in `memory_format`.

    All of one floating dtype on one device. x and w are copied if they are not channels-last, bias if it is not dense,
    and w where `tiles.transposes_weights` says so.
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
        depthwise.forward(x, w, bias, g, target, y, relu=relu)
        return y
    if tiles.takes_windows(target, g):
        windows = few_channels.windows(x, g, target)
        w = few_channels.filter_rows(w, g, windows)
        product(windows.z, w, bias, y, windows.geometry, target, precision, windows=windows, relu=relu)
    else:
        product(x, w, bias, y, g, target, precision, relu=relu)
    return y


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    geometry: ConvGeometry,
    target: runtime.Target,
    precision: str,
    *,
    windows: few_channels.Windows | None = None,
    mask: torch.Tensor | None = None,
    relu: bool = False,
) -> None:
    """x (N, Ci, H, W), or `windows`, and w (Co, Ci/groups, R, S), channels-last, bias (Co,), dense, -> into y.

    mask (N, Ci, H, W), channels-last, lets through what of x lies under its positive elements.
    y (N, Co, P, Q) may have more rows and columns than the geometry gives: they are what the taps that still fall on
    the image give.
    """
    g = geometry
    P, Q = y.shape[2:]
    rows = g.N * P * Q
    row, pixel, used = (windows.row, windows.pixel, windows.used) if windows else (g.W, g.Ci, g.Ci_group)

    def run(tile: tiles.Tile) -> None:
        transposed = not tile.flat and tiles.transposes_weights("forward", target, x.dtype, precision)
        matrix, (stride_wk, stride_wt, stride_wc) = runtime.filter_matrix(w, g, transposed=transposed)
        runtime.launch(
            forward_kernel,
            target,
            (-(-rows // tile.M) * -(-g.Co_group // tile.N) * g.groups, 1),
            x, matrix, bias, y, mask,
            rows, g.R * g.S * -(-g.Ci_group // (tile.K * tile.parts)), g.H, row, P, Q, *y.stride(),
            stride_wk=stride_wk, stride_wt=stride_wt, stride_wc=stride_wc,
            CI=g.Ci_group, CO=g.Co_group, **g.constants,
            GROUPS=g.groups, PITCH=pixel, USED=used,
            HALO=g.PH > 0 or g.PW > 0 or P > g.P or Q > g.Q,
            FLAT=tile.flat,
            INDEX=runtime.index_type(g.halo_pixels, g.N * g.H * row, rows + tile.M),
            SPAN=runtime.index_type(g.filter_span * row // g.W * pixel),
            WEIGHT_INDEX=runtime.index_type(g.Co_group * g.R * g.S * g.Ci_group),
            BITS=runtime.index_type(2 ** (g.R * g.S)) if g.R * g.S <= tiles.MOST_BITS else None,
            RELU=relu, ACC=runtime.accumulator(x.dtype),
            PRECISION=precision,
            BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_K=tile.K, PARTS=tile.parts,
            num_warps=tile.num_warps, num_stages=tile.num_stages, output=y,
        )  # fmt: skip

    run(tuning.tile(tiles.masked("forward", mask), target, g, x, precision, run))


def _ahead(geometry: ConvGeometry, dtype: torch.dtype, precision: str, *, relu: bool) -> torch.Tensor:
    x = runtime.meta_channels_last(geometry.x_shape, dtype)
    w = runtime.meta_channels_last(geometry.w_shape, dtype)
    bias = torch.empty(geometry.Co, dtype=dtype, device="meta")
    return forward(x, w, bias, geometry, relu=relu, precision=precision)


runtime.operation("forward")(partial(_ahead, relu=False))
runtime.operation("forward_relu")(partial(_ahead, relu=True))
