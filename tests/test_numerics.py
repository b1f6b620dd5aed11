"""Overflow, denormals, infinities and NaN: where they come out of convolutions, of poolings and of their gradients."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import NAMES, native_conv2d, random, results

from kernels import conv2d, max_pool2d, tiles
from kernels.geometry import ConvGeometry, pair
from kernels.runtime import Target

inf, nan = torch.inf, torch.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# x, w, options: every kernel, and every way in which one of them walks its taps.
CASES = {
    "plain": ((2, 16, 6, 7), (8, 16, 3, 3), {}),
    "padded": ((2, 16, 6, 7), (8, 16, 3, 3), dict(padding=1)),
    "strided": ((2, 16, 9, 8), (8, 16, 3, 3), dict(padding=1, stride=2)),
    "dilated": ((1, 16, 9, 8), (8, 16, 3, 3), dict(padding=2, dilation=2)),
    "grouped": ((2, 8, 6, 7), (6, 4, 3, 3), dict(padding=1, groups=2)),
    "depthwise": ((2, 6, 7, 7), (12, 1, 3, 3), dict(padding=1, groups=6)),
    "depthwise-strided": ((2, 6, 7, 7), (12, 1, 3, 3), dict(padding=1, groups=6, stride=2)),
    "1x1": ((2, 16, 5, 6), (8, 16, 1, 1), {}),
    "few-channels": ((2, 3, 9, 9), (8, 3, 3, 3), dict(padding=1)),
    "few-channels-strided": ((2, 3, 13, 13), (8, 3, 7, 7), dict(padding=3, stride=2)),
    "more-taps-than-bits": ((1, 2, 12, 12), (3, 2, 9, 9), dict(padding=4)),
    "nothing-divides-a-block": ((2, 5, 9, 7), (7, 5, 3, 2), dict(padding=(2, 1), stride=(2, 3))),
}
SPECIAL = {"nan": nan, "inf": inf, "-inf": -inf}


def defined(x, w, b, dy, stride=1, padding=0, dilation=1, groups=1, *, relu=False, halo=0, read=False):
    """(y, dx, dw, db) in float64, every product written out, none left out.

    Padding is zeros that are multiplied like pixels, so that next to infinity they give NaN. `halo` puts such zeros
    around dy as well; `read` takes the padding's products out of dw.
    """
    x, w, b, dy = (t.double() for t in (x, w, b, dy))
    (N, Ci, H, W), (Co, _, R, S) = x.shape, w.shape
    sizes = dict(kernel_size=(R, S), stride=stride, dilation=dilation)
    columns = F.unfold(x, **sizes, padding=padding).view(N, groups, 1, Ci // groups * R * S, -1)
    filters = w.view(1, groups, Co // groups, Ci // groups * R * S, 1)
    y = (filters * columns).sum(3).view(dy.shape) + b.view(1, -1, 1, 1)
    if relu:
        dy = torch.where(y <= 0, 0, dy)
        y = y.relu()
    products = dy.view(N, groups, Co // groups, 1, -1) * columns
    if read:
        image = F.unfold(torch.ones_like(x), **sizes, padding=padding).view(columns.shape) > 0
        products = torch.where(image, products, 0)
    around = F.pad(dy, (halo,) * 4)
    (SH, SW), (PH, PW) = pair(stride, "stride"), pair(padding, "padding")
    of_taps = (filters * around.view(N, groups, Co // groups, 1, -1)).sum(2).view(N, Ci * R * S, -1)
    dx = F.fold(of_taps, (H, W), **sizes, padding=(PH + halo * SH, PW + halo * SW))
    return y, dx, products.sum((0, 4)).view(w.shape), dy.sum((0, 2, 3))


def with_special(name, dtype, operand, value, place):
    """The case's operands (x, w, b, dy), one element of one of them special."""
    x_shape, w_shape, options = CASES[name]
    y_shape = ConvGeometry.of(x_shape, w_shape, **options).y_shape
    shapes = dict(x=x_shape, w=w_shape, b=w_shape[:1], dy=y_shape)
    tensors = {key: random(*shape, dtype=dtype, seed=seed) for seed, (key, shape) in enumerate(shapes.items())}
    tensor = tensors[operand]
    rows, columns = tensor.shape[2:]
    row, column = (0, 0) if place == "corner" else (rows // 2, columns // 2)
    tensor[-1, tensor.shape[1] // 2, row, column] = SPECIAL[value]
    return list(tensors.values()), options


def assert_same(ours, expected, names=NAMES):
    """Non-finite values at the same places and the same ones; the others to within what the narrowest dtype rounds."""
    for name, result, exact in zip(NAMES, ours, expected, strict=True):
        if name in names:
            torch.testing.assert_close(
                result.double(), exact, rtol=1e-2, atol=1e-2, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_special_passes(name, dtype, operand, value, place, *, relu=False, names=NAMES):
    """What PyTorch's own convolution gives, but for two places where it is not agreed upon.

    A weight that is not finite is multiplied with the zeros around dy too, as a dense product of blocks has it: there
    PyTorch's algorithms differ among themselves. A depthwise weight gradient has no products with the padding, as
    PyTorch's on a GPU; a strided depthwise input gradient none with what lies around dy.
    """
    operands, options = with_special(name, dtype, operand, value, place)
    halo = 0 if name == "depthwise-strided" else 9
    expected = defined(*operands, **options, relu=relu, halo=halo, read=name.startswith("depthwise"))
    assert relu or not all(t.isfinite().all() for t in expected)  # a ReLU may let nothing of it through
    assert any(t.isfinite().any() for t in expected)
    assert_same(results(partial(conv2d, relu=relu), *operands, **options), expected, names)


# A sample: of each case two operands, each with one of the values.
FIRST = [
    pytest.param(name, ["x", "w", "dy"][i % 3], list(SPECIAL)[(i + j) % 3])
    for j, name in enumerate(CASES)
    for i in (j, j + 1)
]


@pytest.mark.filterwarnings("ignore:.*TF32")
@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_what_pytorchs_own_algorithm_gives(name):
    """Not that of oneDNN, which leaves out the padding of some shapes and not of others."""
    for operand in ("x", "w", "dy"):
        for value in SPECIAL:
            operands, options = with_special(name, torch.float32, operand, value, "corner")
            with torch.backends.mkldnn.flags(enabled=False):
                native = results(native_conv2d, *operands, **options)
            assert_same(native, defined(*operands, **options))


@pytest.mark.parametrize(("name", "operand", "value"), FIRST)
def test_what_is_not_finite_reaches_what_depends_on_it_and_nothing_else(name, operand, value):
    assert_special_passes(name, torch.float32, operand, value, "corner")


def assert_special_passes_by_a_gpus_tiles(name, value):
    """What a stride's residue classes add for few channels is told, and held, in tests/test_few_channels.py."""
    x_shape, w_shape, options = CASES[name]
    packed = tiles.packs_classes(Target("sm_80", 8), ConvGeometry.of(x_shape, w_shape, **options))
    for operand in ("x", "w", "dy"):
        names = ("y", "dw", "db") if packed and operand != "x" else NAMES
        assert_special_passes(name, torch.float32, operand, value, "corner", names=names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depthwise-strided", "strided"])
def test_so_it_does_by_a_gpus_tiles(name, gpu_tiles):
    gpu_tiles("sm_80")
    assert_special_passes_by_a_gpus_tiles(name, "nan")


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_so_it_does_by_the_tiles_of_three_generations(name, arch, gpu_tiles):
    gpu_tiles(arch)
    for value in SPECIAL:
        assert_special_passes_by_a_gpus_tiles(name, value)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["conv", "relu"])
def test_so_it_does_in_every_dtype_place_and_through_a_relu(name, dtype, relu):
    for operand in ("x", "w", "dy"):
        for value in SPECIAL:
            for place in ("corner", "middle"):
                assert_special_passes(name, dtype, operand, value, place, relu=relu)


@pytest.mark.parametrize("relu", [False, True], ids=["pool", "relu-pool"])
@pytest.mark.parametrize("value", SPECIAL)
def test_a_pools_gradient_takes_what_is_not_finite_to_the_winners_alone(relu, value):
    window = dict(kernel_size=3, stride=2, padding=1)
    x, dy = random(2, 5, 9, 8, dtype=torch.float32, seed=1), random(2, 5, 5, 4, dtype=torch.float32, seed=2)
    dy[0, 1, 0, 0] = dy[1, 4, 2, 3] = SPECIAL[value]
    gradients = []
    for pool in (
        lambda x: max_pool2d(x, **window, relu=relu), lambda x: F.max_pool2d(x.relu() if relu else x, **window)
    ):  # fmt: skip
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(pool(leaf), leaf, dy)
    ours, native = gradients
    assert 0 < (~ours.isfinite()).sum() <= 2
    torch.testing.assert_close(ours, native, equal_nan=True)


# Largest finite values. One convolution sums over channels, one over taps, one over taps of a channel by itself.
SUMS = {
    "channels": lambda values: (values.view(1, 3, 1, 1), torch.ones(1, 3, 1, 1), {}),
    "taps": lambda values: (values.view(1, 1, 1, 3), torch.ones(1, 1, 1, 3), {}),
    "depthwise": lambda values: (values.view(1, 1, 1, 3).expand(1, 2, 1, 3), torch.ones(2, 1, 1, 3), dict(groups=2)),
}


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (1, 1, -1), (-1, 1, -1)], ids=str)
def test_half_precision_overflows_to_the_infinity_of_its_sign_and_not_on_the_way(kind, signs):
    """Sums are float32: only a result beyond 65,504 is infinite. The same of all that is added up by a gradient."""
    values = 65504 * torch.tensor(signs, dtype=torch.float32)
    exact = values.sum().item()
    expected = torch.tensor(exact).half()
    assert expected.isinf() == (abs(sum(signs)) > 1)
    x, w, options = SUMS[kind](values.half())
    w = w.half()
    assert (conv2d(x, w, **options) == expected).all()
    assert (conv2d(x, w, **options, relu=True) == expected.relu()).all()
    # Gradients sum over output channels, and over pixels.
    dy = values.half().view(1, 3, 1, 1)
    _, dx, _, _ = results(conv2d, torch.ones(1, 1, 1, 1).half(), torch.ones(3, 1, 1, 1).half(), None, dy)
    dy = values.half().view(1, 1, 1, 3)
    _, _, dw, db = results(conv2d, torch.ones_like(dy), torch.ones(1, 1, 1, 1).half(), torch.zeros(1).half(), dy)
    assert dx.item() == dw.item() == db.item() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beyond_the_largest_number_rounding_decides(dtype):
    """Half a unit in the last place more is infinite, less than that is not."""
    most = torch.finfo(dtype).max
    half_a_unit = torch.finfo(dtype).eps / 2 * 2.0 ** (math.frexp(most)[1] - 1)
    x, w = torch.full((1, 1, 1, 1), most, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    for more, expected in ((half_a_unit, inf), (half_a_unit * 3 / 4, most)):
        assert conv2d(x, w, torch.tensor([more], dtype=dtype)).item() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "depthwise"])
