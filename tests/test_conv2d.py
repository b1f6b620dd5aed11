"""conv2d and its gradients, through the kernels, against PyTorch's convolution in float64."""

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from reference import WRITE_UP_CASES, assert_matches, native_conv2d, random, results
from torch import nn
from triton.runtime.interpreter import interpreter_builder

from kernels import Conv2d, conv2d
from kernels.runtime import DTYPES

pytestmark = pytest.mark.on_device

HALF = [torch.float16, torch.bfloat16]

CASES = [
    pytest.param((2, 16, 8, 8), (32, 16, 3, 3), {"padding": 1}, id="blocks-divide-everything"),
    pytest.param((3, 17, 7, 5), (5, 17, 3, 2), {"stride": (2, 1), "padding": (1, 2)}, id="nothing-divides-a-block"),
    pytest.param((2, 3, 20, 20), (8, 3, 7, 7), {"stride": 2, "padding": 3}, id="first-layer-three-channels"),
    pytest.param((2, 24, 6, 6), (40, 24, 1, 1), {}, id="pointwise"),
    pytest.param((2, 20, 9, 9), (6, 20, 1, 1), {"stride": 3}, id="stride-skips-pixels-that-get-zero-gradient"),
    pytest.param((2, 18, 11, 13), (4, 18, 3, 3), {"stride": (3, 2), "dilation": (2, 3), "padding": 4},
                 id="stride-and-dilation-coprime"),
    pytest.param((1, 18, 15, 17), (4, 18, 3, 5), {"stride": (4, 6), "dilation": (2, 4), "padding": (3, 7)},
                 id="stride-and-dilation-share-a-factor"),
    pytest.param((1, 16, 9, 9), (4, 16, 2, 2), {"stride": 4, "dilation": 4}, id="stride-equals-dilation"),
    pytest.param((2, 36, 6, 6), (8, 18, 3, 3), {"groups": 2, "padding": 1}, id="groups"),
    pytest.param((2, 6, 9, 9), (12, 1, 3, 3), {"groups": 6, "stride": 2, "padding": 1}, id="depthwise-multiplier-2"),
    pytest.param((2, 5, 9, 8), (5, 1, 3, 3), {"groups": 5, "padding": 1}, id="depthwise"),
    pytest.param((1, 3, 11, 13), (6, 1, 3, 4), {"groups": 3, "stride": (3, 2), "dilation": (2, 3), "padding": 4},
                 id="depthwise-stride-and-dilation-coprime"),
    pytest.param((1, 3, 15, 17), (3, 1, 3, 5), {"groups": 3, "stride": (4, 6), "dilation": (2, 4), "padding": (3, 7)},
                 id="depthwise-stride-and-dilation-share-a-factor"),
    pytest.param((1, 2, 5, 6), (4, 1, 2, 2), {"groups": 2, "stride": 10**6, "padding": 1}, id="depthwise-to-a-pixel"),
    pytest.param((1, 2, 12, 12), (2, 1, 9, 9), {"groups": 2, "padding": 4}, id="depthwise-many-taps"),
    pytest.param((1, 300, 4, 4), (300, 1, 3, 3), {"groups": 300, "padding": 1}, id="depthwise-more-than-a-block"),
    pytest.param((1, 17, 9, 8), (3, 17, 9, 8), {}, id="filter-covers-image"),
    pytest.param((1, 16, 5, 5), (4, 16, 1, 3), {"dilation": (2**40, 2), "stride": 3}, id="nothing-to-dilate"),
    pytest.param((1, 2, 5, 5), (2, 1, 1, 3), {"dilation": (2**40, 2), "groups": 2}, id="depthwise-nothing-to-dilate"),
    pytest.param((1, 17, 12, 12), (2, 17, 9, 9), {"padding": 4}, id="more-taps-than-bits-in-an-integer"),
    pytest.param((1, 16, 2, 2), (16, 16, 3, 3), {"padding": 6}, id="halo-larger-than-image"),
    pytest.param((1, 16, 3, 1), (16, 16, 1, 1), {"stride": 5, "padding": 2}, id="one-column-mostly-halo"),
    pytest.param((1, 1, 1, 1), (1, 1, 1, 1), {}, id="a-single-number"),
    pytest.param((2, 17, 5, 6), (3, 17, 2, 2), {"stride": 10**6, "padding": 1}, id="stride-beyond-the-image"),
    pytest.param((1, 32, 4, 4), (16, 32, 1, 1), {"stride": 100, "padding": 40}, id="padding-beyond-filter-and-image"),
    pytest.param((1, 1, 1, 30000), (1, 1, 2, 1),
                 {"padding": (40000, 0), "dilation": (60000, 1), "stride": (7000, 1)},
                 id="padded-image-past-2-to-the-31-pixels"),
    pytest.param((1, 300, 5, 5), (3, 300, 3, 3), {"padding": 1}, id="more-channels-than-a-block"),
    pytest.param((2, 2, 70, 70), (3, 2, 3, 3), {"padding": 1}, id="more-pixels-than-a-block"),
]  # fmt: skip


