"""Convolution + bias + ReLU as one operator: value, gradients of every order, and what it keeps."""

import copy
from functools import partial

import pytest
import torch
from reference import TOLERANCE, random, results
from torch.nn.functional import conv2d as native_conv2d
from torch.nn.functional import relu as native_relu

from kernels import conv2d, runtime
from kernels.conv2d import Conv2d

pytestmark = pytest.mark.on_device

conv_relu = partial(conv2d, relu=True)


def chain(*operands, **geometry):
    """What it stands for."""
    return native_relu(native_conv2d(*operands, **geometry))


CASES = [
    pytest.param(dict(x=(2, 16, 9, 7), w=(24, 16, 3, 3), padding=1), id="whole-blocks"),
    pytest.param(dict(x=(2, 5, 9, 7), w=(7, 5, 3, 2), padding=(2, 1), stride=(2, 3)), id="nothing-divides-a-block"),
    pytest.param(dict(x=(2, 3, 17, 15), w=(8, 3, 7, 7), padding=3, stride=2), id="first-layer"),
    pytest.param(dict(x=(2, 16, 6, 6), w=(32, 16, 1, 1)), id="1x1"),
    pytest.param(dict(x=(1, 8, 11, 9), w=(6, 4, 3, 3), dilation=2, groups=2), id="dilated-groups"),
    pytest.param(dict(x=(2, 6, 8, 8), w=(12, 1, 3, 3), padding=1, stride=2, groups=6), id="depthwise"),
    pytest.param(dict(x=(1, 2, 12, 12), w=(3, 2, 9, 9), padding=4), id="more-taps-than-bits"),
]


def assert_matches(case, dtype, layout=torch.contiguous_format, bias=True):
    """Value and gradients agree with float64 within the dtype's tolerance.

    Of an element whose sign rounding decides, either side is right: the gradients compared are those of the mask that
    the result itself shows.
    """
    case = dict(case)
    x_shape, w_shape = case.pop("x"), case.pop("w")
    x = random(*x_shape, dtype=dtype, seed=1).to(memory_format=layout)
    w = random(*w_shape, dtype=dtype, seed=2).to(memory_format=layout)
    b = random(w_shape[0], dtype=dtype, seed=3) if bias else None
    wide = [t if t is None else t.cpu().double() for t in (x, w, b)]
    dy = random(*native_conv2d(*wide, **case).shape, dtype=dtype, seed=4)
    y, *gradients = results(conv_relu, x, w, b, dy, **case)
    assert y.dtype == dtype
    assert (y == 0).any(), "nothing is masked"
    assert (y > 0).any()
    passed = dy.cpu().double() * (y.cpu() > 0)
    expected = results(native_conv2d, *wide, passed, **case)
    bounds = results(native_conv2d, *(t if t is None else t.abs() for t in wide), passed.abs(), **case)
    for result, exact, bound in zip((y, *gradients), (expected[0].relu(), *expected[1:]), bounds, strict=True):
        if exact is not None:
            assert ((result.cpu().double() - exact).abs() <= TOLERANCE[dtype] * bound).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_value_and_gradients(case, dtype):
    assert_matches(case, dtype, torch.channels_last)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.cpu_only("interprets a GPU's tiles")
def test_by_a_gpu_s_tiles(case, arch, gpu_tiles):
    gpu_tiles(arch)
    assert_matches(case, torch.float32)


def test_without_bias():
    assert_matches(CASES[0].values[0], torch.float32, bias=False)


def test_values_are_those_of_the_convolution_bit_for_bit():
    shapes = (2, 5, 9, 9), (7, 5, 3, 3), (7,)
    x, w, b = (random(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes))
    assert torch.equal(conv_relu(x, w, b), conv2d(x, w, b).relu())


def test_nan_passes_in_both_directions_as_in_pytorch():
    x = random(1, 2, 4, 4, dtype=torch.float32, seed=1)
    x[0, 0, 1, 1] = torch.nan
    w, b = random(3, 2, 1, 1, dtype=torch.float32, seed=2), random(3, dtype=torch.float32, seed=3)
    actual, expected = results(conv_relu, x, w, b, None), results(chain, x, w, b, None)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    actual = [result.cpu() for result in actual]
    assert actual[0].isnan().sum() == 3
    assert actual[1][0, 0, 1, 1].item() == pytest.approx(w[:, 0].sum().item(), rel=1e-5), "NaN's gradient did not pass"


def test_infinite_gradients_stay_where_the_mask_lets_nothing_through():
    x, w = torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0]]], [[[-1.0]]]])
    dy = torch.full((1, 2, 2, 2), torch.inf)
    dy[:, 0] = 1
    _, dx, dw, db = results(conv_relu, x, w, torch.zeros(2), dy)
    assert torch.equal(dx, torch.ones_like(dx))
    assert dw.flatten().tolist() == db.tolist() == [4, 0]


def test_nor_do_they_pass_where_pytorch_masks():
    x, w = torch.ones(3, 1, 1, 2, 2), torch.tensor([[[[1.0]]], [[[-1.0]]]])
    dy = torch.tensor([1.0, torch.inf])[:, None, None].expand(1, 2, 2, 2)

    def gradient(image):
        return torch.func.vjp(lambda image: conv_relu(image, w), image)[1](dy)[0]

    assert torch.equal(torch.func.vmap(gradient)(x), torch.ones_like(x))


