"""Random convolutions: geometry, dtype, strides in memory and which gradients are asked for, against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_operands_match, native_conv2d, random, second_gradients

from kernels import conv2d
from kernels.runtime import DTYPES

pytestmark = pytest.mark.on_device


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first along its first axis, repeated without memory."""
    return t[:1].expand_as(t)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every-other": lambda t: t.repeat_interleave(2, -3)[..., ::2, :, :],
    "expanded": expanded,
}


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
    return dict(
        x=LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x),
        w=LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](w),
        b=draw(st.sampled_from([random(groups * Co, dtype=dtype, seed=seed + 2), None])),
        asked=draw(st.sampled_from(["xwb", "x", "w", "b", "xw", ""])),
        stride=stride, padding=named or padding, dilation=dilation, groups=groups,
    )  # fmt: skip


FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(FIXED, max_examples=150)
@given(convolutions())
def test_random_convolutions_agree(convolution):
    assert_operands_match(conv2d, **convolution)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(FIXED, max_examples=1500)
@given(convolutions())
def test_many_random_convolutions_agree(convolution):
    assert_operands_match(conv2d, **convolution)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(FIXED, max_examples=40)
@given(convolutions())
def test_random_second_gradients_agree(convolution):
    asked = convolution.pop("asked")
    x, w, b = (convolution.pop(name) for name in "xwb")
    operands = x.double(), w.double(), b.double() if b is not None and "b" in asked else None
    ours = second_gradients(conv2d, *operands, **convolution)
    for gradient, native in zip(ours, second_gradients(native_conv2d, *operands, **convolution), strict=True):
        torch.testing.assert_close(gradient, native, rtol=1e-8, atol=1e-8 * max(1, native.abs().sum().item()))
