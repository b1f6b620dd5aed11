"""Convolutions of few input channels: windows of a filter row, and all residue classes at once.

A GPU's rules take these paths and the interpreter's do not: `gpu_tiles` makes it take them.
"""

import pytest
import torch
from reference import assert_matches, native_conv2d, random, second_gradients

from bench.measure import sass
from kernels import conv2d, few_channels, runtime, tiles
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.runtime import INTERPRETER, MULTIPROCESSORS, Target, compile_ahead
from kernels.weight_grad import weight_grad

INTERPRETED = Target(INTERPRETER, 1)
A100 = Target("sm_80", 108)
LAST = torch.channels_last
OPERATIONS = ("forward", "input_grad", "weight_grad")


@pytest.fixture
def taken() -> list[str]:
    """What launchers take memory for, in order; it holds NaN until something is written there."""
    seen = []

    def poison(nbytes, what, tensor):
        seen.append(what)
        if not tensor.is_meta:
            tensor.fill_(float("nan"))

    with runtime.on_allocate(poison):
        yield seen


# Which convolutions take which path


STEM = (2, 3, 32, 32), (64, 3, 7, 7)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options", "windows", "classes"),
    [
        pytest.param(*STEM, dict(stride=2, padding=3), True, True, id="stem"),
        pytest.param(*STEM, dict(stride=1, padding=3), True, False, id="one-class-alone"),
        pytest.param((2, 3, 32, 32), (8, 3, 7, 1), dict(stride=2), False, False, id="one-filter-column"),
        pytest.param((2, 3, 32, 32), (8, 3, 1, 7), dict(stride=2), True, True, id="one-filter-row"),
        pytest.param((2, 15, 32, 32), (8, 15, 3, 3), dict(stride=2), True, True, id="60-columns-of-15-channels"),
        pytest.param((2, 15, 32, 32), (8, 15, 3, 3), dict(stride=3), True, False, id="135-columns"),
        pytest.param((2, 16, 32, 32), (8, 16, 3, 3), dict(stride=2), False, False, id="channels-for-a-block"),
        pytest.param((2, 6, 32, 32), (8, 3, 3, 3), dict(stride=2, groups=2), False, False, id="groups"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 3), dict(stride=2, dilation=(1, 2)), False, False, id="dilated-rows"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 3), dict(stride=2, dilation=(2, 1)), True, False, id="dilated-columns"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 16), dict(stride=2), True, True, id="as-wide-as-is-taken"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 17), dict(stride=2), False, True, id="too-wide"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 3), dict(stride=2, padding=2), True, True, id="padding-below-it"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 3), dict(stride=2, padding=(3, 0)), True, False, id="rows-of-padding"),
        pytest.param((2, 3, 32, 32), (8, 3, 3, 3), dict(stride=2, padding=(0, 3)), True, False, id="columns-of-it"),
    ],
)
def test_what_takes_windows_and_what_packs_classes(x_shape, w_shape, options, windows, classes, taken):
    """The rules say so, the launchers do so, and the interpreter does neither."""
    g = ConvGeometry.of(x_shape, w_shape, **options)
    for target, of_a_gpu in ((A100, True), (INTERPRETED, False)):
        assert tiles.takes_windows(target, g) == (windows and of_a_gpu)
        assert tiles.packs_classes(target, g) == (classes and of_a_gpu)
        for op, what in (
            ("forward", "input with its zeros"), ("weight_grad", "input with its zeros"),
            ("input_grad", "filters of all classes"),
        ):  # fmt: skip
            taken.clear()
            with runtime.planning(target):
                runtime._operations[op](g, torch.float16, "ieee")
            expected = of_a_gpu and (classes if op == "input_grad" else windows)
            assert taken
            assert (what in taken) == expected, (target, op, taken)


def test_a_pixel_of_a_window_is_a_power_of_two_of_channels():
    for channels, padded in ((1, 4), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (15, 16)):
        assert tiles.padded_channels(ConvGeometry.of((1, channels, 9, 9), (8, channels, 3, 3))) == padded


# Each step by itself


