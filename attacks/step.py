"""adv' = clamp(x + clamp(adv + step*sign(g) - x, -epsilon, epsilon), low, high) in one pass over memory.

Eight elementwise operators read and write a batch some twenty times; this reads it three times and writes it once.
One program a block of BLOCK elements. x, adv, g, adv' dense in one layout; step, epsilon, low and high are a number
a channel, in a table [4, C].
"""

import torch
import triton.language as tl
from torch import Tensor

from kernels import runtime

BLOCK = 1024  # 8 elements a thread, two 16-byte loads of fp32


@runtime.kernel
def linf_step_kernel(
    adv_ptr, x_ptr, gradient_ptr, table_ptr, out_ptr,
    ELEMENTS, C, stride_xc,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < ELEMENTS
    c = place // stride_xc % C
    p_table = table_ptr + c
    step = tl.load(p_table, mask, other=0.0)
    epsilon = tl.load(p_table + C, mask, other=0.0)
    low = tl.load(p_table + 2 * C, mask, other=0.0)
    high = tl.load(p_table + 3 * C, mask, other=0.0)
    adv = tl.load(adv_ptr + place, mask, other=0.0)
    x = tl.load(x_ptr + place, mask, other=0.0)
    gradient = tl.load(gradient_ptr + place, mask, other=0.0)
    # Without a step where the gradient is 0 or not a number, as torch.sign has it for 0.
    moved = tl.where(gradient > 0, adv + step, tl.where(gradient < 0, adv - step, adv))
    delta = tl.minimum(tl.maximum(moved - x, -epsilon), epsilon)
    tl.store(out_ptr + place, tl.minimum(tl.maximum(x + delta, low), high), mask)


def linf_table(x: Tensor, *sizes: float | Tensor) -> Tensor | None:
    """[len(sizes), C] on x's device, or None where one of the sizes is not a number a channel."""
    columns = []
    for size in sizes:
        size = torch.as_tensor(size, dtype=x.dtype, device=x.device)
        if (size.dim() > 1 and size.numel() != size.shape[-3:].numel()) or size.shape[-2:].numel() != 1:
            return None
        columns.append(size.flatten().expand(x.shape[1]))
    return torch.stack(columns)


def fused_linf_step(adv: Tensor, x: Tensor, gradient: Tensor, table: Tensor) -> Tensor:
    """adv, x, gradient (N, C, H, W); table as `linf_table(x, step, epsilon, low, high)` -> (N, C, H, W), as x lies.

    Bit for bit what PyTorch's operators give. Tensors that do not lie as x does are copied.
    """
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    adv, x, gradient = (tensor.contiguous(memory_format=layout) for tensor in (adv, x, gradient))
    out = torch.empty_like(x)
    _, C, H, W = x.shape
    runtime.launch(
        linf_step_kernel,
        runtime.target_for(x.device),
        (-(-x.numel() // BLOCK), 1),
        adv, x, gradient, table, out, x.numel(), C, 1 if layout == torch.channels_last else H * W,
        BLOCK=BLOCK, num_warps=4, num_stages=1, output=out,
    )  # fmt: skip
    return out
