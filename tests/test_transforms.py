"""Derivatives of a convolution: which are computed, in forward mode, and under torch.func."""

import itertools
import weakref

import pytest
import torch
from reference import native_conv2d, operands, random
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from kernels import Conv2d, conv2d

pytestmark = pytest.mark.on_device

GEOMETRIES = [
    pytest.param({"padding": 1}, id="dense"),
    pytest.param({"stride": (2, 1), "padding": 1, "groups": 2}, id="groups-and-stride"),
    pytest.param({"stride": 2, "padding": (1, 0), "groups": 4}, id="depthwise"),
]


def assert_same(function, *arguments) -> None:
    """function(conv2d, ...) is function(PyTorch's, ...), in every tensor it returns."""
    torch.testing.assert_close(function(conv2d, *arguments), function(native_conv2d, *arguments))


# --- which gradients are computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["x", "w", "b", "xw", "xwb", ""])
def test_only_the_gradients_of_what_requires_one_are_computed(asked, launches):
    named = dict(zip("xwb", operands(), strict=True))
    for name in asked:
        named[name].requires_grad_()
    y = conv2d(*named.values())
    assert y.requires_grad == bool(asked)
    if asked:
        y.sum().backward()
    assert launches == ["forward", *({"x": "input_grad", "w": "weight_grad"}[name] for name in asked if name in "xw")]
    assert [name for name in "xwb" if named[name].grad is not None] == list(asked)


@pytest.mark.parametrize(("asked", "launched"), [(0, ["input_grad"]), (1, ["weight_grad"]), (2, [])])
@pytest.mark.parametrize("leaf", [True, False])
def test_only_the_gradients_that_are_asked_for_are_computed(asked, launched, leaf, launches):
    tensors = [t.requires_grad_() if leaf else t.requires_grad_() * 1 for t in operands()]
    y = conv2d(*tensors)
    torch.autograd.grad(y.sum(), tensors[asked], create_graph=True)
    assert launches == ["forward", *launched]


def test_a_first_layer_and_frozen_weights_cost_nothing(launches):
    model = nn.Sequential(Conv2d(3, 4, 3), nn.ReLU(), Conv2d(4, 4, 3))
    model(torch.randn(1, 3, 7, 7)).sum().backward()
    assert launches == ["forward"] * 2 + ["input_grad", "weight_grad", "weight_grad"]
    launches.clear()
    x = torch.randn(1, 3, 7, 7, requires_grad=True)
    model.requires_grad_(False)(x).sum().backward()
    assert launches == ["forward"] * 2 + ["input_grad"] * 2


@pytest.mark.parametrize(("frozen", "kept"), [("w", 1), ("x", 1), ("", 2), ("xw", 0)])
def test_an_operand_is_kept_only_for_a_gradient_that_needs_it(frozen, kept):
    x, w, _ = (t.requires_grad_() for t in operands())
    x, w = (x.detach() if "x" in frozen else x), (w.detach() if "w" in frozen else w)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        conv2d(x, w)
    assert len(saved) == kept


def test_a_layer_with_frozen_weights_lets_its_input_go():
    x, w, _ = operands()
    hidden = x.requires_grad_() * 1
    memory = weakref.ref(hidden.untyped_storage())
    y = conv2d(hidden, w)
    del hidden
    assert y.requires_grad
    assert memory() is None