# (channels, filter, stride, padding, image): a width of the copy that is a multiple of 16 already, or not.
WINDOWS = [
    pytest.param(3, (7, 7), 2, 3, (32, 32), id="stem"),
    pytest.param(3, (3, 3), 1, 1, (5, 30), id="32-pixels-with-the-halo"),
    pytest.param(3, (3, 3), 1, 1, (5, 31), id="33-pixels"),
    pytest.param(4, (4, 4), 2, 0, (16, 16), id="16-pixels-and-a-window-of-one-block"),
    pytest.param(1, (2, 2), 1, 0, (2, 2), id="one-output"),
    pytest.param(1, (11, 11), 4, 2, (23, 20), id="wide-filter"),
    pytest.param(15, (5, 5), 3, 2, (9, 14), id="fifteen-channels"),
    pytest.param(5, (3, 2), (1, 3), (2, 0), (7, 17), id="five-channels-and-a-column-left-over"),
    pytest.param(8, (2, 9), (4, 1), (0, 8), (9, 3), id="halo-wider-than-the-image"),
    pytest.param(3, (1, 3), 4, 0, (8, 15), id="stride-past-the-filter"),
    pytest.param(2, (3, 3), 2, 5, (1, 1), id="padding-past-the-filter"),
]


@pytest.mark.parametrize(("channels", "taps", "stride", "padding", "size"), WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_windows_are_the_image_with_zeros_around_it(channels, taps, stride, padding, size, dtype, taken):
    g = ConvGeometry.of((2, channels, *size), (8, channels, *taps), stride, padding)
    x = random(*g.x_shape, dtype=dtype, seed=1).to(memory_format=LAST)
    windows = few_channels.windows(x, g, INTERPRETED)
    z = windows.z
    assert taken == ["input with its zeros"]
    assert windows.row % 16 == 0
    assert windows.pixel == tiles.padded_channels(g)
    around = 0, windows.pixel - channels, g.PW, windows.row - g.W - g.PW, g.PH, g.PH
    assert torch.equal(z, torch.nn.functional.pad(x.permute(0, 2, 3, 1), around))


@pytest.mark.parametrize(("channels", "taps", "stride", "padding", "size"), WINDOWS)
def test_a_window_is_all_taps_of_a_filter_row(channels, taps, stride, padding, size):
    """As unfold gives them, a pixel's channels after another's; every window ends within its row of the copy."""
    g = ConvGeometry.of((2, channels, *size), (8, channels, *taps), stride, padding)
    x = random(*g.x_shape, dtype=torch.float64, seed=1).to(memory_format=LAST)
    windows = few_channels.windows(x, g, INTERPRETED)
    inner = windows.geometry
    assert (inner.P, inner.Q, inner.R, inner.S, inner.PH, inner.PW) == (g.P, g.Q, g.R, 1, 0, 0)
    assert windows.used == g.S * windows.pixel <= inner.Ci
    assert inner.Ci % tiles.SMALLEST == 0
    row, pixel = windows.row * windows.pixel, g.SW * windows.pixel
    assert (g.Q - 1) * pixel + inner.Ci <= row
    shape, strides = (g.N, g.P, g.Q, g.R, inner.Ci), (inner.H * row, g.SH * row, pixel, row, 1)
    seen = windows.z.as_strided(shape, strides)[..., : windows.used].unflatten(-1, (g.S, windows.pixel))
    unfolded = torch.nn.functional.unfold(x, taps, padding=(g.PH, g.PW), stride=(g.SH, g.SW))
    expected = unfolded.view(g.N, channels, g.R, g.S, g.P, g.Q).permute(0, 4, 5, 2, 3, 1)
    assert torch.equal(seen[..., :channels], expected)
    assert not seen[..., channels:].any()


@pytest.mark.parametrize(("channels", "taps", "stride", "padding", "size"), WINDOWS)
def test_filter_rows_hold_each_weight_once_and_zeros(channels, taps, stride, padding, size, taken):
    g = ConvGeometry.of((2, channels, *size), (8, channels, *taps), stride, padding)
    w = random(*g.w_shape, dtype=torch.float32, seed=2)
    windows = few_channels.windows(random(*g.x_shape, dtype=torch.float32, seed=1), g, INTERPRETED)
    rows = few_channels.filter_rows(w, g, windows)
    assert taken[1:] == ["filter rows"]
    assert tuple(rows.shape) == (g.Co, windows.geometry.Ci, g.R, 1)
    assert rows.is_contiguous(memory_format=LAST)
    assert torch.equal(rows[rows != 0].sort().values, w.flatten().sort().values)
    for layout in (torch.contiguous_format, LAST):
        back = torch.full(g.w_shape, float("nan")).to(memory_format=layout)
        few_channels.of_filter_rows(rows, g, windows, back)
        assert torch.equal(back, w)
    # Element k of a window is channel k % pixel of its pixel k // pixel.
    for r, s, c in ((0, 0, 0), (g.R - 1, g.S - 1, channels - 1)):
        assert torch.equal(rows[:, s * windows.pixel + c, r, 0], w[:, c, r, s])


# (x, w, options): of those below that pack classes, the ones whose classes have unlike taps.
CLASSES = [
    pytest.param((2, 3, 14, 14), (5, 3, 7, 7), dict(stride=2, padding=3), id="stem"),
    pytest.param((2, 3, 13, 10), (5, 3, 3, 3), dict(stride=2), id="no-padding"),
    pytest.param((2, 3, 13, 10), (5, 3, 3, 3), dict(stride=2, padding=2), id="all-padding-below-the-filter"),
    pytest.param((2, 3, 12, 11), (5, 3, 4, 4), dict(stride=(2, 1), padding=1), id="two-by-one"),
    pytest.param((2, 5, 14, 8), (5, 5, 2, 5), dict(stride=(1, 3), padding=(0, 2)), id="one-by-three"),
    pytest.param((1, 1, 23, 23), (5, 1, 11, 11), dict(stride=4, padding=2), id="eleven"),
    pytest.param((1, 3, 11, 11), (5, 3, 2, 2), dict(stride=4), id="classes-that-no-tap-meets"),
    pytest.param((1, 3, 3, 2), (5, 3, 7, 7), dict(stride=4, padding=6), id="fewer-pixels-than-classes"),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "options"), CLASSES)
