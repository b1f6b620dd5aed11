"""Hypothesis strategies of convolutions and poolings: geometry, dtype, strides in memory, which gradients are asked."""

import reference
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from reference import random

from kernels.runtime import DTYPES

FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

# Values are the same in a layout of these, so that gradients can take it too.
STRIDES = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every-other": lambda t: t.repeat_interleave(2, -3)[..., ::2, :, :],
}


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first along its first axis, repeated without memory."""
    return t[:1].expand_as(t)


LAYOUTS = STRIDES | {"expanded": expanded}


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    """Arguments of `assert_operands_match`: operands of one dtype in any layout, and a geometry that fits them."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    Ci, Co = (draw(st.sampled_from([1, 1, 2, 3, 7, 16, 20])) for _ in range(2))  # of one group
    kernel, stride, padding, dilation = (
        [draw(st.integers(low, high)) for _ in range(2)] for low, high in ((1, 4), (1, 4), (0, 4), (1, 3))
    )
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 9))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    named = draw(st.sampled_from([None, None, None, "valid", "same"]))
    if named == "same":
        stride = [1, 1]
    elif named == "valid":
        size = [max(s, d * (k - 1) + 1) for s, k, d in zip(size, kernel, dilation, strict=True)]
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    x = random(*batch, groups * Ci, *size, dtype=dtype, seed=seed)
    w = random(groups * Co, Ci, *kernel, dtype=dtype, seed=seed + 1)
    b = random(2 * groups * Co, dtype=dtype, seed=seed + 2)
    return dict(
        x=LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x),
        w=LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](w),
        b=draw(st.sampled_from([b[: groups * Co], b[::2], None])),
        asked=draw(st.sampled_from(["xwb", "x", "w", "b", "xw", ""])),
        stride=stride, padding=named or padding, dilation=dilation, groups=groups,
    )  # fmt: skip


VALUES = [-torch.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, torch.inf, torch.nan]


@st.composite
def poolings(draw: st.DrawFn) -> dict:
    """Arguments of `max_pool2d`: an input whose values meet often, and a window that fits it."""
    kernel, stride, dilation = ([draw(st.integers(1, high)) for _ in range(2)] for high in (4, 5, 3))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    size = [
        max(d, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 9))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    shape = draw(st.sampled_from([0, 1, 3])), draw(st.sampled_from([1, 2, 17])), *size
    generator = torch.Generator("cpu").manual_seed(draw(st.integers(0, 1000)))
    choice = torch.randint(len(VALUES), shape, generator=generator, device="cpu")
    x = torch.tensor(VALUES, dtype=draw(st.sampled_from(DTYPES)), device="cpu")[choice].to(reference.DEVICE)
    return dict(
        input=LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x),
        kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
        ceil_mode=draw(st.booleans()), relu=draw(st.booleans()),
    )  # fmt: skip
