"""dx[n,ci,h,w] = sum_{co,r,s} dy[n,co,p,q] * w[co,ci,r,s]   over the (p, q) with h = p*SH+r*DH-PH, w = q*SW+s*DW-PW

Residue classes: an input row h = a + SH*i meets only the filter rows with r*DH = a + PH (mod SH). Those are
r = r0 + t*SH/g with g = gcd(SH, DH), and tap t reads output row p = i + p0 - t*DH/g. So each of the SH*SW classes
(a, b) is a dense convolution of stride 1 with its own share of the filter, and no zero is ever inserted; a class that
no tap meets writes zeros.

Implicit GEMM of one class: M = its input pixels, N = Ci columns, K = its taps * Co terms, each group by itself; fp32
accumulator (fp64 for fp64). Where a ReLU follows the convolution, `mask` is its output: dy counts as 0 where that is
not positive, decided as dy is loaded. Memory: dy and mask [N, P, Q, Co], dense; w [Co, R, S, Ci/groups], or transposed
within each group [Ci/groups, R, S, Co/groups]; dx in any strides. Row offsets are int64.
"""

from functools import partial
from math import gcd

import torch
import triton.language as tl

from kernels import depthwise, few_channels, runtime, tiles, tuning
from kernels.forward import product
from kernels.geometry import ConvGeometry