def test_filters_of_all_classes_give_the_input_gradient(x_shape, w_shape, options, taken):
    """By PyTorch's own convolution of them, so that what is not theirs is not tested: to the last bits of float64."""
    g = ConvGeometry.of(x_shape, w_shape, **options)
    assert tiles.packs_classes(A100, g)
    x, w, dy = (random(*shape, dtype=torch.float64, seed=3) for shape in (g.x_shape, g.w_shape, g.y_shape))
    classes = few_channels.classes(w.to(memory_format=LAST), g, INTERPRETED)
    assert taken == ["filters of all classes"]
    inner = classes.geometry
    assert tuple(classes.filters.shape) == inner.w_shape == (g.SH * g.SW * g.Ci, g.Co, inner.R, inner.S)
    rows, columns = -(-g.H // g.SH), -(-g.W // g.SW)
    # The first tap reads padding before dy; what lies after it is as much as the pixels ask for.
    around = inner.PW, columns + inner.S - 1 - inner.PW - g.Q, inner.PH, rows + inner.R - 1 - inner.PH - g.P
    packed = native_conv2d(torch.nn.functional.pad(dy, around), classes.filters)
    dx = torch.full_like(x, float("nan"))
    few_channels.unpack(packed, g, dx)
    x.requires_grad_()
    native_conv2d(x, w, **options).backward(dy)
    torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-12)
    # A tap of the filter belongs to one class, and to one of its taps.
    assert torch.equal(classes.filters[classes.filters != 0].sort().values, w.flatten().sort().values)


# Against float64


