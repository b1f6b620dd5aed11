"""The write-up's convolution, by the write-up's own cases and against float64 native convolution."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.unfold import UnfoldConv2d, unfold_conv2d

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.float64: {"atol": 1e-12, "rtol": 1e-12}}

# (x shape, w shape, stride, padding, dilation)
CASES = [
    pytest.param((2, 3, 12, 12), (4, 3, 7, 7), 2, 3, 1, id="simplenet-stem"),
    pytest.param((2, 5, 6, 6), (7, 5, 1, 1), 1, 0, 1, id="1x1-is-a-plain-matmul"),
    pytest.param((2, 3, 9, 7), (4, 3, 3, 2), (2, 3), (1, 2), (2, 1), id="rows-and-columns-differ"),
    pytest.param((1, 2, 8, 8), (3, 2, 2, 2), 3, 0, 1, id="pixels-no-window-reaches"),
    pytest.param((3, 2, 4, 4), (5, 2, 4, 4), 1, 0, 1, id="one-output-pixel"),
    pytest.param((0, 3, 8, 8), (4, 3, 3, 3), 1, 1, 1, id="empty-batch"),
]


def operands(x_shape, w_shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (x_shape, w_shape, w_shape[:1])
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (0, 3), (3, 3)])
def test_equals_nn_conv2d_in_the_writeups_cases(padding, stride):
    torch.manual_seed(0)
    reference = nn.Conv2d(3, 8, 5, stride=stride, padding=padding).double()
    ours = UnfoldConv2d(3, 8, 5, stride=stride, padding=padding).double()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 13, 13, dtype=torch.float64)
    torch.testing.assert_close(ours(x), reference(x), **TOLERANCE[torch.float64])


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding", "dilation"), CASES)
def test_values_and_gradients_equal_native_float64(x_shape, w_shape, stride, padding, dilation, dtype):
    ours = operands(x_shape, w_shape, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    y = unfold_conv2d(*ours, stride, padding, dilation)
    y_exact = conv2d(*exact, stride, padding, dilation)
    dy = torch.randn(y_exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, ours, dy.to(dtype))
    gradients_exact = torch.autograd.grad(y_exact, exact, dy.to(dtype).double())
    for result, expected in zip((y, *gradients), (y_exact, *gradients_exact), strict=True):
        torch.testing.assert_close(result.double(), expected, **TOLERANCE[dtype])


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
    asked = [x, w]
    result = torch.autograd.grad(unfold_conv2d(x, w, bias).relu_().square().sum(), asked)
    expected = torch.autograd.grad(conv2d(x, w, bias).relu().square().sum(), asked)
    torch.testing.assert_close(result, expected, **TOLERANCE[torch.float64])


def test_takes_any_layout_and_meta_tensors():
    x, w, bias = operands((2, 8, 6, 6), (4, 8, 3, 3))
    expected = unfold_conv2d(x, w, bias)
    result = unfold_conv2d(
        x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last), bias
    )
    torch.testing.assert_close(result, expected, **TOLERANCE[torch.float64])
    on_meta = unfold_conv2d(*(tensor.detach().to("meta") for tensor in (x, w, bias)))
    assert on_meta.is_meta
    assert on_meta.shape == expected.shape


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
    with pytest.raises(RuntimeError, match=r"expects 3 input channels.*\[2, 2, 8, 8\]"):
        unfold_conv2d(x[:, :2], w, bias)
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        unfold_conv2d(x[:, :, :2, :2], w, bias)
    with pytest.raises(TypeError, match="padding"):
        unfold_conv2d(x, w, bias, padding="same")