@runtime.kernel
def input_grad_kernel(
    dy_ptr, w_ptr, dx_ptr, mask_ptr,
    N, ROWS, STEPS, H, W, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wk: tl.constexpr, stride_wt: tl.constexpr, stride_wc: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DP: tl.constexpr, DQ: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr, INVERSE_R: tl.constexpr, INVERSE_S: tl.constexpr,
    CLASSES_W: tl.constexpr, GROUPS: tl.constexpr,
    INDEX: tl.constexpr, SPAN: tl.constexpr, WEIGHT_INDEX: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # CI, CO: channels of one group. ROWS: pixels of the largest class. STEPS of the main loop, where there is one class
    # (see forward.py). From a tap of a class to the next it is STEP_R filter rows and DP output rows.
    PITCH: tl.constexpr = GROUPS * CO
    K_BLOCKS: tl.constexpr = (CO + BLOCK_K - 1) // BLOCK_K
    UNIT: tl.constexpr = BLOCK_K if CO % BLOCK_K == 0 else 1
    TILES_N: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N

    tiles_m = (ROWS + (BLOCK_M - 1)) // BLOCK_M
    tile_n = tl.program_id(0) % TILES_N
    tile_m = tl.program_id(0) // TILES_N % tiles_m
    group = tl.program_id(0) // TILES_N // tiles_m % GROUPS

    # The residue class: its first row and column, how many it has, its first tap, and how many taps.
    if SH == 1 and SW == 1:
        a = 0
        b = 0
        rows = H
        columns = W
        r0 = 0
        s0 = 0
        taps_r = R
        taps_s = S
        steps = STEPS
    else:
        residue = tl.program_id(0) // TILES_N // tiles_m // GROUPS
        a = residue // CLASSES_W
        b = residue % CLASSES_W
        rows = (H - a + (SH - 1)) // SH
        columns = (W - b + (SW - 1)) // SW
        # The product is of two numbers below the stride, and so may need 64 bits.
        r0 = ((a + PH) // (SH // STEP_R) % STEP_R * tl.full((), INVERSE_R, tl.int64) % STEP_R).to(tl.int32)
        s0 = ((b + PW) // (SW // STEP_S) % STEP_S * tl.full((), INVERSE_S, tl.int64) % STEP_S).to(tl.int32)
        taps_r = tl.where((a + PH) % (SH // STEP_R) == 0, (tl.maximum(R - r0, 0) + (STEP_R - 1)) // STEP_R, 0)
        taps_s = tl.where((b + PW) % (SW // STEP_S) == 0, (tl.maximum(S - s0, 0) + (STEP_S - 1)) // STEP_S, 0)
        steps = taps_r * taps_s * (K_BLOCKS // PARTS)

    # The input pixels of this tile, and the output pixel that each one's first tap reads. Rows past the last repeat
    # some of the last image, and are not stored.
    o_m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    j = o_m % columns
    i = o_m // columns % rows
    n = o_m // columns // rows
    stored = n < N
    n = tl.minimum(n, N - 1)
    p = i + (a + PH - r0 * DH) // SH
    q = j + (b + PW - s0 * DW) // SW
    first_pixel = (n * P + p) * Q + q

    # Taps that read inside dy are a range over rows and a range over columns.
    t_first = tl.minimum((tl.maximum(p - (P - 1), 0) + (DP - 1)) // DP, taps_r)
    t_end = tl.minimum(tl.maximum(p + DP, 0) // DP, taps_r)
    u_first = tl.minimum((tl.maximum(q - (Q - 1), 0) + (DQ - 1)) // DQ, taps_s)
    u_end = tl.minimum(tl.maximum(q + DQ, 0) // DQ, taps_s)

    # Columns past the last channel repeat it, inside the tensor, and are not stored.
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    channel = o_n if CI % BLOCK_N == 0 else tl.minimum(o_n, CI - 1)
    o_k = tl.arange(0, BLOCK_K)  # [BK]
    p_w = w_ptr + group.to(tl.int64) * (CO * R * S * CI) + channel.to(WEIGHT_INDEX)[None, :] * stride_wc  # [1, BN]

    # A row's pointer is to the pixel under its first tap; a tap outside goes from there `back` to the nearest pixel of
    # dy (see forward.py, also for the loop).
    p_dy = dy_ptr + group * CO + first_pixel.to(tl.int64)[:, None] * PITCH  # [BM, 1]
    if mask_ptr is not None:
        p_mask = mask_ptr + group * CO + first_pixel.to(tl.int64)[:, None] * PITCH
    down = tl.minimum(tl.maximum(p, 0), P - 1) - p
    right = tl.minimum(tl.maximum(q, 0), Q - 1) - q
    back = ((down * Q + right).to(SPAN) * (PITCH // UNIT))[:, None]  # [BM, 1]
    if CO % BLOCK_K == 0:
        p_dy += o_k[None, :]
        p_w += o_k.to(WEIGHT_INDEX)[:, None] * stride_wk
        if mask_ptr is not None:
            p_mask += o_k[None, :]
    if BITS is not None:
        # The taps inside, as one integer a row: bit t*S+u.
        one = tl.full((BLOCK_M,), 1, BITS)
        row_bits = ((one << tl.maximum(t_end, t_first) * S) - (one << t_first * S)) // (2**S - 1)
        taps_inside = row_bits * ((one << tl.maximum(u_end, u_first)) - (one << u_first))  # [BM]
        bit = tl.full((), 1, BITS)

    REST: tl.constexpr = (K_BLOCKS - PARTS) * BLOCK_K  # of a tap's channels, after its first step
    next_tap = tl.full((), -DQ * PITCH // UNIT, SPAN)
    next_row = (tl.full((), DQ, SPAN) * (taps_s - 1) - tl.full((), DP, SPAN) * Q) * (PITCH // UNIT)
    UNIT_W: tl.constexpr = UNIT if stride_wk == 1 else stride_wt
    PART_W: tl.constexpr = BLOCK_K * stride_wk // UNIT_W
    TAP_W: tl.constexpr = stride_wt // UNIT_W
    next_filter_row = STEP_R * S - (taps_s - 1) * STEP_S
    o_dy = tl.full((), 0, SPAN)
    o_w = (tl.full((), 0, WEIGHT_INDEX) + r0 * S + s0) * TAP_W
    t = tl.full((), 0, tl.int32)
    u = tl.full((), 0, tl.int32)
    c = tl.full((), 0, tl.int32)
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for _ in range(steps):
        if R == 1 and S == 1 and PH == 0 and PW == 0:
            inside = tl.full((BLOCK_M, 1), True, tl.int1)
        elif BITS is not None:
            inside = (taps_inside & bit)[:, None] != 0  # [BM, 1]
        else:
            inside = ((t >= t_first) & (t < t_end) & (u >= u_first) & (u < u_end))[:, None]
        if CO % BLOCK_K == 0:
            o_tap = tl.where(inside, o_dy, back).to(tl.int64) * UNIT  # [BM, 1]
            p_tap = p_dy + o_tap  # [BM, BK]
            for part in tl.static_range(PARTS):
                b_dy = tl.load(p_tap + part * BLOCK_K, inside, other=0.0)
                if mask_ptr is not None:
                    b_mask = tl.load(p_mask + o_tap + part * BLOCK_K, inside, other=0.0)
                    b_dy = tl.where(b_mask <= 0, 0.0, b_dy)
                b_w = tl.load(p_w + (o_w + part * PART_W) * UNIT_W)
                acc = tl.dot(b_dy, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            # Lanes past the last channel go back to the first, inside the tensor, and are masked.
            in_group = c + o_k < CO
            lane = tl.where(in_group, o_k, -c)
            o_tap = tl.where(inside, o_dy, back + c).to(tl.int64)  # [BM, 1]
            b_dy = tl.load(p_dy + o_tap + lane[None, :], inside & in_group[None, :], other=0.0)
            if mask_ptr is not None:
                b_mask = tl.load(p_mask + o_tap + lane[None, :], inside & in_group[None, :], other=0.0)
                b_dy = tl.where(b_mask <= 0, 0.0, b_dy)
            p_lane = p_w + lane.to(WEIGHT_INDEX)[:, None] * stride_wk  # [BK, BN]
            b_w = tl.load(p_lane + o_w * UNIT_W, in_group[:, None], other=0.0)
            acc = tl.dot(b_dy, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
        if K_BLOCKS == PARTS:
            last = True  # of this tap's channels
            u += 1
        else:
            c += PARTS * BLOCK_K
            last = c == K_BLOCKS * BLOCK_K
            c = tl.where(last, 0, c)
            u += tl.where(last, 1, 0)
        last_in_row = u == taps_s
        to_tap = tl.where(last_in_row, next_row, next_tap) - REST // UNIT
        o_dy += tl.where(last, to_tap, PARTS * BLOCK_K // UNIT)
        to_tap_w = tl.where(last_in_row, next_filter_row, STEP_S) * TAP_W - (K_BLOCKS - PARTS) * PART_W
        o_w += tl.where(last, to_tap_w, PARTS * PART_W)
        if BITS is not None:
            bit = tl.where(last, bit << tl.where(last_in_row, 1 + S - taps_s, 1), bit)
        else:
            t += tl.where(last_in_row, 1, 0)
        u = tl.where(last_in_row, 0, u)

    h = a + i * SH
    w = b + j * SW
    o_dx = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    p_dx = dx_ptr + o_dx[:, None] + ((group * CI + o_n).to(tl.int64) * stride_xc)[None, :]
    tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), stored[:, None] & (o_n < CI)[None, :])


def input_grad(
    dy: torch.Tensor,
    w: torch.Tensor,
    geometry: ConvGeometry,
    *,
    mask: torch.Tensor | None = None,
    precision: str = "ieee",
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """dy (N, Co, P, Q), w (Co, Ci/groups, R, S), mask as dy or None -> dx (N, Ci, H, W) in `memory_format`.

    All of one floating dtype on one device. They are copied if they are not channels-last, and w where
    `tiles.transposes_weights` says so. `precision` is "ieee" or "tf32" and concerns float32 alone. A depthwise
    convolution is depthwise.py's.
    """
    g = geometry
    target = runtime.target_for(dy.device)
    dx = runtime.empty(g.x_shape, "input gradient", dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    if dx.numel() == 0:
        return dx
    dy = runtime.channels_last(dy, "output gradient as channels-last")
    mask = mask if mask is None else runtime.channels_last(mask, "mask as channels-last")
    w = runtime.channels_last(w, "weight as channels-last")
    if g.depthwise:
        depthwise.input_grad(dy, w, g, target, dx, mask=mask)
        return dx
    if tiles.packs_classes(target, g):
        classes = few_channels.classes(w, g, target)
        shape = (g.N, classes.geometry.Co, -(-g.H // g.SH), -(-g.W // g.SW))
        packed = runtime.empty(
            shape, "residue classes", dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last
        )
        product(dy, classes.filters, None, packed, classes.geometry, target, precision, mask=mask)
        few_channels.unpack(packed, g, dx)
        return dx
    common_h, common_w = gcd(g.SH, g.DH), gcd(g.SW, g.DW)
    step_r, step_s = g.SH // common_h, g.SW // common_w
    rows = g.residue_class_pixels
    classes_h, classes_w = g.residue_classes

    def run(tile: tiles.Tile) -> None:
        transposed = tiles.transposes_weights("input_grad", target, dy.dtype, precision)
        matrix, (stride_wk, stride_wt, stride_wc) = runtime.filter_matrix(w, g, transposed=transposed)
        runtime.launch(
            input_grad_kernel,
            target,
            (-(-rows // tile.M) * -(-g.Ci_group // tile.N) * g.groups * classes_h * classes_w, 1),
            dy, matrix, dx, mask,
            g.N, rows, g.R * g.S * -(-g.Co_group // (tile.K * tile.parts)), g.H, g.W, g.P, g.Q, *dx.stride(),
            stride_wk=stride_wk, stride_wt=stride_wt, stride_wc=stride_wc,
            CI=g.Ci_group, CO=g.Co_group, **g.constants,
            DP=g.DH // common_h, DQ=g.DW // common_w,
            STEP_R=step_r, STEP_S=step_s,
            # r0 solves r0 * DH/g = (a + PH)/g (mod SH/g).
            INVERSE_R=pow(g.DH // common_h, -1, step_r), INVERSE_S=pow(g.DW // common_w, -1, step_s),
            CLASSES_W=classes_w, GROUPS=g.groups,
            INDEX=runtime.index_type(g.output_halo_pixels, rows + tile.M),
            SPAN=runtime.index_type(g.filter_span * g.Co),
            WEIGHT_INDEX=runtime.index_type(g.Co_group * g.R * g.S * g.Ci_group),
            BITS=runtime.index_type(2 ** (g.R * g.S)) if g.R * g.S <= tiles.MOST_BITS else None,
            ACC=runtime.accumulator(dy.dtype),
            PRECISION=precision,
            BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_K=tile.K, PARTS=tile.parts,
            num_warps=tile.num_warps, num_stages=tile.num_stages, output=dx,
        )  # fmt: skip

    run(tuning.tile(tiles.masked("input_grad", mask), target, g, dy, precision, run))
    return dx


def _ahead(geometry: ConvGeometry, dtype: torch.dtype, precision: str, *, masked: bool) -> torch.Tensor:
    dy = runtime.meta_channels_last(geometry.y_shape, dtype)
    w = runtime.meta_channels_last(geometry.w_shape, dtype)
    mask = runtime.meta_channels_last(geometry.y_shape, dtype) if masked else None
    return input_grad(dy, w, geometry, mask=mask, precision=precision)


runtime.operation("input_grad")(partial(_ahead, masked=False))
runtime.operation("input_grad_masked")(partial(_ahead, masked=True))