CASES = [
    pytest.param((2, 3, 18, 18), (20, 3, 7, 7), dict(stride=2, padding=3), id="stem"),
    pytest.param((3, 3, 9, 10), (16, 3, 3, 3), dict(padding=1), id="stride-one"),
    pytest.param((2, 3, 11, 13), (17, 3, 3, 3), dict(stride=2), id="no-padding-and-rows-left-over"),
    pytest.param((2, 4, 10, 9), (16, 4, 5, 5), dict(stride=3, padding=2), id="stride-three"),
    pytest.param((2, 3, 11, 10), (16, 3, 3, 3), dict(stride=(2, 1), padding=1), id="two-by-one"),
    pytest.param((2, 3, 10, 11), (16, 3, 3, 3), dict(stride=(1, 2), padding=(0, 1)), id="one-by-two"),
    pytest.param((2, 3, 7, 7), (16, 3, 3, 3), dict(stride=2, padding=2), id="more-padding-than-half"),
    pytest.param((2, 3, 5, 6), (16, 3, 3, 3), dict(stride=2, padding=4), id="padding-past-the-filter"),
    pytest.param((2, 3, 10, 10), (16, 3, 4, 4), dict(stride=2, padding=1), id="even-filter"),
    pytest.param((2, 1, 9, 8), (16, 1, 2, 2), dict(stride=2), id="one-channel"),
    pytest.param((2, 15, 7, 6), (16, 15, 3, 2), dict(stride=2, padding=1), id="fifteen-channels"),
    pytest.param((2, 3, 4, 3), (16, 3, 7, 7), dict(stride=2, padding=3), id="image-smaller-than-the-filter"),
    pytest.param((2, 3, 1, 1), (16, 3, 3, 3), dict(stride=4, padding=1), id="one-pixel"),
    pytest.param((1, 3, 11, 10), (70, 3, 5, 5), dict(stride=2, padding=2), id="batch-of-one-and-two-blocks-of-columns"),
    pytest.param((2, 3, 12, 9), (16, 3, 3, 3), dict(stride=2, padding=1, dilation=(2, 1)), id="dilated-columns"),
    pytest.param((1, 3, 27, 23), (8, 3, 11, 11), dict(stride=(1, 2), padding=5), id="66-taps-of-a-class"),
    pytest.param((1, 2, 69, 9), (8, 2, 62, 3), dict(stride=2, padding=3), id="as-many-filter-rows-as-bits"),
    pytest.param((70, 3, 6, 6), (16, 3, 3, 3), dict(stride=2, padding=1), id="several-images-a-patch"),
]


def assert_takes_the_path(x_shape, w_shape, options) -> None:
    assert tiles.takes_windows(A100, ConvGeometry.of(x_shape, w_shape, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), CASES)
def test_few_channels_agree_with_float64(x_shape, w_shape, options, dtype, gpu_tiles, taken):
    assert_takes_the_path(x_shape, w_shape, options)
    gpu_tiles("sm_80")
    assert_matches(conv2d, x_shape, w_shape, dtype, layout=LAST, **options)
    assert taken.count("input with its zeros") == 2
    packs = tiles.packs_classes(A100, ConvGeometry.of(x_shape, w_shape, **options))
    assert ("residue classes" in taken) == packs


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), CASES[:1] + CASES[4:5])
def test_few_channels_on_other_generations_and_layouts(x_shape, w_shape, options, arch, bias, layout, gpu_tiles):
    gpu_tiles(arch)
    assert_matches(conv2d, x_shape, w_shape, torch.float16, bias=bias, layout=layout, **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_gradients_are_written_in_the_layout_asked_for(layout, gpu_tiles):
    gpu_tiles("sm_80")
    g = ConvGeometry.of((2, 3, 11, 10), (16, 3, 3, 3), 2, 1)
    x, w, dy = (random(*shape, dtype=torch.float64, seed=3) for shape in (g.x_shape, g.w_shape, g.y_shape))
    dx, dw = input_grad(dy, w, g, memory_format=layout), weight_grad(dy, x, g, memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)
    assert dw.is_contiguous(memory_format=layout)
    x.requires_grad_()
    w.requires_grad_()
    native_conv2d(x, w, stride=2, padding=1).backward(dy)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dw, w.grad)


@pytest.mark.parametrize(("x_shape", "w_shape", "options"), CASES[:1] + CASES[4:5] + CASES[7:8])
def test_second_gradients_of_few_channels(x_shape, w_shape, options, gpu_tiles, taken):
    assert_takes_the_path(x_shape, w_shape, options)
    operands = [random(*shape, dtype=torch.float64, seed=4) / 8 for shape in (x_shape, w_shape, w_shape[:1])]
    expected = second_gradients(native_conv2d, *operands, **options)
    gpu_tiles("sm_80")
    for actual, exact in zip(second_gradients(conv2d, *operands, **options), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)
    assert taken.count("input with its zeros") > 2


# NaN and infinity


# (x, w, options): windows that end in pixels under no weight, which are the next outputs' own.
SPREAD = [
    pytest.param((1, 3, 20, 20), (5, 3, 7, 7), dict(stride=2, padding=3), id="one-pixel-more"),
    pytest.param((1, 3, 12, 14), (5, 3, 5, 5), dict(padding=2), id="three-pixels-more"),
    pytest.param((1, 5, 9, 9), (5, 5, 3, 3), dict(stride=(2, 1), padding=1), id="five-channels"),
    pytest.param((1, 3, 8, 9), (5, 3, 4, 4), dict(stride=2), id="no-pixel-more"),
]


