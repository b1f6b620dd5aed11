"""Max-pooling, with and without a ReLU before it, against PyTorch's own: the same values, the same winners."""

import itertools
import weakref
from functools import partial
from math import inf, nan

import pytest
import torch
from reference import DEVICE, TOLERANCE, random
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.nn import functional as F
from triton import language as tl

from bench.measure import sass
from kernels import pool, runtime
from kernels.geometry import PoolGeometry
from kernels.max_pool2d import MaxPool2d, max_pool2d
from kernels.operators import is_channels_last
from kernels.runtime import DTYPES, compile_ahead, launches_ahead

pytestmark = pytest.mark.on_device

CASES = [
    pytest.param((2, 5, 9, 8), dict(kernel_size=3, stride=2, padding=1), id="resnet"),
    pytest.param((2, 5, 8, 6), dict(kernel_size=2), id="windows-side-by-side"),
    pytest.param((2, 5, 9, 7), dict(kernel_size=2), id="a-row-and-a-column-left-over"),
    pytest.param((2, 5, 7, 6), dict(kernel_size=3, stride=1, padding=1), id="stride-1"),
    pytest.param((1, 5, 11, 12), dict(kernel_size=2, stride=(4, 3)), id="gaps-between-windows"),
    pytest.param((2, 5, 8, 7), dict(kernel_size=(2, 3), stride=(3, 2), padding=(1, 0)), id="not-square"),
    pytest.param((1, 5, 12, 11), dict(kernel_size=3, stride=2, padding=1, dilation=2), id="dilation-divides-by-stride"),
    pytest.param((1, 5, 13, 12), dict(kernel_size=3, stride=(4, 3), dilation=(6, 2)), id="dilation-and-stride-share-2"),
    pytest.param((1, 5, 11, 9), dict(kernel_size=3, stride=1, dilation=(2, 3)), id="dilated-windows-side-by-side"),
    pytest.param((1, 5, 3, 2), dict(kernel_size=(6, 5), padding=(3, 2)), id="window-larger-than-the-image"),
    pytest.param((2, 5, 6, 7), dict(kernel_size=3, stride=2, ceil_mode=True), id="ceil-beyond-the-image"),
    pytest.param((2, 5, 5, 4), dict(kernel_size=3, stride=3, padding=1, ceil_mode=True), id="ceil-beyond-the-padding"),
    pytest.param((1, 5, 4, 4), dict(kernel_size=1, stride=2, ceil_mode=True), id="ceil-drops-a-last-window"),
    pytest.param((1, 5, 6, 6), dict(kernel_size=1), id="identity"),
    pytest.param((2, 5, 7, 6), dict(kernel_size=(7, 6)), id="global"),
    pytest.param((1, 5, 9, 9), dict(kernel_size=2, stride=1000), id="stride-beyond-the-image"),
    pytest.param((1, 3, 16, 18), dict(kernel_size=(15, 17), stride=1), id="255-places-of-a-byte"),
    pytest.param((1, 3, 17, 18), dict(kernel_size=16, stride=1), id="256-places-of-an-int"),
    pytest.param((0, 5, 8, 8), dict(kernel_size=3, stride=2), id="empty-batch"),
    pytest.param((1, 130, 5, 5), dict(kernel_size=3, stride=2), id="channels-that-no-block-divides"),
    pytest.param((67, 3, 12, 12), dict(kernel_size=2), id="rows-that-no-block-divides"),
]
RESNET = dict(kernel_size=3, stride=2, padding=1)
WINDOWS = [pytest.param(case.values[1], id=case.id) for case in CASES[:8]]


def native(x: torch.Tensor, *, relu: bool = False, **window) -> torch.Tensor:
    return F.max_pool2d(F.relu(x) if relu else x, **window)


def gradient(pooling, x: torch.Tensor, dy: torch.Tensor, **window) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(pooling(x, **window), x, dy)[0]


def assert_same(x: torch.Tensor, **window) -> None:
    """Bit for bit the value that PyTorch's has, in its layout, and its gradient to within rounding, relu or not."""
    for relu in (False, True):
        y, expected = max_pool2d(x, relu=relu, **window), native(x, relu=relu, **window)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        if y.dim() == 4 and y.size(1) > 1 and y.shape[2:].numel() > 1:  # a shape that fits one layout only
            assert is_channels_last(y) == is_channels_last(expected)
        dy = random(*y.shape, dtype=x.dtype, seed=3)
        exact = gradient(native, x.double(), dy.double(), relu=relu, **window)
        bound = gradient(native, x.double(), dy.double().abs(), relu=relu, **window)
        dx = gradient(max_pool2d, x, dy, relu=relu, **window)
        assert dx.dtype == x.dtype
        assert ((dx.double() - exact).abs() <= TOLERANCE[x.dtype] * bound).all()