def float64_operands():
    shapes = (2, 4, 5, 6), (8, 2, 3, 3), (8,)
    return [random(*shape, dtype=torch.float64, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_both_orders_and_forward_mode(groups):
    shapes = (1, 2, 3, 4), (2, 2 // groups, 2, 2), (2,)
    x, w, b = (random(*shape, dtype=torch.float64, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))
    call = partial(conv_relu, stride=(1, 2), padding=1, groups=groups)
    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b))


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0), (1, None, 0)], ids=str
)
def test_vmap_of_value_and_gradient(in_dims):
    shapes = (2, 4, 5, 6), (8, 4, 3, 3), (8,)
    operands = []
    for seed, (shape, axis) in enumerate(zip(shapes, in_dims, strict=True)):
        batched = shape if axis is None else (*shape[:axis], 3, *shape[axis:])
        operands.append(random(*batched, dtype=torch.float64, seed=seed))

    def loss(call, *operands):
        return call(*operands, padding=1).pow(2).sum()

    for function in (lambda call: partial(loss, call), lambda call: torch.func.grad(partial(loss, call), (0, 1, 2))):
        ours = torch.func.vmap(function(conv_relu), in_dims)(*operands)
        theirs = torch.func.vmap(function(chain), in_dims)(*operands)
        torch.testing.assert_close(ours, theirs)


def test_per_sample_gradients():
    x, w, b = (t.detach() for t in float64_operands())

    def loss(call, w, b, image):
        return call(image[None], w, b, groups=2).pow(2).sum()

    ours, theirs = (
        torch.func.vmap(torch.func.grad(partial(loss, call), (0, 1)), (None, None, 0))(w, b, x)
        for call in (conv_relu, chain)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.cpu_only("counts what the CPU's autograd keeps")
def test_it_keeps_input_weight_and_result_and_no_more():
    kept = []
    x, w, b = float64_operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = conv_relu(x, w, b, groups=2)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, w, y))


@pytest.mark.cpu_only("listens to the CPU's launches")
def test_no_masked_gradient_is_written():
    """No buffer that the gradients take has the shape of dy, which no other tensor here has."""
    x, w, b = (t.detach().to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in float64_operands())
    y = conv_relu(x.requires_grad_(), w.requires_grad_(), b, groups=2)
    dy, taken = torch.ones_like(y), []
    with runtime.on_allocate(lambda nbytes, what, tensor: taken.append((what, tensor.shape))):
        y.backward(dy)
    assert [what for what, shape in taken if shape == y.shape] == []
    assert {"input gradient", "weight gradient", "bias gradient"} <= {what for what, _ in taken}


def test_changing_the_result_in_place_is_noticed():
    x, w, b = float64_operands()
    y = conv_relu(x, w, b, groups=2)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_it_in_whole(backend):
    operands = float64_operands()
    compiled = torch.compile(partial(conv_relu, groups=2), fullgraph=True, backend=backend)
    expected = torch.autograd.grad(conv_relu(*operands, groups=2).pow(2).sum(), operands)
    torch.testing.assert_close(torch.autograd.grad(compiled(*operands).pow(2).sum(), operands), expected)


def test_an_unbatched_image():
    x, w, b = float64_operands()
    torch.testing.assert_close(conv_relu(x[0], w, b, groups=2), chain(x[0], w, b, groups=2))


class TestNorm:
    """Conv2d with a batch norm behind it."""

    @staticmethod
    def modules(dtype=torch.float64, **norm):
        torch.manual_seed(0)
        conv, norm = Conv2d(4, 6, 3, padding=1).to(dtype), torch.nn.BatchNorm2d(6, **norm).to(dtype)
        with torch.no_grad():
            for tensor in (*norm.parameters(), *norm.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
        return conv, norm

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
    def test_it_is_the_three_one_after_the_other(self, relu, training, options):
        conv, norm = self.modules(**options)
        norm.train(training)
        x = random(3, 4, 6, 5, dtype=torch.float64, seed=5).requires_grad_()
        twin = copy.deepcopy(norm)
        ours = conv(x, norm=norm, relu=relu)
        theirs = twin(conv(x))
        theirs = theirs.relu() if relu else theirs
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(dict(norm.named_buffers()), dict(twin.named_buffers()))
        gradients = [
            torch.autograd.grad(y.pow(2).sum(), [x, *conv.parameters(), *after.parameters()])
            for y, after in ((ours, norm), (theirs, twin))
        ]
        torch.testing.assert_close(*gradients)

    def test_folded_it_keeps_nothing_as_large_as_a_result_but_the_result(self):
        conv, norm = self.modules()
        norm.eval()
        kept = []
        x = random(3, 4, 6, 5, dtype=torch.float64, seed=5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = conv(x, norm=norm, relu=True)
        assert {t.data_ptr() for t in kept if t.numel() >= y.numel()} == {y.data_ptr()}

    def test_half_precision_is_folded_in_float32(self):
        conv, norm = self.modules(torch.float32)
        norm.eval().running_var.fill_(1e-6)
        x = random(3, 4, 6, 5, dtype=torch.float32, seed=5)
        exact = norm(conv(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            y = conv(x, norm=norm)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