# One class has less taps than another where the stride does not divide the filter.
LACKING = "a class's filter is zero at the taps that it lacks, and zero times NaN is NaN"


def places(conv2d, x, w, options) -> torch.Tensor:
    """Where the result is not finite."""
    return ~conv2d(x, w, **options).isfinite()


def assert_spreads_as_far_as_the_window(x_shape, w_shape, options, value, gpu_tiles) -> None:
    assert_takes_the_path(x_shape, w_shape, options)
    gpu_tiles("sm_80")
    w = random(*w_shape, dtype=torch.float32, seed=2).abs() + 1
    for h, column in ((x_shape[2] // 2, x_shape[3] // 2), (0, 0), (x_shape[2] - 1, x_shape[3] - 1), (1, 4)):
        x = random(*x_shape, dtype=torch.float32, seed=1)
        x[0, 1 % x_shape[1], h, column] = value
        expected = places(native_conv2d, x, w, options)
        assert not expected.all()
        assert torch.equal(places(conv2d, x, w, options), expected), (h, column)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), SPREAD)
def test_what_is_not_finite_reaches_the_outputs_whose_window_covers_it(x_shape, w_shape, options, value, gpu_tiles):
    assert_spreads_as_far_as_the_window(x_shape, w_shape, options, value, gpu_tiles)


def test_more_filter_rows_than_bits_take_no_windows():
    assert not tiles.takes_windows(A100, ConvGeometry.of((1, 3, 66, 8), (5, 3, 63, 3), padding=1))