# --- forward mode and torch.func ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forward_mode_by_gradcheck_with_batched_gradients(geometry):
    tensors = [t.requires_grad_() for t in operands(**geometry)]
    assert torch.autograd.gradcheck(
        lambda *a: conv2d(*a, **geometry), tensors, fast_mode=True, check_forward_ad=True,
        check_batched_grad=True, check_batched_forward_grad=True, check_undefined_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        lambda *a: conv2d(*a, **geometry), tensors, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize(("given", "launched"), [("x", 1), ("w", 1), ("b", 0), ("xb", 1), ("wb", 1), ("xwb", 2)])
def test_tangents_cost_a_convolution_each_and_missing_ones_none(given, launched, launches):
    primals = dict(zip("xwb", operands(), strict=True))
    tangents = {name: random(*primals[name].shape, dtype=torch.float64, seed=9) for name in given}

    def tangent(conv):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, tangents[n]) if n in given else p for n, p in primals.items()]
            return forward_ad.unpack_dual(conv(*duals, padding=1)).tangent

    assert_same(tangent)
    assert launches == ["forward"] * (1 + launched)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
        lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
    ],
    ids=["forward-over-reverse", "forward-over-forward", "reverse-over-forward"],
)
def test_hessians(transform, geometry):
    x, w, b = operands(**geometry)
    x, w, b = x[:1, :, :3, :3], w[:4], b[:4]
    for argnums in range(3):
        assert_same(lambda conv, n=argnums: transform(lambda *a: conv(*a, **geometry).pow(3).sum(), argnums=n)(x, w, b))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_vmap_over_any_operands_and_the_gradients_under_it(geometry, with_bias):
    B = 3
    x, w, b = operands(**geometry)

    def batched(tensor, dim):
        return tensor if dim is None else torch.stack([tensor * (i + 1) for i in range(B)], dim)

    for dims in itertools.product((None, 2), (None, 1), (None, 0) if with_bias else (None,)):
        if dims == (None, None, None):
            continue
        arguments = [batched(tensor, dim) for tensor, dim in zip((x, w, b), dims, strict=True)]

        def value(conv):
            return lambda x, w, b: conv(x, w, b if with_bias else None, **geometry)

        def gradients(conv, value=value):
            return grad(lambda *a: value(conv)(*a).pow(2).sum(), argnums=(0, 1, 2) if with_bias else (0, 1))

        assert_same(lambda conv, d=dims, a=arguments: vmap(value(conv), d)(*a))
        assert_same(lambda conv, d=dims, a=arguments: vmap(gradients(conv), d)(*a))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("batched", ["dy", "x", "w"])
def test_vmap_over_one_operand_of_a_gradient(batched, geometry):
    x, w, _ = operands(**geometry)
    dy = random(*native_conv2d(x, w, **geometry).shape, dtype=torch.float64, seed=5)
    tensors = {"x": x, "w": w, "dy": dy}
    many = torch.stack([tensors[batched] * (i + 1) for i in range(3)])

    def gradients(conv):
        def one(tensor):
            a = tensors | {batched: tensor}
            return vjp(lambda x, w: conv(x, w, **geometry), a["x"], a["w"])[1](a["dy"])

        return vmap(one)(many)

    assert_same(gradients)


def test_vmap_within_vmap():
    x, w, _ = operands()
    xs, ws = torch.stack([x, -x]), torch.stack([w, 2 * w, 3 * w])
    assert_same(lambda conv: vmap(lambda x: vmap(lambda w: conv(x, w, padding=1))(ws))(xs))


def test_second_derivatives_under_vmap_join_batches_of_every_operand():
    x, w, _ = operands(groups=2)
    vectors = torch.stack([random(*w.shape, dtype=torch.float64, seed=i) for i in range(3)])

    def products(conv):
        gradient = grad(lambda w: conv(x, w, groups=2).pow(3).sum())
        return vmap(lambda v: jvp(gradient, (w,), (v,))[1])(vectors), vmap(lambda v: vjp(gradient, w)[1](v)[0])(vectors)

    assert_same(products)


def test_per_sample_gradients_are_those_of_each_sample():
    x, w, b = operands()
    per_sample = vmap(grad(lambda w, b, x: conv2d(x, w, b).pow(2).sum(), argnums=(0, 1)), (None, None, 0))(w, b, x)
    for i in range(len(x)):
        w_i, b_i = w.clone().requires_grad_(), b.clone().requires_grad_()
        native_conv2d(x[i], w_i, b_i).pow(2).sum().backward()
        torch.testing.assert_close((per_sample[0][i], per_sample[1][i]), (w_i.grad, b_i.grad))


def test_an_ensemble_of_models_runs_as_one():
    models = [nn.Sequential(Conv2d(4, 3, 3), nn.ReLU(), Conv2d(3, 2, 1)).double() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = operands()[0]
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))
