"""Random convolutions and poolings under guard: the values right, and nothing touched outside the tensors."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from guards import guarded
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from random_convolutions import FIXED, STRIDES, convolutions, poolings
from reference import TOLERANCE, assert_rounded, native_conv2d, random, results
from torch.nn.functional import max_pool2d as native_max_pool2d

from kernels import conv2d
from kernels.max_pool2d import max_pool2d

pytestmark = [
    pytest.mark.on_device,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

# How far into its buffer an operand begins, past whole 16 bytes, and the layout of the gradient it is given.
SHIFTS = st.sampled_from([0, 1, 3])
GRADIENTS = st.sampled_from(list(STRIDES))


def assert_convolution(convolution: dict, shift: int, layout: str, *, relu: bool = False) -> None:
    geometry = dict(convolution)
    asked, *operands = (geometry.pop(name) for name in ("asked", *"xwb"))
    dtype = operands[0].dtype
    wide = [t if t is None else t.cpu().double() for t in operands]
    dy = random(*native_conv2d(*wide, **geometry).shape, dtype=dtype, seed=4)
    with guarded() as guards:
        *operands, strided_dy = (t if t is None else guards.place(t, shift) for t in (*operands, STRIDES[layout](dy)))
        actual = results(conv2d, *operands, strided_dy, asked, relu=relu, **geometry)
    wide.append(dy.cpu().double())
    if relu:
        wide[-1] *= actual[0].cpu() > 0  # of an element whose sign rounding decides, either side is right
    y, *gradients = results(native_conv2d, *wide, asked, **geometry)
    bounds = results(native_conv2d, *(t if t is None else t.abs() for t in wide), asked, **geometry)
    assert_rounded(actual, (y.relu() if relu else y, *gradients), bounds, dtype)


assert_conv_relu = partial(assert_convolution, relu=True)


def native_pool(input: torch.Tensor, *, relu: bool, **window) -> torch.Tensor:
    return native_max_pool2d(input.relu() if relu else input, **window)


def assert_pooling(pooling: dict, shift: int, layout: str) -> None:
    pooling = dict(pooling)
    x = pooling.pop("input")
    with guarded() as guards:
        ours = guards.place(x, shift).requires_grad_()
        y = max_pool2d(ours, **pooling)
        dy = random(*y.shape, dtype=x.dtype, seed=3)
        (dx,) = torch.autograd.grad(y, ours, guards.place(STRIDES[layout](dy), shift))
    torch.testing.assert_close(y, native_pool(x, **pooling), rtol=0, atol=0, equal_nan=True)
    wide = x.double().requires_grad_()
    exact, bound = (
        torch.autograd.grad(native_pool(wide, **pooling), wide, g)[0] for g in (dy.double(), dy.double().abs())
    )
    assert dx.dtype == x.dtype
    assert ((dx.double() - exact).abs() <= TOLERANCE[x.dtype] * bound).all()


def fuzz(check: Callable, cases: st.SearchStrategy, number: int, examples: int) -> None:
    """Checks so many cases drawn by this seed."""
    tried = []

    @seed(number)
    @settings(FIXED, derandomize=False, max_examples=examples)
    @given(cases, SHIFTS, GRADIENTS)
    def each(case, shift, layout):
        tried.append(check)
        check(case, shift, layout)

    each()
    assert len(tried) == examples


@settings(FIXED, max_examples=80)
@given(convolutions(), SHIFTS, GRADIENTS)
def test_random_convolutions_agree_and_stay_inside(convolution, shift, layout):
    assert_convolution(convolution, shift, layout)


@settings(FIXED, max_examples=15)
@given(convolutions(), SHIFTS, GRADIENTS)
def test_so_do_convolutions_with_a_relu(convolution, shift, layout):
    assert_conv_relu(convolution, shift, layout)


@settings(FIXED, max_examples=25)
@given(poolings(), SHIFTS, GRADIENTS)
def test_so_do_poolings(pooling, shift, layout):
    assert_pooling(pooling, shift, layout)


@pytest.mark.cpu_only("interprets a GPU's tiles")
def test_so_do_convolutions_by_a_gpu_s_tiles(gpu_tiles):
    """Which are smaller than the interpreter's own: of these, one holds nearly every tensor here."""
    gpu_tiles("sm_80")
    fuzz(assert_convolution, convolutions(), 5, 15)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("number", "examples"), [(0, 3400), (1, 3300), (2, 3300)])
def test_ten_thousand_convolutions_agree_and_stay_inside(number, examples):
    fuzz(assert_convolution, convolutions(), number, examples)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("check", "cases"), [(assert_conv_relu, convolutions()), (assert_pooling, poolings())], ids=["relu", "pool"]
)
def test_a_thousand_of_the_fused_agree_and_stay_inside(check, cases):
    fuzz(check, cases, 3, 1000)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.cpu_only("interprets a GPU's tiles")
@pytest.mark.parametrize("check", [assert_convolution, assert_conv_relu], ids=["plain", "relu"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_hundreds_by_a_gpu_s_tiles_agree_and_stay_inside(arch, check, gpu_tiles):
    gpu_tiles(arch)
    fuzz(check, convolutions(), 4, 200)