# --- values and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "window"), CASES)
def test_values_and_gradients_are_pytorchs(shape, window):
    assert_same(random(*shape, dtype=torch.float32, seed=1).to(memory_format=torch.channels_last), **window)


@pytest.mark.parametrize(("shape", "window"), CASES[:7])
def test_the_first_of_equal_values_wins(shape, window):
    assert_same(random(*shape, dtype=torch.float32, seed=2).round(), **window)


@pytest.mark.parametrize("special", [nan, inf, -inf])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_last_nan_wins_and_infinities_are_values(special, window):
    x = random(3, 4, 13, 13, dtype=torch.float32, seed=4)
    x[random(*x.shape, dtype=torch.float32, seed=5) > 0.3] = special
    x[0] = special  # windows that hold nothing else
    assert_same(x, **window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    assert_same(random(3, 4, 9, 8, dtype=dtype, seed=6), **RESNET)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, 1::2],
        lambda x: x[:1].expand_as(x),
        lambda x: x[0],
    ],
    ids=["contiguous", "transposed", "every-other-channel", "expanded", "unbatched"],
)
def test_any_layout(layout):
    assert_same(layout(random(2, 4, 9, 8, dtype=torch.float32, seed=7)), **RESNET)


def test_no_gradient_leaves_a_window_without_a_positive_value():
    x = -random(2, 3, 8, 8, dtype=torch.float32, seed=8).abs()
    x[0, 0, 0, 0], x[1, 1, 1, 1] = 0, -0.0
    dy = torch.ones(2, 3, 4, 4)
    assert not max_pool2d(x, **RESNET, relu=True).any()
    assert not gradient(max_pool2d, x, dy, **RESNET, relu=True).any()
    assert gradient(max_pool2d, x, dy, **RESNET).sum() == dy.sum()


# --- what is kept, taken and read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "dtype"), [(3, torch.uint8), ((15, 17), torch.uint8), (16, torch.int32)], ids=str)
def test_only_the_index_is_kept(window, dtype):
    x = random(2, 4, 17, 17, dtype=torch.float32, seed=9).requires_grad_()
    hidden = x * 1
    memory = weakref.ref(hidden.untyped_storage())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = max_pool2d(hidden, window, relu=True)
    assert [(t.dtype, t.shape) for t in saved] == [(dtype, y.shape)]
    del hidden
    assert memory() is None
    y.sum().backward()
    assert x.grad.any()


def test_the_launchers_take_their_results_and_no_more():
    geometry = PoolGeometry.of((2, 4, 8, 8), **RESNET)
    x = random(2, 4, 8, 8, dtype=torch.float32, seed=1).to(memory_format=torch.channels_last)
    taken = []
    with runtime.on_allocate(lambda nbytes, what, _: taken.append((what, nbytes))):
        y, index = pool.max_pool(x, geometry)
        pool.max_pool_grad(y, index, geometry)
        pool.max_pool(x.contiguous(), geometry)
    results = [("pooled output", 512), ("window index", 128)]
    assert taken == [*results, ("input gradient", 2048), *results, ("input as channels-last", 2048)]


def test_buffers_are_announced_where_a_launch_is_planned():
    x = torch.empty(2, 4, 8, 8, device="meta", requires_grad=True)
    taken = []
    listening = runtime.on_allocate(lambda _, what, __: taken.append(what))
    with listening, runtime.planning(runtime.Target("sm_80", 108)):
        max_pool2d(x, 2, relu=True).sum().backward()
    assert taken[:2] == ["pooled output", "window index"]
    assert "input gradient" in taken


@pytest.mark.cpu_only("the addresses are the interpreter's")
@pytest.mark.parametrize(("shape", "window"), CASES[:12])
def test_no_load_leaves_its_tensor(shape, window, addresses):
    geometry = PoolGeometry.of(shape, **window)
    x = random(*shape, dtype=torch.float32, seed=1).to(memory_format=torch.channels_last)
    y, index = pool.max_pool(x, geometry, relu=True)
    pool.max_pool_grad(y, index, geometry)
    pool.max_pool_take(x, index, geometry)
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, y, index)]
    assert addresses
    for low, high in addresses:
        assert any(first <= low and high < end for first, end in spans)


