"""dw[co,ci,r,s] = sum_{n,p,q} dy[n,co,p,q] * x[n,ci,p*SH+r*DH-PH,q*SW+s*DW-PW]

Implicit GEMM: M = Co rows, N = R*S*Ci columns, K = N*P*Q terms, each group by itself; fp32 accumulator (fp64 for
fp64). The reduction is long and the result small, so it is split over programs: see split_k.py.

Where a ReLU follows the convolution, `mask` is its output: dy counts as 0 where that is not positive, decided as dy is
loaded. Memory: dy and mask [N, P, Q, Co] and x [N, H, W, Ci], dense; dw in any strides. Row offsets are int64.
"""

from functools import partial

import torch
import triton.language as tl

from kernels import depthwise, few_channels, runtime, split_k, tiles, tuning
from kernels.geometry import ConvGeometry


@runtime.kernel
def weight_grad_kernel(
    dy_ptr, x_ptr, dw_ptr, mask_ptr,
    N, TERMS, STEPS, H, W, P, Q,
    stride_wz, stride_wk, stride_wc, stride_wr, stride_ws,
    CI: tl.constexpr, CO: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr, PITCH: tl.constexpr, TILES_N: tl.constexpr,
    FLAT: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, PATCHES_W: tl.constexpr, RAGGED: tl.constexpr,
    INDEX: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # CI, CO: channels of one group. PITCH: elements from a pixel of x to the next. Each split takes STEPS blocks of
    # BLOCK_K of the TERMS output pixels; or, unless FLAT, STEPS of the TERMS patches that all images are cut into.
    PITCH_DY: tl.constexpr = GROUPS * CO
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
    p_dy = dy_ptr + (group * CO + co)[:, None]  # [BM, 1]
    if mask_ptr is not None:
        p_mask = mask_ptr + (group * CO + co)[:, None]
    p_x = x_ptr + (group * CI + ci)[None, :]  # [1, BN]

    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    if FLAT:
        o_k = (split * STEPS).to(INDEX) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK] output pixels
        o_tap = (r * DH * W + s * DW).to(tl.int64) * PITCH  # [BN]
        for _ in range(STEPS):
            q = o_k % Q
            p = o_k // Q % P
            n = o_k // Q // P
            in_images = o_k < TERMS
            h = p * SH - PH
            w = q * SW - PW
            # The taps inside are a range of filter rows and a range of filter columns.
            r_first = (tl.maximum(-h, 0) + (DH - 1)) // DH
            r_end = tl.where(in_images, tl.minimum((tl.maximum(H - h, 0) + (DH - 1)) // DH, R), 0)
            s_first = (tl.maximum(-w, 0) + (DW - 1)) // DW
            s_end = (tl.maximum(W - w, 0) + (DW - 1)) // DW
            inside = (r[None, :] >= r_first[:, None]) & (r[None, :] < r_end[:, None])  # [BK, BN]
            inside &= (s[None, :] >= s_first[:, None]) & (s[None, :] < s_end[:, None])
            # Halo addresses are kept inside the tensor: asynchronous copies read them although they are masked.
            first = ((n * H + h) * W + w).to(tl.int64) * PITCH
            b_x = tl.load(p_x + tl.where(inside, first[:, None] + o_tap[None, :], 0), inside, other=0.0)
            pixel = tl.where(in_images, o_k, 0).to(tl.int64)
            b_dy = tl.load(p_dy + pixel[None, :] * PITCH_DY, in_images[None, :], other=0.0)  # [BM, BK]
            if mask_ptr is not None:
                b_mask = tl.load(p_mask + pixel[None, :] * PITCH_DY, in_images[None, :], other=0.0)
                b_dy = tl.where(b_mask <= 0, 0.0, b_dy)
            acc = tl.dot(b_dy, b_x, acc, input_precision=PRECISION, out_dtype=ACC)
            o_k += BLOCK_K
    else:
        # A step reduces over a patch of PATCH_H x PATCH_W output pixels, of several images where one is too small, so
        # that a lane's place in its patch never changes, and what changes is one for all lanes: the first image and
        # the patch (y, z) in it.
        IMAGES: tl.constexpr = BLOCK_K // (PATCH_H * PATCH_W)
        DOWN: tl.constexpr = PATCH_H * SH  # input rows from a patch to the one below
        ASIDE: tl.constexpr = PATCH_W * SW  # input columns to the next
        patches_h = (P + (PATCH_H - 1)) // PATCH_H
        o_k = tl.arange(0, BLOCK_K).to(INDEX)
        n = o_k // (PATCH_H * PATCH_W)  # [BK]
        p = o_k // PATCH_W % PATCH_H
        q = o_k % PATCH_W
        h = p * SH + (r * DH - PH)
        w = q * SW + (s * DW - PW)

        # The patches in which a lane is a pixel of dy, and those in which its tap falls inside the image as well, are
        # ranges over y and over z.
        y_end = (P - p + (PATCH_H - 1)) // PATCH_H
        z_end = (Q - q + (PATCH_W - 1)) // PATCH_W
        y_in = tl.minimum((tl.maximum(-h, 0) + (DOWN - 1)) // DOWN, y_end)
        y_out = tl.maximum(tl.minimum((tl.maximum(H - h, 0) + (DOWN - 1)) // DOWN, y_end), y_in)
        z_in = tl.minimum((tl.maximum(-w, 0) + (ASIDE - 1)) // ASIDE, z_end)
        z_out = tl.maximum(tl.minimum((tl.maximum(W - w, 0) + (ASIDE - 1)) // ASIDE, z_end), z_in)

        first = split.to(INDEX) * STEPS
        y = first // PATCHES_W % patches_h
        z = first % PATCHES_W
        image = first // PATCHES_W // patches_h * IMAGES
        o_dy = (image * P + y * PATCH_H) * Q + z * PATCH_W
        o_x = (image * H + y * DOWN) * W + z * ASIDE
        lane_dy = (n * P + p) * Q + q
        lane_x = (n * H + h) * W + w
        if BITS is not None:
            # Both ranges as one integer a lane (see forward.py): bit y*PATCHES_W+z.
            one = tl.full((BLOCK_K,), 1, BITS)
            ROW: tl.constexpr = 2**PATCHES_W - 1
            rows = ((one << y_out * PATCHES_W) - (one << y_in * PATCHES_W)) // ROW
            patches_inside = rows * ((one << z_out) - (one << z_in))  # [BK]
            patches_of_dy = ((one << y_end * PATCHES_W) - 1) // ROW * ((one << z_end) - 1)  # [BK]
            bit = tl.full((), 1, BITS) << (y * PATCHES_W + z)

        # From a patch to the next, from the last of a row of patches to the row below, and to the next image.
        row_dy = tl.full((), Q, INDEX)
        row_x = tl.full((), W, INDEX)
        next_row_dy = row_dy * PATCH_H - (PATCHES_W - 1) * PATCH_W
        next_row_x = row_x * DOWN - (PATCHES_W - 1) * ASIDE
        next_image_dy = next_row_dy + row_dy * (IMAGES * P - patches_h * PATCH_H)
        next_image_x = next_row_x + row_x * (IMAGES * H - patches_h * DOWN)
        for _ in range(tl.minimum(STEPS, TERMS - first)):
            if PH == 0 and PW == 0 and not RAGGED:
                inside = tl.full((BLOCK_K, 1), True, tl.int1)
            elif BITS is not None:
                inside = (patches_inside & bit)[:, None] != 0  # [BK, 1]
            else:
                inside = ((y >= y_in) & (y < y_out) & (z >= z_in) & (z < z_out))[:, None]
            if IMAGES > 1:
                inside &= (n < N - image)[:, None]
            # Lanes outside go back to the first pixel of all: asynchronous copies read masked addresses too.
            p_patch = p_x + o_x.to(tl.int64) * PITCH
            b_x = tl.load(p_patch + tl.where(inside, lane_x[:, None], -o_x).to(tl.int64) * PITCH, inside, other=0.0)
            if not RAGGED:
                in_dy = tl.full((1, BLOCK_K), True, tl.int1)
            elif BITS is not None:
                in_dy = (patches_of_dy & bit)[None, :] != 0  # [1, BK]
            else:
                in_dy = ((y < y_end) & (z < z_end))[None, :]
            if IMAGES > 1:
                in_dy &= (n < N - image)[None, :]
            o_patch = o_dy.to(tl.int64) * PITCH_DY
            pixel = tl.where(in_dy, lane_dy[None, :], 0).to(tl.int64)
            b_dy = tl.load(p_dy + o_patch + pixel * PITCH_DY, in_dy, other=0.0)  # [BM, BK]
            if mask_ptr is not None:
                b_mask = tl.load(p_mask + o_patch + pixel * PITCH_DY, in_dy, other=0.0)
                b_dy = tl.where(b_mask <= 0, 0.0, b_dy)
            acc = tl.dot(b_dy, b_x, acc, input_precision=PRECISION, out_dtype=ACC)
            z += 1
            last_in_row = z == PATCHES_W
            y += tl.where(last_in_row, 1, 0)
            last_in_image = y == patches_h
            if RAGGED or PATCHES_W > 1:
                o_dy += tl.where(last_in_image, next_image_dy, tl.where(last_in_row, next_row_dy, PATCH_W))
            else:
                o_dy += BLOCK_K  # whole rows follow each other without a gap
            o_x += tl.where(last_in_image, next_image_x, tl.where(last_in_row, next_row_x, ASIDE))
            if BITS is not None:
                bit = tl.where(last_in_image, 1, bit << 1)
            image += tl.where(last_in_image, IMAGES, 0)
            y = tl.where(last_in_image, 0, y)
            z = tl.where(last_in_row, 0, z)

    o_row = split.to(tl.int64) * stride_wz + (group * CO + o_co).to(tl.int64) * stride_wk
    o_place = c * stride_wc + r * stride_wr + s * stride_ws
    p_dw = dw_ptr + o_row[:, None] + o_place[None, :]
    tl.store(p_dw, acc.to(dw_ptr.dtype.element_ty), (o_co < CO)[:, None] & in_filter[None, :])


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    geometry: ConvGeometry,
    *,
    mask: torch.Tensor | None = None,
    precision: str = "ieee",
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """dy (N, Co, P, Q), x (N, Ci, H, W), mask as dy or None -> dw (Co, Ci/groups, R, S) in `memory_format`.

    All of one floating dtype on one device. They are copied if they are not channels-last; on a GPU a workspace of
    splits * dw elements in the accumulator's type is taken besides. `precision` is "ieee" or "tf32" and concerns
    float32 alone. A depthwise convolution is depthwise.py's.
    """
    g = geometry
    target = runtime.target_for(dy.device)
    dw = runtime.empty(g.w_shape, "weight gradient", dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    if dy.numel() == 0 or dw.numel() == 0:
        return dw.zero_()
    dy = runtime.channels_last(dy, "output gradient as channels-last")
    mask = mask if mask is None else runtime.channels_last(mask, "mask as channels-last")
    x = runtime.channels_last(x, "input as channels-last")
    if g.depthwise:
        depthwise.weight_grad(dy, x, g, target, dw, mask=mask)
        return dw
    if tiles.takes_windows(target, g):
        windows = few_channels.windows(x, g, target)
        rows = few_channels.empty_filter_rows(dw, windows)
        _launch(dy, windows.z, mask, windows.geometry, target, precision, rows, row=windows.row, pixel=windows.pixel)
        few_channels.of_filter_rows(rows, g, windows, dw)
    else:
        _launch(dy, x, mask, g, target, precision, dw, row=g.W, pixel=g.Ci)
    return dw


def _launch(
    dy: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    geometry: ConvGeometry,
    target: runtime.Target,
    precision: str,
    dw: torch.Tensor,
    *,
    row: int,
    pixel: int,
) -> None:
    """Into dw; x has `row` pixels from an image row to the next, and `pixel` elements from a pixel to the next."""
    g = geometry
    rows = g.N * g.P * g.Q

    def run(tile: tiles.Tile) -> None:
        tiles_n = -(-g.R * g.S * g.Ci_group // tile.N) if tile.flat else g.R * g.S * -(-g.Ci_group // tile.N)
        programs = -(-g.Co_group // tile.M) * tiles_n
        if tile.flat:
            patch_h = patch_w = patches_w = ragged = bits = None
            terms, steps = rows, -(-rows // tile.K)
        else:
            patch_h, patch_w = tiles.patch(tile, g)
            patches_h, patches_w = -(-g.P // patch_h), -(-g.Q // patch_w)
            ragged = g.P % patch_h > 0 or g.Q % patch_w > 0
            patches = patches_h * patches_w
            bits = runtime.index_type(2**patches) if patches <= tiles.MOST_BITS else None
            terms = steps = -(-g.N // (tile.K // (patch_h * patch_w))) * patches
        splits = tiles.splits(target, programs=programs * g.groups, steps=steps, passing=tiles.passing(tile, dy.dtype))
        partial, strides = split_k.workspace(dw, splits)
        runtime.launch(
            weight_grad_kernel,
            target,
            (programs * g.groups, splits),
            dy, x, partial, mask,
            g.N, terms, -(-steps // splits), g.H, row, g.P, g.Q, *strides,
            CI=g.Ci_group, CO=g.Co_group, **g.constants,
            GROUPS=g.groups, PITCH=pixel, TILES_N=tiles_n,
            FLAT=tile.flat, PATCH_H=patch_h, PATCH_W=patch_w, PATCHES_W=patches_w, RAGGED=ragged, BITS=bits,
            INDEX=runtime.index_type(g.halo_pixels, g.N * g.H * row, rows + splits * tile.K),
            ACC=runtime.accumulator(dy.dtype),
            PRECISION=precision,
            BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_K=tile.K,
            num_warps=tile.num_warps, num_stages=tile.num_stages, output=partial,
        )  # fmt: skip
        split_k.add_up(partial, dw, target)

    run(tuning.tile(tiles.masked("weight_grad", mask), target, g, dy, precision, run))


def _ahead(geometry: ConvGeometry, dtype: torch.dtype, precision: str, *, masked: bool) -> torch.Tensor:
    dy = runtime.meta_channels_last(geometry.y_shape, dtype)
    x = runtime.meta_channels_last(geometry.x_shape, dtype)
    mask = runtime.meta_channels_last(geometry.y_shape, dtype) if masked else None
    return weight_grad(dy, x, geometry, mask=mask, precision=precision)


runtime.operation("weight_grad")(partial(_ahead, masked=False))
runtime.operation("weight_grad_masked")(partial(_ahead, masked=True))