def test_denormals_are_numbers(dtype, groups):
    """Operands, results, and products of normal numbers that are none; through the gradients too."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least of all
    one = torch.ones(2, 2 // groups, 1, 1, dtype=dtype)
    each = 3 - groups  # terms of a sum over channels

    def full(value, shape):
        return torch.full(shape, value, dtype=dtype)

    for relu in (False, True):
        call = partial(conv2d, groups=groups, relu=relu)
        x, dy = full(tiny, (1, 2, 2, 2)), full(tiny, (1, 2, 2, 2))
        y, dx, _, db = results(call, x, one, torch.zeros(2, dtype=dtype), dy)
        assert (y == each * tiny).all()
        assert (dx == each * tiny).all(), "the ReLU took a denormal result for zero"
        assert (db == 4 * tiny).all()
        _, _, dw, _ = results(call, torch.ones_like(x), one, None, dy)
        assert (dw == 4 * tiny).all()
        normal = torch.finfo(dtype).smallest_normal
        assert (call(full(normal, (1, 2, 2, 2)), one * torch.finfo(dtype).eps) == each * tiny).all()
        assert (max_pool2d(x, 2, relu=relu) == tiny).all()
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(max_pool2d(leaf, 2, relu=relu), leaf, full(tiny, (1, 2, 1, 1)))
        assert gradient.flatten(2).sum(2).eq(tiny).all()
