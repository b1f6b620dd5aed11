"""What else runs a convolution: torch.compile, export, tracing, autocast, checkpoints, inference mode, subclasses."""

import io
import itertools
import shutil

import pytest
import reference
import torch
from reference import native_conv2d, operands, random
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import Conv2d, conv2d, ops
from kernels.runtime import DTYPES

pytestmark = pytest.mark.on_device

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


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_autocast_casts_what_it_casts_for_pytorchs(x_dtype, w_dtype, target):
    x, w, b = (t.to(dtype) for t, dtype in zip(operands(), (x_dtype, w_dtype, w_dtype), strict=True))

    def run(conv):
        tensors = [t.clone().requires_grad_() for t in (x, w, b)]
        with torch.autocast(reference.DEVICE.type, target):
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


@pytest.mark.cpu_only("the other device is the meta device, and autocast's the CPU")
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


@pytest.mark.cpu_only("PyTorch's reflection padding has no deterministic gradient on CUDA")
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
    assert not conv2d(torch._efficientzerotensor(2, 3, 6, 6, dtype=torch.float64, device=w.device), w).any()


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