@pytest.mark.parametrize(("x_shape", "w_shape", "options"), SPREAD)
def test_nan_of_the_image_reaches_no_other_weights_gradient(x_shape, w_shape, options, gpu_tiles):
    """A corner pixel meets few taps; padded channels and pixels past the filter are dropped."""
    g = ConvGeometry.of(x_shape, w_shape, **options)
    gpu_tiles("sm_80")
    x = random(*x_shape, dtype=torch.float32, seed=1).to(memory_format=LAST)
    x[0, 1, 0, 0] = float("nan")
    w = torch.ones(w_shape, requires_grad=True)
    dy = random(*g.y_shape, dtype=torch.float32, seed=3)
    native_conv2d(x, w, **options).backward(dy)
    expected = w.grad.isnan()
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(weight_grad(dy, x, g).isnan(), expected)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        pytest.param(*case.values, id=case.id, marks=[pytest.mark.xfail(strict=True, reason=LACKING)] if lacks else [])
        for case, lacks in ((SPREAD[0], True), (SPREAD[2], True), (SPREAD[3], False))
    ],
)
def test_nan_of_an_output_gradient_reaches_the_pixels_under_its_window(x_shape, w_shape, options, gpu_tiles):
    g = ConvGeometry.of(x_shape, w_shape, **options)
    assert tiles.packs_classes(A100, g)
    gpu_tiles("sm_80")
    dy = random(*g.y_shape, dtype=torch.float32, seed=3)
    dy[0, 2, g.P // 2, g.Q // 2] = float("nan")
    w = random(*w_shape, dtype=torch.float32, seed=2)
    x = torch.ones(x_shape, requires_grad=True)
    native_conv2d(x, w, **options).backward(dy)
    assert torch.equal(input_grad(dy, w, g).isnan(), x.grad.isnan())


# Memory


def announced(run, *arguments) -> dict[str, int]:
    found = {}
    with runtime.on_allocate(lambda nbytes, what, tensor: found.update({what: nbytes})):
        run(*arguments)
    return found


def operation(op: str, g: ConvGeometry, device: str) -> None:
    x, w, y = (
        torch.zeros(shape, dtype=torch.float16, device=device).to(memory_format=LAST)
        for shape in (g.x_shape, g.w_shape, g.y_shape)
    )
    if op == "forward":
        conv2d(x, w, stride=(g.SH, g.SW), padding=(g.PH, g.PW))
    elif op == "input_grad":
        input_grad(y, w, g)
    else:
        weight_grad(y, x, g)


def test_the_buffers_of_each_operation_are_announced():
    """All of them, by hand, for fp16: z has 38 rows of 48 pixels, and a window of 7 * 4 elements takes 32."""
    g = ConvGeometry.of((2, 3, 32, 32), (64, 3, 7, 7), 2, 3)
    z, rows, outputs = 2 * 38 * 48 * 4, 64 * 7 * 32, 2 * 64 * 16 * 16
    with runtime.planning(A100):
        assert announced(operation, "forward", g, "meta") == {
            "output": 2 * outputs, "input with its zeros": 2 * z, "filter rows": 2 * rows,
        }  # fmt: skip
        assert announced(operation, "input_grad", g, "meta") == {
            "input gradient": 2 * 2 * 3 * 32 * 32, "filters of all classes": 2 * 12 * 64 * 16,
            "residue classes": 2 * 2 * 12 * 16 * 16,
        }  # fmt: skip
        found = announced(operation, "weight_grad", g, "meta")
    workspace = found.pop("split-K workspace", 0)
    assert workspace % (4 * rows) == 0
    assert found == {"weight gradient": 2 * 64 * 3 * 49, "input with its zeros": 2 * z, "filter rows": 2 * rows}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_plan_takes_what_a_launch_takes(op, stride, gpu_tiles):
    g = ConvGeometry.of((2, 3, 13, 12), (16, 3, 3, 3), stride, 1)
    with runtime.planning(Target("sm_80", 8)):
        planned = announced(operation, op, g, "meta")
    gpu_tiles("sm_80")
    assert announced(operation, op, g, "cpu") == planned
    assert len(planned) > 1 or (op, stride) == ("input_grad", 1)


# Addresses


ADDRESSES = [
    pytest.param((2, 3, 9, 8), (7, 3, 3, 3), dict(stride=(2, 1), padding=1), id="3x3"),
    pytest.param((2, 3, 9, 8), (7, 3, 4, 4), dict(stride=(2, 1), padding=2), id="4x4"),
    pytest.param((1, 3, 11, 13), (7, 3, 7, 7), dict(stride=(2, 1), padding=3), id="7x7"),
    pytest.param((1, 3, 13, 12), (7, 3, 11, 11), dict(stride=(2, 1), padding=5), id="11x11"),
    pytest.param((1, 1, 3, 2), (7, 1, 3, 3), dict(stride=(2, 1), padding=2), id="mostly-halo"),
    pytest.param((1, 15, 5, 5), (7, 15, 2, 2), dict(stride=2), id="fifteen-channels"),
]


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), ADDRESSES)
def test_even_masked_addresses_lie_inside_a_tensor(x_shape, w_shape, options, arch, gpu_tiles, addresses):
    """As of tests/test_tiles.py: an asynchronous copy reads masked addresses too."""
    assert_takes_the_path(x_shape, w_shape, options)
    gpu_tiles(arch)
    tensors = []
    x, w = (torch.randn(shape).to(memory_format=LAST).requires_grad_() for shape in (x_shape, w_shape))
    with runtime.on_allocate(lambda nbytes, what, tensor: tensors.append(tensor)):
        y = conv2d(x, w, **options)
        dy = torch.randn_like(y)
        y.backward(dy)
    assert len(addresses) > 5
    inside = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (x, w, dy, *tensors)]
    for low, high in addresses:
        assert any(start <= low and high < end for start, end in inside), "a block reaches outside its tensor"


# Compilation


def assert_the_stem_compiles(op, dtype, precision, arch) -> None:
    kernels = compile_ahead(
        op, (256, 3, 128, 128), (64, 3, 7, 7), stride=2, padding=3, dtype=dtype, precision=precision, arch=arch
    )
    names = [kernel.metadata.name for kernel in kernels]
    first, main = {
        "forward": ("pad_kernel", "forward_kernel"), "weight_grad": ("pad_kernel", "weight_grad_kernel"),
        "input_grad": ("class_filters_kernel", "forward_kernel"),
    }[op]  # fmt: skip
    assert names in ([first, main], [first, main, "sum_splits_kernel"]), names
    for kernel in kernels:
        asked = sass.usage(kernel.asm["cubin"])
        assert asked.registers > 0
        assert asked.stack_bytes == 0, f"{kernel.metadata.name}: {op} of {dtype} spills for {arch}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(MULTIPROCESSORS))
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        pytest.param(torch.float16, "ieee", id="fp16"),
        pytest.param(torch.bfloat16, "ieee", id="bf16"),
        pytest.param(torch.float32, "tf32", id="tf32"),
        pytest.param(torch.float32, "ieee", id="fp32"),
        pytest.param(torch.float64, "ieee", id="fp64"),
    ],
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_stem_compiles_everywhere(op, dtype, precision, arch):
    assert_the_stem_compiles(op, dtype, precision, arch)
