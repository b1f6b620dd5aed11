"""fuse(): which calls of a model are fused, that it computes what it did, and what is left alone and why."""

import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from fusible import Block, assert_alike, images, is_fused, ran
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import models
from kernels import Conv2d, MaxPool2d, fuse, fusion_report, swap_conv2d
from kernels.fusion import Fusion

OTHERS, BY_RELU = "an in-place ReLU of a value that others may see", ("relu() + pool", "ReLU + max-pool")
CONV1, POOL = ("conv1 + relu", "convolution + ReLU"), ("pool", "max-pool")


def test_simplenets_chains():
    assert fusion_report(models.build("simplenet", image_size=32)) == Fusion(chains=(
        ("block1.0 + block1.1 + block2.0", "convolution; ReLU + max-pool"),
        ("block2.1 + block2.2", "convolution + ReLU"),
        ("block2.3 + block2.4", "convolution + ReLU"),
        ("block2.5 + block2.6 + block3.0", "convolution; ReLU + max-pool"),
        ("block3.1 + block3.2", "convolution + ReLU"),
        ("block3.3 + block3.4", "convolution + ReLU"),
        ("block3.5 + block3.6", "convolution + ReLU"),
    ), left=())  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "chains", "relus"),
    [
        ("simplenet", 7, (0, 0)),
        ("customnet", 21, (1, 1)),  # the head's
        ("simplevit", 0, (0, 0)),
        # Those after the eight sums, and in training after norms.
        pytest.param("resnet18", 20, (16, 8), marks=pytest.mark.slow),
    ],
)
def test_the_labs_models_compute_the_same(name, chains, relus, train):
    torch.manual_seed(0)
    model = models.build(name, num_classes=5, image_size=32).double().train(train)
    fused = fuse(copy.deepcopy(model))
    assert len(fusion_report(fused).chains) == chains
    assert repr(fused) == repr(model)
    x = images(side=32).requires_grad_()
    assert_alike(fused, model, x)
    counts = ran(fused, x)
    assert counts["aten::relu_"] == relus[not train]
    assert counts["aten::relu"] == counts["aten::max_pool2d_with_indices"] == 0
    for source, target in ((fused, model), (model, fused)):
        target.load_state_dict(source.state_dict())


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are PyTorch's, without which torchvision's models would take minutes."""

    def forward(self, input: Tensor, *, norm: nn.Module | None = None, relu: bool = False) -> Tensor:
        y = nn.Conv2d._conv_forward(self, input, self.weight, self.bias)
        y = y if norm is None else norm(y)
        return y.clamp_min(0) if relu else y

    monkeypatch.setattr(Conv2d, "forward", forward)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("name", "chains", "left"),
    [
        pytest.param("squeezenet1_1", 28, 0, id="concatenation"),
        pytest.param("vgg11_bn", 8, 0, id="containers", marks=pytest.mark.slow),
        pytest.param("densenet121", 59, 61, id="norm-first"),
        pytest.param("mobilenet_v3_small", 43, 9, id="other-activations"),
        pytest.param("googlenet", 70, 0, id="asks-for-the-mode"),
        pytest.param("shufflenet_v2_x0_5", 56, 0, id="shape-logic"),
        pytest.param("vit_b_16", 0, 1, id="transformer"),
        pytest.param("maxvit_t", 23, 38, id="untraceable", marks=pytest.mark.slow),
    ],
)
def test_torchvisions_models_compute_the_same(name, chains, left):
    options = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 32}}.get(name, {})
    side = {"maxvit_t": 224, "vit_b_16": 32}.get(name, 64)
    torch.manual_seed(0)
    model = swap_conv2d(torchvision.models.get_model(name, weights=None, **options))
    report = fusion_report(model)
    assert (len(report.chains), len(report.left)) == (chains, left)
    assert max(map(len, str(report).splitlines())) <= 100
    fused, x = fuse(copy.deepcopy(model)), torch.randn(2, 3, side, side)
    for train in (True, False):
        outputs = []
        for each in (fused, model):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(each.train(train)(x))
        assert type(outputs[0]) is type(outputs[1])
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_the_report_is_readable():
    text = str(fusion_report(models.build("customnet", image_size=32)))
    assert "\n  block2: 1 + 2 " in text
    assert "left as they were, 6:\n  block1.2, block2.7, " in text


@pytest.mark.parametrize(
    ("way", "chains", "left"),
    [
        pytest.param(None, [
            ("conv1 + norm + relu", "convolution + batch norm + ReLU"),
            ("conv2 + relu + pool", "convolution; ReLU + max-pool"),
        ], {}, id="all"),
        pytest.param(
            lambda m, x: F.max_pool2d(F.relu(m.conv1(x)), 2, stride=1, ceil_mode=True),
            [("conv1 + relu() + max_pool2d()", "convolution; ReLU + max-pool"), POOL], {}, id="functions",
        ),
        pytest.param(
            lambda m, x: torch.max_pool2d(torch.relu_(m.conv1(x) + 1), kernel_size=(2, 1), stride=()),
            [("relu_() + max_pool2d()", "ReLU + max-pool"), POOL], {"conv1": "followed by add()"}, id="own-sum",
        ),
        pytest.param(
            lambda m, x: m.norm(m.conv1(x)), [("conv1 + norm", "convolution + batch norm"), POOL], {}, id="no-relu",
        ),
        pytest.param(
            lambda m, x: (y := m.conv1(x)) + m.pool(m.relu(y[:, :2])).sum(),
            [POOL], {"conv1": "its value is used 2 times", "relu": OTHERS}, id="in-place-on-a-view",
        ),
        pytest.param(
            lambda m, x: (F.relu(m.conv2(y := m.conv1(x))), m.pool(F.relu(y))),
            [("conv2 + relu()", "convolution + ReLU"), BY_RELU], {"conv1": "its value is used 2 times"}, id="twice",
        ),
        pytest.param(
            lambda m, x: m.pool(m.norm(m.half(x))).relu(),
            [CONV1, POOL], {"norm": "batch norm follows the ReLU"}, id="norm-last",
        ),
        pytest.param(
            lambda m, x: F.max_pool2d(m.half(x), 2, return_indices=True)[0], [CONV1, POOL], {}, id="indices",
        ),
        pytest.param(
            lambda m, x: OrderedDict(a=F.relu6(m.conv1(x)), b=[m.half(x), m.pool(x)]),
            [CONV1, POOL], {"conv1": "followed by relu6()"}, id="other-activation",
        ),
        pytest.param(
            lambda m, x: F.relu(y := m.conv1(x)) - y,
            [POOL], {"conv1": "its value is used 2 times"}, id="first-of-two-users",
        ),
        pytest.param(
            lambda m, x: (z := F.relu(y := x + 1), y.neg_(), m.pool(z))[2],
            [POOL], {"relu()": "something runs before its max-pool"}, id="overwritten-before-the-pool",
        ),
        pytest.param(
            lambda m, x: (y := m.conv1(x), z := m.conv1(-x), m.norm(z) - m.norm(y))[2],
            [("conv1 + norm", "convolution + batch norm"), POOL], {"conv1": "followed by BatchNorm2d"}, id="norm-order",
        ),
        pytest.param(
            lambda m, x: F.max_pool2d(m.half(x), x.size(0)), [CONV1, POOL], {}, id="window-of-a-traced-size",
        ),
    ],
)  # fmt: skip
def test_chains_are_found_where_nobody_else_sees_their_values(way, chains, left):
    model = Block(way)
    report = fusion_report(model)
    assert list(report.chains) == chains
    assert dict(report.left) == left
    fused = fuse(copy.deepcopy(model))
    assert fusion_report(fused) == report
    for train in (True, False):
        assert_alike(fused.train(train), model.train(train), images().requires_grad_())
    assert type(fused(images())) is type(model(images()))


def test_what_becomes_of_the_callers_tensor_is_part_of_what_a_model_does():
    model = Block(lambda m, x: m.conv1(m.pool(m.relu(x))))
    fused, x = fuse(copy.deepcopy(model)), [images(), images()]
    assert dict(fusion_report(model).left)["relu"] == OTHERS
    assert torch.equal(fused(x[0]), model(x[1]))
    assert torch.equal(*x)
    assert x[0].min() == 0


def test_only_our_convolutions_are_fused():
    report = fusion_report(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)))
    assert not report.chains
    assert dict(report.left) == {"0": "an nn.Conv2d: swap_conv2d first", "2": "returns indices"}


def test_a_model_that_is_one_layer_and_a_second_fuse():
    conv, pool = Conv2d(3, 4, 3), nn.MaxPool2d(2)
    assert type(fuse(conv)) is Conv2d
    assert type(fuse(pool)) is MaxPool2d
    chain = nn.Sequential(conv, nn.ReLU(), pool)
    cls = type(fuse(chain))
    assert type(fuse(chain)) is cls is not nn.Sequential
    assert isinstance(chain, nn.Sequential)
    assert is_fused(chain, images().float())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(_ctx, gradient):
        return -gradient


def under(context: Callable, *args: object, **options: object) -> Callable[[Block, Tensor], Tensor]:
    def way(block, x):
        with context(*args, **options):
            y = block.half(x)
        return block.conv2(y)

    return way


def other_dtype(block: Block, x: Tensor) -> Tensor:
    """Autocast stays on or off."""
    with torch.autocast("cpu", torch.float16, enabled=torch.is_autocast_enabled("cpu")):
        return block.half(x)


NOBODYS = torch.tensor([2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda m, x: m.half(x) if x.sum() > 0 else m.half(-x), "inputs to control flow"),
        (lambda m, x: m.half(x) * (m.calls.append(0) or len(m.calls)), "sets calls while it runs"),
        (under(torch.no_grad), "switches gradients or autocast"),
        (under(torch.autocast, "cpu", enabled=False), "switches gradients or autocast"),
        (other_dtype, "switches gradients or autocast"),
        (lambda m, x: checkpoint(m.half, x, use_reentrant=False), "switches gradients or autocast"),
        (lambda m, x: Reversed.apply(m.half(x)), "asks for the type of a value"),
        (lambda m, x: m.half(x) if isinstance(x, Tensor) else m.half(x[0]), "asks for the type of a value"),
        (lambda m, x: m.half(x) * (1 + torch.is_grad_enabled()), "asks whether gradients or autocast are on"),
        (lambda m, x: m.half(x) * random.random(), "draws random numbers"),
        (lambda m, x: m.half(x) * np.random.rand(), "draws random numbers"),  # noqa: NPY002
        (lambda m, x: m.half(x) * torch.rand(()).item(), "computes aten.rand.default of no input"),
        (lambda m, x: m.half(x) * NOBODYS, "uses a value that is none of its parameters or buffers"),
        (lambda m, x: defaultdict(int, y=m.half(x)), "makes a defaultdict"),
    ],
)
def test_what_a_trace_would_lose_stays_and_is_reported(way, reason):
    model = Block(way)
    before = [vars(module).copy() for module in model.modules()], random.getstate(), torch.get_rng_state()
    assert reason in dict(fusion_report(model).left)["the model"]
    assert [vars(module) for module in model.modules()] == before[0]
    assert not model.calls
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert_alike(fuse(copy.deepcopy(model)), model, images())


def test_around_a_module_that_cannot_be_traced_the_rest_is_fused():
    inner = Block(lambda m, x: y if (y := m.seq(x)).sum() > 0 else x)
    inner.seq = nn.Sequential(Conv2d(3, 3, 1), nn.ReLU())
    model = nn.Sequential(Conv2d(3, 3, 1), nn.ReLU(), inner, nn.MaxPool2d(2)).double()
    report = fusion_report(model)
    assert [names for names, _ in report.chains] == ["0 + 1", "3", "2.seq.0 + 2.seq.1", "2.pool"]
    assert "inputs to control flow" in dict(report.left)["2"]
    assert_alike(fuse(copy.deepcopy(model)), model, images())
    assert is_fused(fuse(model), images())


def test_what_an_untraceable_module_drew_is_taken_back():
    inner = Block(lambda m, x: y if random.random() < 2 and (y := m.half(x)).sum() > 0 else x)
    model, state = nn.Sequential(inner, Conv2d(4, 3, 1), nn.ReLU()), random.getstate()
    report = fusion_report(model)
    assert [names for names, _ in report.chains] == ["1 + 2", "0.pool"]
    assert random.getstate() == state
