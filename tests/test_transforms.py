"""What PyTorch does to a convolution: forward mode, vmap, torch.func, compilation, export, autocast, checkpoints."""

import io
import itertools
import shutil
import weakref

import pytest
import torch
from reference import native_conv2d, random
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import Conv2d, conv2d, ops

GEOMETRIES = [
    pytest.param({"padding": 1}, id="dense"),
    pytest.param({"stride": (2, 1), "padding": 1, "groups": 2}, id="groups-and-stride"),
    pytest.param({"stride": 2, "padding": (1, 0), "groups": 4}, id="depthwise"),
]


def operands(groups: int = 1, **_) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (2, 4, 5, 6), w (8, 4/groups, 3, 3), bias (8,)."""
    shapes = (2, 4, 5, 6), (8, 4 // groups, 3, 3), (8,)
    return tuple(random(*shape, dtype=torch.float64, seed=seed) for seed, shape in enumerate(shapes))


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The launchers called, in order."""
    calls = []
    for name in ("forward", "input_grad", "weight_grad"):
        launcher = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _f=launcher, _n=name, **k: calls.append(_n) or _f(*a, **k))
    return calls


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


# --- compilation and export ---------------------------------------------------------------------------------------

BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=[
        pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
    ]),
]  # fmt: skip


@pytest.fixture
def model() -> nn.Sequential:
    """A bit of everything that a model holds around its convolutions."""
    torch.manual_seed(0)
    torch.compiler.reset()
    return nn.Sequential(
        Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="reflect"), nn.MaxPool2d(2),
        Conv2d(8, 4, (2, 3), stride=2, padding=1, groups=2),
    )  # fmt: skip


def training_step(model: nn.Module, run: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of run(x), and the gradients that its squares' sum gives to x and to the model's parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = run(x)
    y.float().pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_trains_as_it_does_uncompiled_without_graph_breaks(model, backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((2, 3, 9, 9), (3, 3, 9, 9), (3, 3, 12, 7)):  # the later ones make sizes symbols
        x = torch.randn(shape)
        for ours, expected in zip(training_step(model, compiled, x), training_step(model, model, x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_with_frozen_weights_launches_no_weight_gradient(model, launches):
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    torch.compile(model.requires_grad_(False), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert launches == ["forward"] * 3 + ["input_grad"] * 3


def test_transforms_compile_too():
    x, w, _ = operands()

    def per_sample(x, w):
        return vmap(grad(lambda w, x: conv2d(x, w).pow(2).sum()), (None, 0))(w, x)

    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), per_sample(x, w))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_takes_other_sizes_is_saved_and_trains(model, strict):
    sizes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=8, max=4096)}
    model.eval()
    program = torch.export.export(model, (torch.randn(2, 3, 9, 9),), strict=strict, dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(5, 3, 13, 9)
    torch.testing.assert_close(training_step(loaded, loaded, x), training_step(model, model, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_trains(model):
    x = torch.randn(2, 3, 9, 9)
    traced = torch.jit.trace(model.eval(), x)
    torch.testing.assert_close(training_step(model, traced, x), training_step(model, model, x))


def test_fx_records_each_convolution_as_one_call(model):
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"].count(conv2d) == 3
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("name", ["forward", "input_grad", "weight_grad"])
def test_the_raw_operators_pass_pytorchs_own_check(name):
    x, w, b = (t.requires_grad_() for t in operands(groups=2))
    dy = native_conv2d(x, w, groups=2).detach().requires_grad_()
    geometry = (1, 1), (0, 0), (1, 1), 2
    arguments = {
        "forward": (x, w, b, *geometry),
        "input_grad": (dy, w, x.shape, *geometry, False),
        "weight_grad": (dy, x, w.shape, *geometry, True),
    }[name]
    outcomes = torch.library.opcheck(getattr(torch.ops.conv_lab, name), arguments)
    assert set(outcomes.values()) == {"SUCCESS"}


def test_flops_are_counted_as_pytorchs_are():
    def flops(conv):
        x, w, b = (t.requires_grad_() for t in operands())
        with FlopCounterMode(display=False) as counter:
            conv(x, w, b, stride=2, padding=1).sum().backward()
        return counter.get_total_flops()

    assert flops(conv2d) == flops(native_conv2d) > 0


# --- modes of running ---------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_autocast_casts_what_it_casts_for_pytorchs(x_dtype, w_dtype, target):
    x, w, b = (t.to(dtype) for t, dtype in zip(operands(), (x_dtype, w_dtype, w_dtype), strict=True))

    def run(conv):
        tensors = [t.clone().requires_grad_() for t in (x, w, b)]
        with torch.autocast("cpu", target):
            y = conv(*tensors, padding=1)
        y.sum().backward()
        return [y, *(t.grad for t in tensors)]

    if (x_dtype == torch.float64) != (w_dtype == torch.float64):
        for conv in (conv2d, native_conv2d):
            with pytest.raises(RuntimeError):
                run(conv)
        return
    for ours, native in zip(run(conv2d), run(native_conv2d), strict=True):
        assert ours.dtype == native.dtype
        torch.testing.assert_close(ours, native, rtol=2e-2, atol=2e-2)


def test_autocast_of_another_device_or_switched_off_changes_nothing():
    x, w, b = (t.float() for t in operands())
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert conv2d(x, w, b).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x.to("meta"), w.to("meta")).dtype == torch.float32


def test_autocast_on_cuda_by_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(2, 3, 8, 8, device="cuda"), torch.empty(4, 3, 3, 3, device="cuda")
        torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") does nothing where there is no GPU
        try:
            assert conv2d(x, w).dtype == native_conv2d(x, w).dtype == torch.get_autocast_dtype("cuda") == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradients(model, use_reentrant, launches):
    x = torch.randn(2, 3, 9, 9)
    expected = training_step(model, model, x)
    launches.clear()
    actual = training_step(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)
    torch.testing.assert_close(actual, expected)
    assert launches.count("forward") == 6


def test_deterministic_mode_runs_and_changes_no_bit(model):
    x = torch.randn(2, 3, 9, 9)
    expected = training_step(model, model, x)
    torch.use_deterministic_algorithms(True)
    try:
        actual = training_step(model, model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, actual, expected))


def test_inference_mode_and_no_grad():
    tensors = [t.requires_grad_() for t in operands()]
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            y = conv2d(*tensors)
        assert not y.requires_grad
        torch.testing.assert_close(y, native_conv2d(*tensors).detach())


def test_lazily_conjugated_negated_and_zero_tensors():
    w = random(4, 3, 3, 3, dtype=torch.float64, seed=0)
    negative = torch.randn(2, 3, 6, 6, dtype=torch.cdouble).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(conv2d(negative, w), native_conv2d(negative, w))
    assert not conv2d(torch._efficientzerotensor(2, 3, 6, 6, dtype=torch.float64), w).any()


class Tagged(torch.Tensor):
    """A subclass as libraries make them, by PyTorch's default rules."""


def test_subclasses_and_modes_see_the_call_as_pytorchs():
    x, w, _ = operands()
    assert type(conv2d(x.as_subclass(Tagged), w)) is Tagged
    with torch.device("meta"):  # a mode that looks at every function
        torch.testing.assert_close(conv2d(x, w), native_conv2d(x, w))


def test_fp32_precision_follows_pytorchs_switches(monkeypatch):
    seen = []
    launcher = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a, **k: seen.append(k["precision"]) or launcher(*a, **k))
    x, w, _ = (t.float() for t in operands())
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = setting
            conv2d(x, w)
            conv2d(x.half(), w.half())
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert seen == ["tf32", "ieee", "ieee", "ieee"]
