"""The write-up's convolution, by the write-up's own cases and against float64 native convolution."""

import pytest
import reference
import torch
from reference import WRITE_UP_CASES, assert_matches, native_conv2d, random, results
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import models
from kernels.unfold import UnfoldConv2d, unfold_conv2d

pytestmark = pytest.mark.on_device

# (x shape, w shape, stride, padding, dilation)
CASES = [
    pytest.param((2, 3, 12, 12), (4, 3, 7, 7), 2, 3, 1, id="simplenet-stem"),
    pytest.param((2, 5, 6, 6), (7, 5, 1, 1), 1, 0, 1, id="1x1-is-a-plain-matmul"),
    pytest.param((2, 3, 9, 7), (4, 3, 3, 2), (2, 3), (1, 2), (2, 1), id="rows-and-columns-differ"),
    pytest.param((1, 2, 8, 8), (3, 2, 2, 2), 3, 0, 1, id="pixels-no-window-reaches"),
    pytest.param((3, 2, 4, 4), (5, 2, 4, 4), 1, 0, 1, id="one-output-pixel"),
]


def operands(x_shape, w_shape):
    """x, w and bias in float64, each needing a gradient"""
    shapes = (x_shape, w_shape, w_shape[:1])
    return [random(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def by_module(x, w, b, **geometry):
    co, ci, *kernel_size = w.shape
    return functional_call(UnfoldConv2d(ci, co, kernel_size, **geometry), {"weight": w, "bias": b}, x)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("padding", "stride"), WRITE_UP_CASES)
def test_the_write_ups_cases(padding, stride):
    assert_matches(by_module, (2, 3, 12, 12), (64, 3, 7, 7), torch.float64, padding=padding, stride=stride)


@pytest.mark.slow
def test_gradcheck_of_the_writeup():
    x, w, bias = operands((2, 3, 12, 12), (64, 3, 7, 7))
    assert torch.autograd.gradcheck(
        lambda *tensors: unfold_conv2d(*tensors, stride=2, padding=3), (x, w, bias), eps=1e-4, atol=1e-5
    )


def test_second_derivatives():
    x, w, bias = operands((2, 2, 5, 5), (3, 2, 3, 3))
    assert torch.autograd.gradgradcheck(
        lambda *tensors: unfold_conv2d(*tensors, stride=2, padding=1), (x, w, bias), eps=1e-4, atol=1e-5
    )


# Not half precision: several roundings of plain PyTorch there, where the kernels' bound allows one.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding", "dilation"), CASES)
def test_values_and_gradients_equal_native_float64(x_shape, w_shape, stride, padding, dilation, dtype):
    assert_matches(unfold_conv2d, x_shape, w_shape, dtype, stride=stride, padding=padding, dilation=dilation)


def test_an_empty_batch_has_empty_results_and_zero_weight_gradients():
    y, dx, dw, db = results(unfold_conv2d, *operands((0, 3, 8, 8), (4, 3, 3, 3)), None)
    assert y.shape == (0, 4, 6, 6)
    assert dx.shape == (0, 3, 8, 8)
    assert dw.eq(0).all()
    assert db.eq(0).all()


@pytest.mark.parametrize(
    ("frozen", "runs", "stays_away"),
    [(0, "im2col", "col2im"), (1, "col2im", "im2col")],
    ids=["frozen-input-folds-nothing", "frozen-weight-unfolds-nothing"],
)
def test_backward_computes_only_what_is_asked(frozen, runs, stays_away):
    tensors = operands((2, 3, 8, 8), (4, 3, 3, 3))
    tensors[frozen].requires_grad_(False)
    y = unfold_conv2d(*tensors)
    with Operators() as operators:
        y.sum().backward()
    assert tensors[frozen].grad is None
    assert runs in operators.names
    assert stays_away not in operators.names


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_in_place_relu_may_follow(with_bias):
    x, w, bias = operands((2, 3, 8, 8), (4, 3, 3, 3))
    bias = bias if with_bias else None
    ours = results(lambda *tensors: unfold_conv2d(*tensors).relu_(), x, w, bias, None)
    native = results(lambda *tensors: native_conv2d(*tensors).relu(), x, w, bias, None)
    torch.testing.assert_close(ours, native)


def test_takes_channels_last_and_meta_tensors():
    assert_matches(unfold_conv2d, (2, 8, 6, 6), (4, 8, 3, 3), torch.float64, layout=torch.channels_last)
    on_meta = unfold_conv2d(*(tensor.detach().to("meta") for tensor in operands((2, 8, 6, 6), (4, 8, 3, 3))))
    assert on_meta.is_meta
    assert on_meta.shape == (2, 4, 4, 4)


def test_shares_the_state_dict_of_nn_conv2d():
    reference = nn.Conv2d(3, 8, 3)
    ours = UnfoldConv2d(3, 8, 3)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert isinstance(ours, nn.Conv2d)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in reference.state_dict().items())


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"groups": 3}, "groups must be 1, got 3"),
        ({"padding": "same"}, "padding must be in pixels, got 'same'"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode must be zeros, got 'reflect'"),
    ],
    ids=["groups", "named-padding", "padding-mode"],
)
def test_options_it_lacks_are_refused_at_construction(option, named):
    with pytest.raises(NotImplementedError, match=named):
        UnfoldConv2d(3, 6, 3, **option)


def test_wrong_calls_name_the_values():
    x, w, bias = operands((2, 3, 8, 8), (4, 3, 3, 3))
    with pytest.raises(NotImplementedError, match="groups must be 1, got 3"):
        unfold_conv2d(x, w, bias, groups=3)
    with pytest.raises(RuntimeError, match=r"\[2, 2, 8, 8\] to have 3 channels, but got 2"):
        unfold_conv2d(x[:, :2], w, bias)
    with pytest.raises(RuntimeError, match=r"size per channel: \(2 x 2\). Kernel size: \(3 x 3\)"):
        unfold_conv2d(x[:, :, :2, :2], w, bias)
    with pytest.raises(TypeError, match="padding"):
        unfold_conv2d(x, w, bias, padding="same")


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1, "bias": False}], ids=["plain", "strided"])
def test_autocast_casts_as_for_nn_conv2d(geometry):
    x = random(2, 3, 8, 8, dtype=torch.float32, seed=0)
    native, ours = nn.Conv2d(3, 4, 3, **geometry), UnfoldConv2d(3, 4, 3, **geometry)
    ours.load_state_dict(native.state_dict())

    def run(layer, **options):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast(reference.DEVICE.type, torch.bfloat16, **options):
            y = layer(inputs)
        y.sum().backward()
        return [y.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())]

    for options, dtype in (({}, torch.bfloat16), ({"enabled": False}, torch.float32)):
        actual, expected = run(ours, **options), run(native, **options)
        assert actual[0].dtype == dtype
        assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_a_model_trains_under_autocast():
    torch.manual_seed(0)
    model = models.build("resnet18", "unfold", 10, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.autocast(reference.DEVICE.type, torch.bfloat16):
        loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, old), name
