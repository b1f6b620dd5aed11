"""Split-K: a reduction shared by several programs, added up by a second pass in a fixed order, without atomics.

The gradients of weights and bias reduce over all N*P*Q output pixels and produce little. Each of `splits` parts of the
pixels leaves its sum in a workspace [splits, Co, R, S, Ci/groups] of the accumulator's type; the second pass adds the
parts up, first to last, so that the result has the same bits in every run.
"""

import torch
import triton.language as tl

from kernels import runtime


@runtime.kernel
def sum_splits_kernel(
    partial_ptr, dw_ptr,
    SPLITS, CI, R, S, ELEMENTS,
    stride_wk, stride_wc, stride_wr, stride_ws,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # partial [SPLITS, Co, R, S, Ci], dense; ELEMENTS = Co*R*S*Ci.
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < ELEMENTS
    p_partial = partial_ptr + tl.where(mask, place, 0)
    total = tl.full((BLOCK,), 0, ACC)
    for _ in range(SPLITS):
        total += tl.load(p_partial, mask, other=0.0)
        p_partial += ELEMENTS
    c = place % CI
    s = place // CI % S
    r = place // CI // S % R
    co = place // CI // S // R
    p_dw = dw_ptr + co * stride_wk + c * stride_wc + r * stride_wr + s * stride_ws
    tl.store(p_dw, total.to(dw_ptr.dtype.element_ty), mask)


def workspace(dw: torch.Tensor, splits: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Where the parts go, and its strides over (split, Co, Ci, R, S): dw itself (Co, Ci/groups, R, S) for one part."""
    if splits == 1:
        return dw, (0, *dw.stride())
    wide = torch.float64 if dw.dtype == torch.float64 else torch.float32
    CO, CI, R, S = dw.shape
    partial = runtime.empty((splits, CO, R, S, CI), "split-K workspace", dtype=wide, device=dw.device)
    stride_wz, stride_wk, stride_wr, stride_ws, stride_wc = partial.stride()
    return partial, (stride_wz, stride_wk, stride_wc, stride_wr, stride_ws)


def add_up(partial: torch.Tensor, dw: torch.Tensor, target: runtime.Target) -> None:
    """The sum over the workspace's first axis -> into dw (Co, Ci/groups, R, S), unless dw itself is the workspace."""
    if partial is dw:
        return
    _, CI, R, S = dw.shape
    block = 256  # more, and the 64-bit divisions of a thread do not fit its registers
    runtime.launch(
        sum_splits_kernel,
        target,
        (-(-dw.numel() // block), 1),
        partial, dw, partial.shape[0], CI, R, S, dw.numel(), *dw.stride(),
        ACC=runtime.accumulator(dw.dtype), BLOCK=block, num_warps=4, num_stages=1, output=dw,
    )  # fmt: skip