def test_two_runs_give_the_same_bits():
    x = random(8, 16, 9, 9, dtype=torch.float32, seed=1)
    dy = random(8, 16, 9, 9, dtype=torch.float32, seed=2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradient(max_pool2d, x, dy, kernel_size=3, stride=1, padding=1) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


# --- derivatives of every order, torch.func and torch.compile -----------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("window", [WINDOWS[i] for i in (0, 3, 4, 7)])
def test_derivatives_by_gradcheck(window, relu):
    shape = (2, 2, 13, 12) if window.get("dilation") else (2, 2, 6, 7)
    x = random(*shape, dtype=torch.float64, seed=1).requires_grad_()
    pooling = partial(max_pool2d, relu=relu, **window)
    assert torch.autograd.gradcheck(
        pooling, x, fast_mode=True, check_forward_ad=True,
        check_batched_grad=True, check_batched_forward_grad=True, check_undefined_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(pooling, x, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize(
    "transform",
    [hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacrev(jacrev(f))],
    ids=["forward-over-reverse", "forward-over-forward", "reverse-over-forward", "reverse-over-reverse"],
)
def test_hessians(transform):
    x = random(1, 2, 5, 4, dtype=torch.float64, seed=2)
    ours, expected = (transform(lambda x, f=f: f(x, **RESNET, relu=True).pow(3).sum())(x) for f in (max_pool2d, native))
    assert expected.any()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("axis", [0, 2])
def test_vmap_and_the_gradients_of_each_sample(axis):
    x = random(2, 3, 2, 4, 7, 6, dtype=torch.float64, seed=3)
    for transform in (lambda f: f, lambda f: grad(lambda x: f(x).pow(2).sum())):
        ours, expected = (vmap(vmap(transform(partial(f, **RESNET, relu=True))), axis)(x) for f in (max_pool2d, native))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_pool_trains_without_graph_breaks(backend):
    torch.compiler.reset()
    layer = MaxPool2d(3, 2, 1)
    compiled = torch.compile(lambda x: layer(x * 2, relu=True) + 1, fullgraph=True, backend=backend)
    for shape in ((2, 3, 9, 9), (3, 3, 9, 9), (3, 3, 12, 7)):  # the later ones make sizes symbols
        x = random(*shape, dtype=torch.float32, seed=1)
        ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, native_y = compiled(ours), native(expected * 2, **RESNET, relu=True) + 1
        y.pow(2).sum().backward()
        native_y.pow(2).sum().backward()
        torch.testing.assert_close((y, ours.grad), (native_y, expected.grad))


@pytest.mark.parametrize("name", ["max_pool", "max_pool_grad", "max_pool_take"])
def test_the_raw_operators_pass_pytorchs_own_check(name):
    x = random(2, 3, 7, 6, dtype=torch.float64, seed=1).requires_grad_()
    window = (3, 3), (2, 2), (1, 1), (1, 1), True
    y, index = (t.detach() for t in torch.ops.conv_lab.max_pool(x, *window, True))
    arguments = {
        "max_pool": (x, *window, True),
        "max_pool_grad": (y.requires_grad_(), index, x.shape, *window, False),
        "max_pool_take": (x, index, *window, True),
    }[name]
    assert set(torch.library.opcheck(getattr(torch.ops.conv_lab, name), arguments).values()) == {"SUCCESS"}


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 1, 4, 4), dict(kernel_size=3, padding=2)),
        ((1, 1, 8, 8), dict(kernel_size=2, padding=2, dilation=3)),
        ((1, 1, 4, 4), dict(kernel_size=0)),
        ((1, 1, 4, 4), dict(kernel_size=2, stride=0)),
        ((1, 1, 4, 4), dict(kernel_size=2, stride=-1)),
        ((1, 1, 4, 4), dict(kernel_size=2, dilation=0)),
        ((1, 1, 4, 4), dict(kernel_size=2, padding=-1)),
        ((1, 1, 4, 4), dict(kernel_size=5)),
        ((1, 1, 4, 4), dict(kernel_size=3, dilation=2)),
        ((1, 1, 4, 4), dict(kernel_size=(2, 2, 2))),
        ((1, 1, 4, 4), dict(kernel_size=2, stride=(1, 1, 1))),
        ((2, 0, 4, 4), dict(kernel_size=2)),
        ((0, 4, 4), dict(kernel_size=2)),
        ((1, 1, 0, 4), dict(kernel_size=2)),
        ((4, 4), dict(kernel_size=2)),
        ((1, 1, 1, 4, 4), dict(kernel_size=2)),
        ((1, 1, 4, 4), dict(kernel_size=2.0)),
        ((1, 1, 4, 4), dict(kernel_size=2, padding="same")),
    ],
    ids=str,
)
def test_what_pytorch_refuses_is_refused(shape, window):
    x = torch.zeros(shape, requires_grad=True)
    with pytest.raises((RuntimeError, TypeError)) as expected:
        native(x, **window)
    with pytest.raises(expected.type, match="max_pool2d: "):
        max_pool2d(x, **window)