@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CASES)
def test_float64_agrees(x_shape, w_shape, geometry):
    assert_matches(conv2d, x_shape, w_shape, torch.float64, **geometry)


@pytest.mark.parametrize(
    ("x_shape", "groups", "geometry"),
    [((1, 2, 200_000, 1), 2, {"stride": (131_071, 1), "dilation": (2, 1)}),
     ((1, 1, 300, 1), 1, {"stride": (131_071, 1), "dilation": (2, 1), "padding": (131_000, 0)}),
     pytest.param((1, 1, 2000, 1), 1, {"stride": (1001, 1), "dilation": (2, 1), "padding": (4_300_000, 0)},
                  marks=pytest.mark.slow)],
    ids=["depthwise", "dense-large-stride", "dense-large-padding"],
)  # fmt: skip
def test_first_taps_of_large_strides_and_paddings_are_found(x_shape, groups, geometry):
    # Their number is a product modulo the stride, of factors whose product passes 2**31.
    assert_matches(conv2d, x_shape, (groups, 1, 3, 1), torch.float64, groups=groups, **geometry)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CASES[:6:2] + CASES[8:10])
def test_narrower_dtypes_agree(x_shape, w_shape, geometry, dtype):
    assert_matches(conv2d, x_shape, w_shape, dtype, **geometry)


@pytest.mark.parametrize(("padding", "stride"), WRITE_UP_CASES)
def test_the_write_ups_cases(padding, stride):
    assert_matches(conv2d, (2, 3, 12, 12), (64, 3, 7, 7), torch.float64, padding=padding, stride=stride)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_are_kept_wider_than_the_operands(dtype):
    x = torch.ones(1, 4096, 1, 1, dtype=dtype)
    assert conv2d(x, torch.ones_like(x)).item() == 4096  # a half-precision sum of ones stops at 2048 or 256


