"""Gradient attacks: the rule they follow, the model they leave alone, and what they report."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_compile_ahead import ARCHITECTURES
from torch import Tensor, nn

import models
from attacks import attack_report, fgsm, pgd
from attacks.ball import L2, Linf, make_ball
from attacks.step import fused_linf_step, linf_table
from bench.measure import sass
from kernels import runtime

BOUNDS = 0.1, 0.9  # inside the images' own range, so that they cut
SIZES = dict(num_steps=10, step_size=0.01, epsilon=0.035)  # a size that steps do not divide: the ball cuts too
PER_CHANNEL = torch.tensor([0.5, 0.2, 0.3]).view(3, 1, 1)
inf, nan = math.inf, math.nan


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """(N, 3, 8, 8) -> (N, 10): fast, in training mode, and different there by both its dropout and its statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    model[1].running_mean.normal_(std=0.2)
    model[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model[-1].weight *= 8  # classes far enough apart for predictions to change under attack
    return model.to(dtype)


def images(count: int = 6, dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return evaluated(model)(x).argmax(dim=1)


def evaluated(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def textbook(model, x, aim, sign, num_steps, step_size, epsilon, bounds=(-inf, inf)) -> tuple[Tensor, Tensor]:
    """Adversarial images, and the labels aim(logits) of each step: [num_steps, N]."""
    adv, aims = x, []
    for _ in range(num_steps):
        adv = adv.detach().requires_grad_()
        logits = model(adv)
        aims.append(aim(logits.detach()))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, aims[-1], reduction="sum"), adv)
        stepped = adv.detach() + sign * step_size * gradient.sign()
        adv = (x + (stepped - x).clamp(-epsilon, epsilon)).clamp(*bounds)
    return adv, torch.stack(aims)


def lengths(delta: Tensor) -> Tensor:
    return delta.flatten(1).double().norm(dim=1)


# The rule


@pytest.mark.parametrize("bounds", [None, BOUNDS, (-0.2, 1.3)], ids=["unbounded", "cutting", "wide"])
@pytest.mark.parametrize("given", [False, True], ids=["untargeted", "given"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_foolbox(norm, given, bounds):
    foolbox = pytest.importorskip("foolbox")
    model, x = make_model(), images().clamp(*(bounds or (0, 1)))
    y = torch.arange(len(x))
    sizes = SIZES if norm == "linf" else dict(num_steps=3, step_size=0.3, epsilon=0.7)
    theirs = getattr(foolbox.attacks, f"{norm[0].upper()}{norm[1:]}ProjectedGradientDescentAttack")(
        abs_stepsize=sizes["step_size"], steps=sizes["num_steps"], random_start=False
    )
    criterion = foolbox.criteria.TargetedMisclassification(y) if given else foolbox.criteria.Misclassification(y)
    wrapped = foolbox.PyTorchModel(evaluated(model), bounds=bounds or (-100, 100), device="cpu")
    expected = theirs.run(wrapped, x, criterion, epsilon=sizes["epsilon"])
    target = {"target": y} if given else {"target": "untargeted", "y": y}
    got = pgd(model, x, **target, norm=norm, bounds=bounds, **sizes)
    if norm == "linf":
        assert torch.equal(got, expected)
    else:
        assert (lengths(expected - x) > 0.6).all(), "the ball was never met"
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("target", ["untargeted", "given", "most_likely", "least_likely"])
def test_ten_steps_are_the_textbooks(target, bounds, dtype):
    model, x = make_model(dtype), images(dtype=dtype)
    y = predicted(model, x)
    aims = {
        "untargeted": (lambda logits: y, 1), "given": (lambda logits: (y + 1) % 10, -1),
        "most_likely": (lambda logits: logits.sort(dim=1).indices[:, -1], 1),
        "least_likely": (lambda logits: logits.sort(dim=1).indices[:, 0], -1),
    }  # fmt: skip
    expected, labels = textbook(evaluated(model), x, *aims[target], **SIZES, bounds=bounds or (-inf, inf))
    changes = (labels != labels[0]).any()
    assert changes == (target in ("most_likely", "least_likely")), "the case does not show whose labels are chosen anew"
    given = {"target": (y + 1) % 10} if target == "given" else {"target": target, "y": y}
    assert torch.equal(pgd(model, x, **given, **SIZES, bounds=bounds), expected)


@pytest.mark.parametrize(("conv", "num_steps"), [("torch", 1), ("torch", 10), ("unfold", 1), ("triton", 1)])
def test_steps_are_the_textbooks_for_each_convolution(conv, num_steps):
    torch.manual_seed(0)
    model, x, y = models.build("simplenet", conv, 10, 32), images(2, size=32), torch.tensor([3, 7])
    sizes = SIZES | dict(num_steps=num_steps, bounds=BOUNDS)
    expected, _ = textbook(model, x, lambda logits: y, 1, **sizes)
    assert torch.equal(pgd(model, x, "untargeted", y, **sizes), expected)
    if num_steps == 1:
        native = models.build("simplenet", "torch", 10, 32)
        native.load_state_dict(model.state_dict())
        other, _ = textbook(native, x, lambda logits: y, 1, **sizes)
        assert (expected != other).double().mean() < 0.01  # signs of gradients next to 0


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("target", ["least_likely", "untargeted"])
def test_fgsm_is_one_step_of_the_whole_epsilon(target, bounds):
    model, x, y, size = make_model(), images(), torch.arange(6), PER_CHANNEL / 10
    got = fgsm(model, x, target, y, epsilon=size, bounds=bounds)
    expected = pgd(model, x, target, y, num_steps=1, step_size=size, epsilon=size, bounds=bounds)
    assert torch.equal(got, expected)
    assert bounds or (((got - x).abs() / size - 1).abs() < 1e-5).double().mean() > 0.8  # the rest has no gradient


# Targets


def test_least_likely_is_never_the_true_label():
    model, x = make_model(), images()
    with torch.no_grad():
        order = evaluated(model)(x).sort(dim=1).indices
    y = order[:, 0]

    def aim(logits):
        order = logits.sort(dim=1).indices
        return torch.where(order[:, 0] == y, order[:, 1], order[:, 0])

    expected, labels = textbook(evaluated(model), x, aim, -1, **SIZES)
    assert (labels[0] == order[:, 1]).all()
    got = pgd(model, x, "least_likely", y, **SIZES)
    assert torch.equal(got, expected)
    assert not torch.equal(got, pgd(model, x, "least_likely", **SIZES)), "the label made no difference"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"target": "likely"}, "target must be a label tensor or one of .*'most_likely'.*, got 'likely'"),
        pytest.param({"target": "untargeted", "y": None}, "give them as y"),
        pytest.param({"target": torch.zeros(5).long()}, r"target must be 6 integer labels, .* got \(5,\) of"),
        pytest.param({"target": torch.zeros(6)}, r"target must be 6 integer labels, .* of torch.float32"),
        pytest.param({"y": torch.zeros(6, 1).long()}, r"y must be 6 integer labels, one an image; got \(6, 1\)"),
        pytest.param({"y": torch.zeros(6).bool()}, "y must be 6 integer labels, .* of torch.bool"),
        pytest.param({"y": torch.full((6,), -100)}, "y must be 6 integer labels of at least 0, .* -100"),
        pytest.param({"norm": "l1"}, "norm must be one of 'linf', 'l2', got 'l1'"),
        pytest.param({"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
        pytest.param({"epsilon": torch.tensor([0.1, -0.1, 0.1]).view(3, 1, 1)}, "epsilon must be at least 0, got"),
        pytest.param({"epsilon": torch.ones(3)}, r"epsilon of shape \(3,\) does not broadcast to x's \(6, 3, 8, 8\)"),
        pytest.param({"epsilon": torch.ones(1, 6, 3, 8, 8)}, r"epsilon of shape .* does not broadcast"),
        pytest.param({"epsilon": PER_CHANNEL, "norm": "l2"}, r"of an image.*got epsilon of shape \(3, 1, 1\)"),
        pytest.param({"step_size": PER_CHANNEL, "norm": "l2"}, r"of an image.*got step_size of shape \(3, 1, 1\)"),
        pytest.param({"step_size": nan}, "step_size must be at least 0, got nan"),
        pytest.param({"bounds": (1, 0)}, r"bounds must be \(low, high\) with low <= high, got \(1, 0\)"),
        pytest.param({"bounds": (0, nan)}, "bounds must be a number, got nan"),
        pytest.param({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        pytest.param({"restarts": 0}, "restarts must be at least 1, got 0"),
        pytest.param({"x": torch.zeros(3, 8, 8)}, r"x must be \(N, C, H, W\) .*, got \(3, 8, 8\) of torch.float32"),
        pytest.param({"x": torch.zeros(6, 3, 8, 8).half()}, "x must be .* float32 or float64, got .* torch.float16"),
    ],
)
@pytest.mark.parametrize("attack", [pgd, attack_report])
def test_wrong_arguments_are_named(attack, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        attack(make_model(), **{"x": images(), "y": torch.arange(6)} | arguments)
    assert isinstance(arguments.get("epsilon", 0), Tensor) or "\n" not in str(error.value)


# What the model keeps


class Restless(nn.Module):
    """Draws random numbers, and fails at its `fails_at`-th call."""

    calls, fails_at = 0, inf

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(3)
        if self.calls == self.fails_at:
            raise ArithmeticError("made to fail")
        return x


def state(model: nn.Module) -> list:
    """All that an attack must leave alone; the gradients' identities as well."""
    tensors = [tensor.clone() for tensor in (*model.parameters(), *model.buffers(), torch.get_rng_state())]
    tensors += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [
        [module.training for module in model.modules()],
        [(parameter.requires_grad, id(parameter.grad)) for parameter in model.parameters()],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        [tensor.tolist() for tensor in tensors],
    ]


ATTACKS = {
    "pgd": lambda *arguments: pgd(*arguments, num_steps=3),
    "restarts": lambda *arguments: pgd(*arguments, num_steps=3, restarts=2),
    "l2": lambda *arguments: pgd(*arguments, num_steps=3, norm="l2"),
    "fgsm": fgsm,
    "report": lambda *arguments: attack_report(*arguments, num_steps=3, drop_fooled=True).adversarial,
}


@pytest.mark.parametrize("fails_at", [inf, 1, 2], ids=["returns", "fails", "fails-later"])
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "fgsm"])
def test_model_is_left_as_it_was_found(attack, fails_at):
    plain, x = make_model(), images().requires_grad_()
    model, y = nn.Sequential(Restless(), *plain), predicted(plain, images())
    model(images()).sum().backward()
    model[2].eval()  # a layer frozen inside a model that trains, with its parameters
    model[2].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = None
    model[0].calls, model[0].fails_at = 0, fails_at
    before = state(model)
    with contextlib.nullcontext() if fails_at == inf else pytest.raises(ArithmeticError, match="made to fail"):
        assert not ATTACKS[attack](model, x, "untargeted", y).requires_grad
    assert model[0].calls >= min(fails_at, 3)
    assert state(model) == before
    assert torch.equal(x, images())
    assert x.grad is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_images_are_left_alone_by_a_first_layer_in_place(attack):
    x, model = images() - 0.5, nn.Sequential(nn.ReLU(inplace=True), make_model())
    y = predicted(model, x.clone())
    with pytest.raises(RuntimeError, match="in-place"):
        ATTACKS[attack](model, x, "untargeted", y)
    assert torch.equal(x, images() - 0.5)


@pytest.mark.parametrize("surroundings", ["no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_works_the_same_in_any_surroundings(attack, surroundings):
    def results() -> list[Tensor]:
        y = clean.clone()  # made in the surroundings, as the images are
        return [ATTACKS[attack](model, images(), target, y) for target in ("untargeted", "least_likely", (y + 1) % 10)]

    model = make_model()
    clean = predicted(model, images())
    expected = results()
    with torch.autocast("cpu", torch.bfloat16) if surroundings == "autocast" else getattr(torch, surroundings)():
        before = state(model)
        got = results()
        assert state(model) == before
    assert all(map(torch.equal, got, expected))


def test_an_attack_launches_no_weight_gradient(launches):
    model, x = models.build("simplenet", "triton", 10, 8), images(1)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    asking = []  # our operators know by themselves what is asked of them; others, and what is kept for them, do not
    model.register_forward_pre_hook(lambda *_: asking.extend(w for w in model.parameters() if w.requires_grad))
    pgd(model, x, num_steps=2)
    assert not asking
    assert launches == 2 * (["forward"] * convolutions + ["input_grad"] * convolutions)
    launches.clear()
    attack_report(model, x, num_steps=1)
    assert (launches.count("forward"), launches.count("input_grad")) == (3 * convolutions, convolutions)
    assert "weight_grad" not in launches


# The fused step


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor.contiguous(memory_format=getattr(torch, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        pytest.param((4, 1, 16, 16), ["contiguous_format"] * 3, id="one-block-one-channel"),
        pytest.param((3, 3, 17, 19), ["contiguous_format"] * 3, id="does-not-divide"),
        pytest.param((3, 3, 17, 19), ["channels_last"] * 3, id="channels-last"),
        pytest.param((2, 3, 16, 24), ["channels_last", "contiguous_format", "channels_last"], id="adv-differs"),
        pytest.param((2, 3, 16, 24), ["contiguous_format", "channels_last", "transposed"], id="all-differ"),
        pytest.param((2, 3, 5, 7), ["transposed"] * 3, id="not-dense"),
        pytest.param((5, 3, 1, 1), ["contiguous_format", "channels_last", "contiguous_format"], id="one-pixel"),
        pytest.param((0, 3, 4, 4), ["contiguous_format"] * 3, id="no-image"),
    ],
)
@pytest.mark.parametrize(
    ("step_size", "epsilon", "bounds"),
    [
        pytest.param(0.3, 0.4, None, id="numbers"),
        pytest.param(0.3, inf, (-1, 1.0), id="no-ball"),
        pytest.param(0.2, 0.0, (-inf, 0.5), id="no-room"),
        pytest.param(PER_CHANNEL, 0.6 * PER_CHANNEL[None], (-PER_CHANNEL, 2 * PER_CHANNEL), id="per-channel"),
        pytest.param(torch.tensor(0.3), torch.tensor([[0.4]]), (torch.tensor([-1.0]), 0.7), id="tensors-of-one"),
    ],
)
def test_fused_step_is_the_operators(shape, layouts, step_size, epsilon, bounds, dtype):
    generator = torch.Generator().manual_seed(2)
    x, noise, gradient = torch.randn(3, *shape, dtype=dtype, generator=generator)
    adv = x + 0.3 * noise
    gradient[torch.rand(shape, generator=generator) < 0.2] = 0
    gradient[torch.rand(shape, generator=generator) < 0.1] = nan  # torch.sign has 0 for it
    gradient *= torch.tensor([1e-40, 1.0, inf], dtype=dtype)[torch.randint(3, shape, generator=generator)]
    adv, x, gradient = map(laid_out, (adv, x, gradient), layouts)
    sizes = [size[..., :1, :1, :1] if shape[1] == 1 and isinstance(size, Tensor) and size.dim() > 2 else size
             for size in (step_size, epsilon, *(bounds or (-inf, inf)))]  # fmt: skip
    step_size, epsilon, low, high = (torch.as_tensor(size, dtype=dtype) for size in sizes)
    moved = adv + step_size * gradient.sign()
    expected = torch.minimum(torch.maximum(x + (moved - x).clamp(-epsilon, epsilon), low), high)
    kept = [tensor.clone() for tensor in (adv, x, gradient)]
    got = fused_linf_step(adv, x, gradient, linf_table(x, *sizes))
    assert torch.equal(got, expected)
    assert got.stride() == x.stride() or not got.numel() or "transposed" in layouts
    ball = make_ball("linf", sizes[1], None if bounds is None else tuple(sizes[2:]), x)
    assert torch.equal(ball.stepper(x, step_size)(adv, gradient), expected)
    for tensor, copied in zip((adv, x, gradient), kept, strict=True):
        torch.testing.assert_close(tensor, copied, rtol=0, atol=0, equal_nan=True)


def test_table_holds_numbers_of_channels_and_nothing_else():
    x = images(4, torch.float64)
    per_channel = torch.tensor([1.0, 2, 3])
    sizes = [5, torch.tensor(6.0), per_channel.view(3, 1, 1), per_channel.view(1, 3, 1, 1), inf]
    expected = [[5, 5, 5], [6, 6, 6], [1, 2, 3], [1, 2, 3], [inf] * 3]
    assert torch.equal(linf_table(x, *sizes), torch.tensor(expected, dtype=torch.float64))
    for shape in [(4, 1, 1, 1), (4, 3, 1, 1), (1, 1, 8, 1), (8,), (8, 8), (8, 1), (3, 1, 8), (4, 3, 8, 8)]:
        assert linf_table(x, 0.1, torch.ones(shape)) is None, shape


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_step_compiles_without_spills(layout, dtype, arch):
    x = torch.empty(32, 3, 64, 64, dtype=dtype, device="meta").to(memory_format=layout)
    table = torch.empty(4, 3, dtype=dtype, device="meta")
    with runtime.compiling_ahead(arch) as launches:
        out = fused_linf_step(x, x, x, table)
    assert (out.shape, out.stride()) == (x.shape, x.stride())
    kernel = launches[0].kernel
    assert len(launches) == 1
    assert kernel.metadata.name == "linf_step_kernel"
    code = sass.read(kernel.asm["cubin"])
    assert code.registers > 0
    assert code.spills == code.stack_bytes == 0
    assert f"st.global.v{16 // x.itemsize}.b{8 * x.itemsize}" in kernel.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("epsilon", [0.035, PER_CHANNEL / 10, torch.full((6, 1, 1, 1), 0.035)])
def test_cuda_takes_the_same_steps(epsilon):
    x, adv, gradient = torch.randn(3, 6, 3, 17, 19, device="cuda")
    ball = make_ball("linf", epsilon, BOUNDS, x)
    assert torch.equal(ball.stepper(x, 0.03)(adv, gradient), ball.project(adv + 0.03 * gradient.sign(), x))
    report = attack_report(make_model().cuda(), images().cuda(), epsilon=epsilon, restarts=2, drop_fooled=True)
    assert not torch.equal(report.adversarial.cpu(), images())


# Random starts and restarts


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("epsilon", [0.3, torch.linspace(0, 1, 6).view(6, 1, 1, 1)], ids=["number", "per-image"])
def test_random_start_lies_in_ball_and_bounds(norm, bounds, epsilon):
    x = images(dtype=torch.float64).clamp(*(bounds or (0, 1)))
    ball = make_ball(norm, epsilon, bounds, x)
    start = ball.random(x, torch.Generator().manual_seed(0))
    limit = torch.as_tensor(epsilon, dtype=x.dtype).expand(6, 1, 1, 1)
    size = lengths(start - x) if norm == "l2" else (start - x).abs().flatten(1).amax(dim=1)
    assert (size <= limit.flatten() * (1 + 1e-12)).all()
    assert (size[1:] > 0.2 * limit.flatten()[1:]).all()
    assert bounds is None or (start.min() >= bounds[0] and start.max() <= bounds[1])
    last = pgd(make_model(x.dtype), x, norm=norm, bounds=bounds, epsilon=epsilon, random_start=True, step_size=0.2)
    size = lengths(last - x) if norm == "l2" else (last - x).abs().flatten(1).amax(dim=1)
    assert (size <= limit.flatten() * (1 + 1e-12)).all()


def test_random_starts_are_uniform():
    x = torch.zeros(20_000, 1, 2, 2, dtype=torch.float64)
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=x.dtype)
    flat = Linf(0.5).random(x, torch.Generator().manual_seed(0)).flatten()
    torch.testing.assert_close(flat.quantile(quantiles), quantiles - 0.5, rtol=0, atol=0.01)
    start = L2(0.5).random(x, torch.Generator().manual_seed(0))
    volume = (lengths(start) / 0.5) ** 4  # of the ball of that radius, as a share
    torch.testing.assert_close(volume.quantile(quantiles), quantiles, rtol=0, atol=0.015)
    torch.testing.assert_close(start.mean(dim=0), torch.zeros(1, 2, 2, dtype=x.dtype), rtol=0, atol=0.01)


def test_random_starts_follow_their_generator():
    model, x = make_model(), images()
    attack = dict(random_start=True, num_steps=2, epsilon=0.3)
    before = torch.get_rng_state()
    first = pgd(model, x, **attack)
    assert torch.equal(first, pgd(model, x, **attack))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(first, pgd(model, x, **attack, generator=generator))
    assert not torch.equal(first, pgd(model, x, **attack, generator=generator))  # of its next numbers
    assert not torch.equal(first, pgd(model, x, num_steps=2, epsilon=0.3))
    assert torch.equal(torch.get_rng_state(), before)


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = evaluated(model)(x)
    others = logits.masked_fill(F.one_hot(y, 10).bool(), -inf).amax(dim=1)
    return logits.gather(1, y[:, None])[:, 0] - others


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_keep_the_worst_case_of_each_image(norm):
    model, x = make_model(), images(24)
    y = predicted(model, x)
    attack = dict(norm=norm) | (
        dict(epsilon=0.1, step_size=0.03, num_steps=3) if norm == "linf" else
        dict(epsilon=0.5, step_size=0.4, num_steps=6)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)  # the first run starts at x and takes nothing from it
    runs = [pgd(model, x, "untargeted", y, **attack)]
    runs += [pgd(model, x, "untargeted", y, **attack, random_start=True, generator=generator) for _ in range(2)]
    reached = torch.stack([margins(model, run, y) for run in runs])
    report = attack_report(model, x, "untargeted", y, **attack, restarts=3)
    assert len(reached.argmin(dim=0).unique()) > 1, "one run was the worst for all"
    assert 0 < report.success.sum() < len(x)
    torch.testing.assert_close(margins(model, report.adversarial, y), reached.amin(dim=0))
    assert torch.equal(report.success, (reached < 0).any(dim=0))
    best = torch.stack(runs)[reached.argmin(dim=0), torch.arange(len(x))]
    assert torch.equal(report.adversarial, best)
    assert torch.equal(pgd(model, x, "untargeted", y, **attack, restarts=3), best)


# The report


class Counted(nn.Module):
    """Counts the images that a model is asked for, by their first pixel, which no attack may change."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.forwards, self.backwards = model, [], []

    def forward(self, x: Tensor) -> Tensor:
        names = x[:, 0, 0, 0].tolist()
        self.forwards += names
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda gradient: self.backwards.extend(names))
        return self.model(x)


def fixed_first_pixel() -> Tensor:
    epsilon = torch.full((1, 3, 8, 8), 0.1)
    epsilon[0, 0, 0, 0] = 0
    return epsilon


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("drop_fooled", [False, True])
@pytest.mark.parametrize("target", ["untargeted", "least_likely", "given", "unlabelled"])
def test_report_tells_what_happened(target, drop_fooled, restarts):
    model, x = Counted(make_model()), images(24)
    clean = predicted(model, x)
    y = torch.where(torch.arange(24) % 4 == 0, (clean + 1) % 10, clean)  # every fourth image is taken for another
    asked = (clean + 3 * (torch.arange(24) % 5)) % 10  # some have the label that is asked for from the start
    aim = {"target": target, "y": y}
    if target == "given":
        aim = {"target": asked}
    elif target == "unlabelled":
        aim = {"target": "most_likely"}
    attack = dict(num_steps=4, step_size=0.02, epsilon=fixed_first_pixel(), restarts=restarts)
    model.forwards.clear()
    report = attack_report(model, x, **aim, **attack, drop_fooled=drop_fooled)

    names = x[:, 0, 0, 0].tolist()
    assert report.forwards.tolist() == [model.forwards.count(name) for name in names]
    assert report.backwards.tolist() == [model.backwards.count(name) for name in names]
    full = 1 + restarts * 5, restarts * 4
    if drop_fooled:
        assert report.forwards.unique().numel() > 2
        assert (report.forwards.max(), report.backwards.max()) == full
    else:
        assert set(report.forwards.tolist()) == {full[0]}
        assert set(report.backwards.tolist()) == {full[1]}
        assert report.loss.isfinite().all()

    with torch.no_grad():
        torch.testing.assert_close(report.clean_logits, evaluated(model)(x))
        torch.testing.assert_close(report.logits, evaluated(model)(report.adversarial))
    taken = report.logits.argmax(dim=1)
    judges = {"given": asked, "unlabelled": clean}.get(target, y)
    done = taken == asked if target == "given" else taken != judges
    assert torch.equal(report.success, done)
    assert 0 < done.sum() < len(x) or target in ("untargeted", "unlabelled")
    if drop_fooled:
        already = clean == asked if target == "given" else clean != judges
        assert torch.equal(report.adversarial[already], x[already])
        assert set(report.forwards[already].tolist()) <= {1}
        attacked = ~already
        assert report.loss[0, attacked].isfinite().all()
        assert report.zero_gradient[0, attacked].isfinite().all()
        without = attack_report(model, x, **aim, **attack)
        assert report.success.sum() >= without.success.sum()


@pytest.mark.parametrize("target", ["untargeted", "most_likely", "least_likely", "given"])
def test_loss_starts_at_the_clean_one_and_moves_the_right_way(target):
    model, x = make_model(), images(24)
    y = predicted(model, x)
    with torch.no_grad():
        logits = evaluated(model)(x)
    aimed = {"least_likely": logits.argmin(dim=1), "given": (y + 1) % 10}.get(target, y)
    report = attack_report(model, x, aimed if target == "given" else target, y if target == "untargeted" else None,
                           num_steps=4, step_size=0.005)  # fmt: skip
    assert report.loss.shape == (5, 24)
    torch.testing.assert_close(report.loss[0], F.cross_entropy(logits, aimed, reduction="none"))
    risen = (report.loss[1:] - report.loss[:-1]).mean(dim=1)
    assert (risen > 0).all() if target in ("untargeted", "most_likely") else (risen < 0).all()
    assert report.zero_gradient.shape == (4, 24)
    assert (report.zero_gradient < 0.5).all()


@pytest.mark.parametrize("drop_fooled", [False, True])
def test_a_masked_gradient_shows_in_the_report(drop_fooled):
    class Masked(nn.Module):
        def forward(self, x):
            return 1e5 * x.flatten(1)[:, :10]

    x = images()
    report = attack_report(Masked(), x, "untargeted", Masked()(x).argmax(dim=1), drop_fooled=drop_fooled)
    assert (report.zero_gradient == 1).all()
    assert not report.success.any()
    assert (report.loss == 0).all()
    assert torch.equal(report.adversarial, x)


# Sizes as tensors


class OnPixels(nn.Module):
    """A model of normalised images, for images of grey levels."""

    mean = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64).view(3, 1, 1)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(self.normalise(pixels))


def test_grey_levels_per_channel_are_those_of_the_pixels():
    model = OnPixels(make_model(torch.float64))
    pixels, y = 255 * images(dtype=torch.float64), torch.arange(6)
    levels = dict(num_steps=1, step_size=12, epsilon=8)
    on_pixels = pgd(model, pixels, "untargeted", y, **levels, bounds=(0, 255))
    unit = 1 / (255 * model.std)
    got = pgd(
        model.model, model.normalise(pixels), "untargeted", y, num_steps=1, step_size=12 * unit, epsilon=8 * unit,
        bounds=(model.normalise(torch.zeros(1)), model.normalise(torch.full((1,), 255))),
    )  # fmt: skip
    torch.testing.assert_close(got, model.normalise(on_pixels), rtol=0, atol=1e-12)
    assert (on_pixels == 255).any()
    assert ((on_pixels - pixels).abs().amax((0, 2, 3)) > 7.9).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("drop_fooled", [False, True])
def test_each_image_stays_in_its_own_ball(norm, drop_fooled):
    model, x = make_model(torch.float64), images(16, torch.float64)
    epsilon = torch.linspace(0, 0.3 if norm == "linf" else 3, 16).view(16, 1, 1, 1)
    attack = dict(norm=norm, epsilon=epsilon, step_size=epsilon / 2, num_steps=5, restarts=2)
    y = predicted(model, x)
    report = attack_report(model, x, "untargeted", y, **attack, drop_fooled=drop_fooled)
    delta = report.adversarial - x
    size = lengths(delta) if norm == "l2" else delta.abs().flatten(1).amax(dim=1)
    limit = epsilon.flatten().double()
    assert (size <= limit * (1 + 1e-12)).all()
    assert 0 < report.success.sum() < 16
    if drop_fooled:
        assert report.forwards.unique().numel() > 2
    else:
        torch.testing.assert_close(size[1:], limit[1:], rtol=0.02, atol=0)