def test_windows_that_hold_no_pixel_and_other_tensors_are_refused():
    # PyTorch answers -inf, and writes its gradient outside the tensor.
    with pytest.raises(RuntimeError, match=r"dilation \(3, 3\) holds no pixel of the input \[1, 1, 2, 2\]"):
        max_pool2d(torch.zeros(1, 1, 2, 2), 2, stride=1, padding=1, dilation=3)
    with pytest.raises(RuntimeError, match=r"torch.int64 is not supported; supported: torch.float16"):
        max_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.int64), 2)
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_coo; only dense"):
        max_pool2d(torch.zeros(1, 1, 4, 4).to_sparse(), 2)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        max_pool2d([[1.0]], 2)
    with pytest.raises(NotImplementedError, match="return_indices"):
        MaxPool2d(2, return_indices=True)


class Tagged(torch.Tensor):
    """A subclass as libraries make them, by PyTorch's default rules."""


def test_the_module_is_pytorchs_and_subclasses_see_the_call():
    x = random(2, 3, 7, 7, dtype=torch.float32, seed=1)
    for arguments, stride in itertools.product((dict(), dict(padding=1, dilation=2, ceil_mode=True)), (None, 2)):
        ours, theirs = (cls(3, stride, **arguments) for cls in (MaxPool2d, nn.MaxPool2d))
        assert repr(ours) == repr(theirs)
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours(x, relu=True), theirs(F.relu(x)))
    assert type(max_pool2d(x.as_subclass(Tagged), 2, relu=True)) is Tagged
    traced = torch.fx.symbolic_trace(nn.Sequential(MaxPool2d(2)))
    assert torch.equal(traced(x), F.max_pool2d(x, 2))


def test_autocast_leaves_the_dtype():
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert max_pool2d(torch.zeros(1, 1, 4, 4), 2).dtype == torch.float32


# --- compiled for GPUs that are not here --------------------------------------------------------------------------

OPERATIONS = ["relu_max_pool", "relu_max_pool_grad"]
STEM = (256, 64, 64, 64), (64, 64, 3, 3)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_kernels_compile_without_spills_and_load_sixteen_bytes(op, dtype, arch):
    (kernel,) = compile_ahead(op, *STEM, stride=2, padding=1, dtype=dtype, arch=arch)
    code = sass.read(kernel.asm["cubin"])
    assert code.spills == code.stack_bytes == 0
    loads = {one.bytes_a_thread for one in code.instructions if one.opcode.startswith("LDG")}
    assert loads == ({16} if op == "relu_max_pool" else {16, 8})  # and 8 bytes of the index


@pytest.mark.parametrize("op", OPERATIONS)
def test_kernels_compile_for_amd(op):
    for dtype in DTYPES:
        (kernel,) = compile_ahead(op, *STEM, stride=2, padding=1, dtype=dtype, arch="gfx942")
        assert ".vgpr_spill_count: 0" in kernel.asm["amdgcn"].replace("  ", "")


@pytest.mark.parametrize("op", OPERATIONS)
def test_sizes_of_one_and_more_pixels_than_an_int_holds_compile(op):
    for shape in ((1, 1, 1, 1), (1, 20, 3, 5), (2**17, 8, 128, 128)):
        (launch,) = launches_ahead(op, shape, (shape[1], shape[1], 1, 1), stride=1)
        assert launch.arguments["INDEX"] == (tl.int64 if shape[0] > 1 else tl.int32)


def test_a_ceiled_window_larger_than_the_image_is_its_whole():
    x = random(1, 2, 2, 4, dtype=torch.float32, seed=1)
    ours, theirs = (pool(x, (4, 3), ceil_mode=True) for pool in (max_pool2d, F.max_pool2d))
    assert torch.equal(ours, theirs)


def test_indices_asked_for_later_are_refused():
    pool = MaxPool2d(2)
    pool.return_indices = True
    with pytest.raises(NotImplementedError, match="return_indices"):
        pool(torch.zeros(1, 1, 4, 4))