def test_bfloat16_is_rounded_to_nearest_across_a_power_of_two():
    x = torch.tensor([1.9921875, 1.5 * 2**-8], dtype=torch.bfloat16).view(1, 2, 1, 1)
    assert conv2d(x, torch.ones_like(x)).item() == 2.0


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "offset": lambda x: torch.cat([x, x]).contiguous(memory_format=torch.channels_last)[x.shape[0] :],
    "every-other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.cpu_only("cuDNN lays out its result as it likes, by dtype and version")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_and_the_strides_of_nn_conv2d_out(layout):
    x = LAYOUTS[layout](random(2, 6, 5, 7, dtype=torch.float64, seed=0))
    assert torch.equal(x, random(2, 6, 5, 7, dtype=torch.float64, seed=0)) or layout in ("sliced", "every-other")
    w = random(4, 6, 3, 3, dtype=torch.float64, seed=1)
    for weight in (w, w.contiguous(memory_format=torch.channels_last)):
        ours = results(conv2d, x, weight, None, None, padding=1)[:3]
        native = results(native_conv2d, x, weight, None, None, padding=1)[:3]
        for name, a, b in zip(["y", "dx", "dw"], ours, native, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        assert ours[0].stride() == native[0].stride()


def test_an_expanded_input_is_read_right():
    x = random(1, 1, 6, 6, dtype=torch.float64, seed=0).expand(3, 4, 6, 6)
    w = random(2, 4, 3, 3, dtype=torch.float64, seed=1)
    torch.testing.assert_close(conv2d(x, w), native_conv2d(x, w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides_of_the_bias(dtype):
    x, w = random(2, 6, 5, 5, dtype=dtype, seed=0), random(4, 6, 3, 3, dtype=dtype, seed=1)
    bias = torch.arange(8, dtype=dtype)
    for b in (bias[::2], bias[4:], bias[5].expand(4), bias.view(4, 2)[:, 1]):
        exact = native_conv2d(x.double(), w.double(), b.double())
        torch.testing.assert_close(conv2d(x, w, b).double(), exact, rtol=2**-8, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_are_left_alone_and_chains_differentiate(dtype):
    x = random(2, 6, 5, 5, dtype=dtype, seed=0).to(memory_format=torch.channels_last).requires_grad_()
    w = random(4, 6, 3, 3, dtype=dtype, seed=1).to(memory_format=torch.channels_last).requires_grad_()
    b = random(4, dtype=dtype, seed=2).requires_grad_()
    hidden = x.relu()
    versions = [t._version for t in (hidden, w, b)]
    y = conv2d(hidden, w, b).relu_()
    y.sum().backward()
    assert [t._version for t in (hidden, w, b)] == versions
    native = [t.detach().double().requires_grad_() for t in (x, w, b)]
    native_conv2d(native[0].relu(), *native[1:]).relu().sum().backward()
    for ours, exact in zip((x, w, b), native, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_unbatched_input_and_named_padding():
    x, w = random(6, 9, 9, dtype=torch.float64, seed=0), random(4, 6, 4, 3, dtype=torch.float64, seed=1)
    torch.testing.assert_close(conv2d(x, w, padding="valid"), native_conv2d(x, w, padding="valid"))
    same = conv2d(x, w, padding="same", dilation=(1, 2))
    assert same.shape == (4, 9, 9)
    torch.testing.assert_close(same, native_conv2d(x, w, padding="same", dilation=(1, 2)))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "padding"),
    [((2, 0, 5, 5), (4, 0, 3, 3), 0), ((0, 0, 5, 5), (4, 0, 3, 3), 1), ((0, 5, 5), (4, 0, 3, 3), 0),
     ((2, 0, 5, 0), (4, 0, 3, 3), 2), ((0, 3, 0, 5), (4, 3, 3, 3), 2), ((0, 4, 5, 5), (4, 1, 3, 3), 0)],
    ids=str,
)  # fmt: skip
def test_without_images_or_channels_shapes_and_gradients_are_pytorchs(x_shape, w_shape, padding):
    call = {"padding": padding, "groups": 4 if w_shape[1] == 1 else 1}
    operands = torch.ones(x_shape), torch.ones(w_shape), torch.ones(w_shape[0])
    for ours, native in zip(
        results(conv2d, *operands, None, **call), results(native_conv2d, *operands, None, **call), strict=True
    ):
        assert torch.equal(ours, native)


def test_an_empty_batch_has_empty_results_and_zero_weight_gradients():
    x = torch.empty(0, 3, 8, 8)
    y, dx, dw, db = results(conv2d, x, torch.ones(4, 3, 3, 3), torch.ones(4), None)
    assert y.shape == (0, 4, 6, 6)
    assert dx.shape == x.shape
    assert dw.eq(0).all()
    assert db.eq(0).all()


def test_non_finite_values_pass_through_and_stay_where_they_belong():
    x = torch.zeros(1, 16, 6, 6)
    x[0, 0, 0, 0] = torch.inf
    x[0, 1, 5, 5] = torch.nan
    w = random(4, 16, 3, 3, dtype=torch.float32, seed=0)
    # Against the CPU's: cuDNN's fast algorithms mix neighbours, and spread what is not finite.
    native = native_conv2d(x.cpu(), w.cpu(), padding=1)
    torch.testing.assert_close(conv2d(x, w, padding=1).cpu(), native, equal_nan=True)


def test_gradcheck_of_the_write_ups_case_in_fast_mode():
    x = random(2, 3, 12, 12, dtype=torch.float64, seed=0).requires_grad_()
    w = random(64, 3, 7, 7, dtype=torch.float64, seed=1).requires_grad_()
    b = random(64, dtype=torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: conv2d(*a, stride=2, padding=3), (x, w, b), eps=1e-4, atol=1e-5, fast_mode=True
    )


@pytest.mark.parametrize(
    "geometry", [{"padding": 1}, {"stride": 2, "padding": 1}, {"stride": (2, 3), "dilation": 2, "groups": 2}], ids=str
)
def test_second_order_by_gradgradcheck(geometry):
    x = random(1, 4, 6, 7, dtype=torch.float64, seed=0).requires_grad_()
    w = random(2, 4 // geometry.get("groups", 1), 3, 3, dtype=torch.float64, seed=1).requires_grad_()
    b = random(2, dtype=torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: conv2d(*a, **geometry), (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: conv2d(*a, **geometry), (x, w, b), fast_mode=True)


def test_third_order_agrees():
    def third(conv):
        x = random(1, 2, 4, 4, dtype=torch.float64, seed=0).requires_grad_()
        w = random(2, 2, 3, 3, dtype=torch.float64, seed=1).requires_grad_()
        (dx,) = torch.autograd.grad(conv(x, w, padding=1).pow(3).sum(), x, create_graph=True)
        (dw,) = torch.autograd.grad(dx.pow(2).sum(), w, create_graph=True)
        return torch.autograd.grad(dw.pow(2).sum(), (x, w))

    for ours, native in zip(third(conv2d), third(native_conv2d), strict=True):
        torch.testing.assert_close(ours, native)


def test_the_same_bits_every_time():
    x, w = random(2, 32, 9, 9, dtype=torch.float32, seed=0), random(16, 32, 3, 3, dtype=torch.float32, seed=1)
    first = results(conv2d, x, w, None, None, stride=2)[:3]
    for _ in range(2):
        assert all(map(torch.equal, results(conv2d, x, w, None, None, stride=2)[:3], first))


def test_two_threads_at_once_give_what_one_gives():
    shapes = [((2, 5, 9, 9), (7, 5, 3, 3)), ((3, 20, 6, 6), (4, 20, 1, 1))]
    operands = [[random(*s, dtype=torch.float64, seed=i) for i, s in enumerate(pair)] for pair in shapes]
    expected = [results(native_conv2d, x, w, None, None) for x, w in operands]
    failures = []
    conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))  # the interpreter remembers the last grid it ran
    builder = dict(vars(interpreter_builder))

    def work(index: int) -> None:
        for _ in range(8):
            for a, b in zip(results(conv2d, *operands[index], None, None)[:3], expected[index], strict=False):
                if not torch.allclose(a, b):
                    failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert vars(interpreter_builder) == builder, "a launch left Triton's interpreter patched"


@pytest.mark.cpu_only("a process of its own, on CPU tensors")
@pytest.mark.parametrize("imports", ["import torchvision, kernels", "import kernels, torchvision"])
def test_torchvision_may_be_imported_before_or_after(imports):
    code = (
        f"{imports}\nimport torch\nfrom torch.nn.functional import conv2d\n"
        "x, w = torch.ones(1, 2, 4, 4), torch.ones(1, 2, 3, 3)\n"
        "assert torch.equal(kernels.conv2d(x, w), conv2d(x, w))\nprint('agrees')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "agrees\n", done.stderr


def test_importing_us_changes_no_global_setting():
    code = (
        "import os, torch\n"
        "def state():\n"
        "    return torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ), torch.get_rng_state().sum()\n"
        "before = state()\nimport kernels, models\nassert state() == before\nprint('unchanged')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "unchanged\n", done.stderr


X, W = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)

# What is wrong, PyTorch's words for it, and the values that ours must name besides.
BAD_CALLS = [
    pytest.param({"stride": 0}, "non-positive stride is not supported", "(0, 0)", id="zero-stride"),
    pytest.param({"stride": (1, -2)}, "non-positive stride is not supported", "(1, -2)", id="negative-stride"),
    pytest.param({"stride": (1, 2, 3)}, "a list of 2 values", "stride=[1, 2, 3]", id="three-strides"),
    pytest.param({"dilation": ()}, "a list of 2 values", "dilation=[]", id="no-dilations"),
    pytest.param({"padding": -1}, "negative padding is not supported", "(-1, -1)", id="negative-padding"),
    pytest.param({"padding": "sane"}, "Invalid padding string", "'sane'", id="misspelt-padding"),
    pytest.param({"padding": "same", "stride": 2}, "is not supported for strided convolutions", "(2, 2)",
                 id="same-with-stride"),
    pytest.param({"dilation": 0, "padding": "same"}, "dilation should be greater than zero", "(0, 0)",
                 id="zero-dilation"),
    pytest.param({"dilation": 5}, "Calculated padded input size per channel: (8 x 8). Kernel size: (11 x 11)", "",
                 id="too-dilated"),
    pytest.param({"dilation": 2**30}, "Kernel size can't be greater than actual input size", "2147483649",
                 id="dilated-past-the-integers"),
    pytest.param({"groups": 0}, "non-positive groups is not supported", "0", id="no-groups"),
    pytest.param({"groups": 3, "weight": W[:, :1]}, "Given groups=3, expected weight to be divisible by 3 at dimension",
                 "[4, 1, 3, 3]", id="groups-do-not-divide"),
    pytest.param({"groups": 5}, "Given groups=5, expected weight to be at least 5 at dimension 0", "[4, 3, 3, 3]",
                 id="more-groups-than-channels"),
    pytest.param({"weight": W[:0]}, "expected weight to be at least 1 at dimension 0", "[0, 3, 3, 3]", id="no-filters"),
    pytest.param({"weight": W[0], "padding": "same"}, "Expected 3-dimensional input for 3-dimensional weight",
                 "[3, 3, 3]", id="three-dimensional-weight"),
    pytest.param({"input": torch.ones(1, 2, 8, 8)}, "Given groups=1, weight of size [4, 3, 3, 3], expected input",
                 "to have 3 channels, but got 2", id="channels"),
    pytest.param({"input": X[0, 0]}, "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size",
                 "[8, 8]", id="two-dimensional"),
    pytest.param({"input": X[:, :, :2]}, "Calculated padded input size per channel: (2 x 8). Kernel size: (3 x 3)", "",
                 id="too-small"),
    pytest.param({"input": X[:, :, :0], "padding": 2}, "Only zero batch or zero channel inputs are supported",
                 "[1, 3, 0, 8]", id="no-rows"),
    pytest.param({"bias": torch.ones(3)}, "expected bias to be 1-dimensional with 4 elements, but got bias of size [3]",
                 "", id="bias-size"),
    pytest.param({"bias": torch.ones(4, 1)}, "expected bias to be 1-dimensional with 4 elements", "[4, 1]",
                 id="bias-of-two-dimensions"),
    pytest.param({"bias": torch.ones(4).double()}, "should be the same", "float64", id="bias-dtype"),
    pytest.param({"input": X.to_sparse()}, "", "torch.sparse_coo", id="sparse"),
    pytest.param({"input": X.double()}, "", "float64 on cpu) and weight type (torch.float32 on cpu", id="mixed-dtypes"),
    pytest.param({"weight": W[:, :, :0]}, "", "[4, 3, 0, 3]", id="empty-filter"),
    pytest.param({"input": X.to(torch.float8_e4m3fn), "weight": W.to(torch.float8_e4m3fn)}, "", "torch.float8_e4m3fn",
                 id="eight-bits"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "words", "values"), BAD_CALLS)
def test_bad_calls_are_refused_as_pytorch_refuses_them_and_by_name(changed, words, values):
    call = {"input": X, "weight": W, **changed}
    with pytest.raises(RuntimeError) as ours:
        conv2d(**call)
    with pytest.raises(RuntimeError) as native:
        native_conv2d(**call)
    assert words in str(ours.value)
    assert words in str(native.value)
    assert values in str(ours.value)
    assert "\n" not in str(ours.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.cfloat, torch.cdouble], ids=str)
def test_integers_and_complex_numbers_are_refused_by_name(dtype):
    with pytest.raises(RuntimeError, match=f"conv2d: {dtype} is not supported; supported: torch.float16"):
        conv2d(X.to(dtype), W.to(dtype))


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"float32 on cpu\) and weight type \(torch.float32 on meta\)"):
        conv2d(X, W.to("meta"))


@pytest.mark.parametrize(
    "changed",
    [{"stride": "two"}, {"stride": 1.5}, {"stride": (1, 2.5)}, {"padding": (1, "a")}, {"groups": "1"}, {"groups": 1.0},
     {"stride": None}, {"padding": True}, {"groups": True}, {"input": [1.0]}, {"weight": [1.0]}, {"bias": 3}],
    ids=str,
)  # fmt: skip
def test_arguments_of_the_wrong_kind_are_type_errors(changed):
    call = {"input": X, "weight": W, **changed}
    with pytest.raises(TypeError, match="conv2d: "):
        conv2d(**call)
    with pytest.raises(TypeError):
        native_conv2d(**call)


def test_whatever_counts_as_an_int_is_one():
    x, w = random(1, 4, 8, 8, dtype=torch.float64, seed=0), random(4, 2, 3, 3, dtype=torch.float64, seed=1)
    ours = conv2d(x, w, stride=np.int64(2), padding=torch.tensor(1), dilation=[np.int32(1)], groups=np.int64(2))
    torch.testing.assert_close(ours, native_conv2d(x, w, stride=2, padding=1, groups=2))


def test_a_filter_that_spans_too_many_pixels_is_refused_and_not_miscounted():
    with pytest.raises(RuntimeError, match="spans 2\\*\\*31 pixels or more"):
        conv2d(torch.ones(1, 1, 1, 32768), torch.ones(1, 1, 3, 1), padding=(65536, 0), dilation=(65536, 1))


def test_the_module_is_nn_conv2d_in_constructor_state_and_repr():
    options = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "dilation": 1, "groups": 2, "bias": False}
    ours, native = Conv2d(4, 6, **options), nn.Conv2d(4, 6, **options)
    assert repr(ours) == repr(native)
    assert list(ours.state_dict()) == list(native.state_dict())
    native.load_state_dict(copy.deepcopy(ours).state_dict())
    x = random(1, 4, 7, 7, dtype=torch.float32, seed=0)
    torch.testing.assert_close(ours(x), native(x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_of_the_module(mode):
    ours = Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode)
    native = nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode)
    native.load_state_dict(ours.state_dict())
    x = random(2, 3, 6, 7, dtype=torch.float32, seed=0)
    torch.testing.assert_close(ours(x), native(x))
