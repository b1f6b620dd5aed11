"""Random convolutions' second gradients; their values and first gradients are tests/test_fuzz_kernels.py's."""

import pytest
import torch
from hypothesis import given, settings
from random_convolutions import FIXED, convolutions
from reference import native_conv2d, second_gradients

from kernels import conv2d

pytestmark = pytest.mark.on_device


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
