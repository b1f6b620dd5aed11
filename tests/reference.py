"""What convolutions are held to: PyTorch's own in float64, within a rounding bound."""

import torch
from torch.nn.functional import conv2d as native_conv2d

# Largest error of a result, as a share of the same convolution of absolute values: an element's rounding errors cannot
# exceed (terms * epsilon) of that. Half-precision results are rounded once, from an fp32 accumulator: half an epsilon.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5.5e-4, torch.bfloat16: 4.1e-3}

NAMES = ("y", "dx", "dw", "db")

# Where tests marked `on_device` make their tensors; tests/conftest.py sets it to what --device says.
DEVICE = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values that are exact in `dtype`, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE, dtype)


def operands(groups: int = 1, **_) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (2, 4, 5, 6), w (8, 4/groups, 3, 3), bias (8,)."""
    shapes = (2, 4, 5, 6), (8, 4 // groups, 3, 3), (8,)
    return tuple(random(*shape, dtype=torch.float64, seed=seed) for seed, shape in enumerate(shapes))


def results(conv2d, x, w, b, dy, asked="xwb", **geometry) -> tuple[torch.Tensor | None, ...]:
    """(y, dx, dw, db) of a convolution of exactly these operands, strides and offsets included; dy None is ones.

    Gradients that are not `asked` for are None.
    """
    x, w, b = (t if t is None else t.detach().requires_grad_(n in asked) for n, t in zip("xwb", (x, w, b), strict=True))
    y = conv2d(x, w, b, **geometry)
    if y.requires_grad:
        y.backward(torch.ones_like(y) if dy is None else dy)
    return y.detach(), x.grad, w.grad, None if b is None else b.grad


def second_gradients(conv2d, *operands: torch.Tensor | None, **geometry) -> tuple[torch.Tensor, ...]:
    """Gradients of a cubic function of the gradients of a cubic function of the result, so that none is constant.

    Of an empty batch PyTorch's own second gradients forget the input: they count as zeros.
    """
    operands = [t if t is None else t.detach().requires_grad_() for t in operands]
    tensors = [t for t in operands if t is not None]
    first = torch.autograd.grad(conv2d(*operands, **geometry).pow(3).sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.pow(3).sum() for g in first), tensors, materialize_grads=True)


def assert_matches(conv2d, x_shape, w_shape, dtype=torch.float32, bias=True, layout=None, **geometry):
    """Value and all gradients of conv2d on random operands agree with float64 within TOLERANCE of the dtype."""
    x = random(*x_shape, dtype=dtype, seed=1).to(memory_format=layout or torch.contiguous_format)
    w = random(*w_shape, dtype=dtype, seed=2).to(memory_format=layout or torch.contiguous_format)
    b = random(w_shape[0], dtype=dtype, seed=3) if bias else None
    assert_operands_match(conv2d, x, w, b, **geometry)


def assert_operands_match(conv2d, x, w, b, asked="xwb", **geometry):
    """Value and the gradients asked for, of these operands, agree with float64 within TOLERANCE of their dtype."""
    wide = [t if t is None else t.detach().cpu().double() for t in (x, w, b)]
    dy = random(*native_conv2d(*wide, **geometry).shape, dtype=x.dtype, seed=4)
    wide.append(dy.cpu().double())
    expected = results(native_conv2d, *wide, asked, **geometry)
    bounds = results(native_conv2d, *(t if t is None else t.abs() for t in wide), asked, **geometry)
    actual = results(conv2d, x, w, b, dy.to(x.device), asked, **geometry)
    assert_rounded(actual, expected, bounds, x.dtype)


def assert_rounded(actual: tuple, expected: tuple, bounds: tuple, dtype: torch.dtype) -> None:
    """Each is within TOLERANCE of its bound from what is expected, or rounded to the next of the smallest numbers.

    Those lie a fixed step apart, so that half a step is no share of a number: float16 has them from 6e-5 down.
    """
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, result, exact, bound in zip(NAMES, actual, expected, bounds, strict=True):
        if exact is None:
            assert result is None
            continue
        assert (result.dtype, result.shape) == (dtype, exact.shape), name
        off = (result.cpu().double() - exact).abs()
        assert (off <= TOLERANCE[dtype] * bound + step / 2).all(), f"{name} is off by {off.max():.3g}"


# (padding, stride) of the convolutions that the write-up checked its own with.
WRITE_UP_CASES = [(0, 1), (0, 3), (3, 3)]
