"""db[co] = sum_{n,p,q} dy[n,co,p,q], in the accumulator's type: float32, float64 for float64.

Where a ReLU follows the convolution, `mask` is its output: dy counts as 0 where that is not positive, decided as dy is
loaded. One program adds up BLOCK_N channels over its share of the pixels; the shares' sums are added by split_k.py.

Memory: dy and mask [N, P, Q, Co], dense; db [Co]. Row offsets are int64.
"""

from functools import partial

import torch
import triton.language as tl

from kernels import runtime, split_k, tiles
from kernels.geometry import ConvGeometry


@runtime.kernel
def bias_grad_kernel(
    dy_ptr, db_ptr, mask_ptr,
    ROWS, STEPS, CO,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS = N*P*Q pixels, of which each split takes STEPS blocks of BLOCK_M; db [splits, CO].
    split = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    in_channels = (o_n < CO)[None, :]
    o_m = split.to(tl.int64) * STEPS * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for _ in range(STEPS):
        inside = (o_m < ROWS)[:, None] & in_channels  # [BM, BN]
        o_row = (o_m * CO)[:, None]
        b_dy = tl.load(dy_ptr + o_row + o_n[None, :], inside, other=0.0)
        if mask_ptr is not None:
            b_mask = tl.load(mask_ptr + o_row + o_n[None, :], inside, other=0.0)
            b_dy = tl.where(b_mask <= 0, 0.0, b_dy)
        acc += b_dy.to(ACC)
        o_m += BLOCK_M
    # `tl.sum` is a jitted helper, which a kernel that is also interpreted cannot call; this is what it calls.
    total = tl.reduce(acc, 0, tl.standard._sum_combine)  # [BN]
    tl.store(db_ptr + split.to(tl.int64) * CO + o_n, total.to(db_ptr.dtype.element_ty), o_n < CO)


def bias_grad(dy: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """dy (N, Co, P, Q), mask as dy or None -> db (Co,).

    Both of one floating dtype on one device. They are copied if they are not channels-last; on a GPU a workspace of
    splits * Co elements in the accumulator's type is taken besides.
    """
    N, CO, P, Q = dy.shape
    target = runtime.target_for(dy.device)
    db = runtime.empty((CO,), "bias gradient", dtype=dy.dtype, device=dy.device)
    if dy.numel() == 0:
        return db.zero_()
    dy = runtime.channels_last(dy, "output gradient as channels-last")
    mask = mask if mask is None else runtime.channels_last(mask, "mask as channels-last")
    rows = N * P * Q
    tile = tiles.depthwise_tile(target, rows, CO, dy.dtype)
    programs, steps = -(-CO // tile.N), -(-rows // tile.M)
    splits = tiles.splits(target, programs=programs, steps=steps)
    of_1x1 = db.view(CO, 1, 1, 1)
    partial, _ = split_k.workspace(of_1x1, splits)
    runtime.launch(
        bias_grad_kernel,
        target,
        (programs, splits),
        dy, partial, mask, rows, -(-steps // splits), CO,
        ACC=runtime.accumulator(dy.dtype), BLOCK_M=tile.M, BLOCK_N=tile.N,
        num_warps=tile.num_warps, num_stages=tile.num_stages, output=partial,
    )  # fmt: skip
    split_k.add_up(partial, of_1x1, target)
    return db


def _ahead(geometry: ConvGeometry, dtype: torch.dtype, precision: str, *, masked: bool) -> torch.Tensor:
    dy, mask = (runtime.meta_channels_last(geometry.y_shape, dtype) for _ in range(2))
    return bias_grad(dy, mask=mask if masked else None)


runtime.operation("bias_grad")(partial(_ahead, masked=False))
runtime.operation("bias_grad_masked")(partial(_ahead, masked=True))
