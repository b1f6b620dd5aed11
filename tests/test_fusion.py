"""fuse(): a fused model computes what it did with fewer operators, and what else holds of a model still does."""

import copy
import gc
import io
import pickle
import random
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import models
from kernels import Conv2d, swap_conv2d
from kernels.fusion import Fusion, fuse, fusion
from kernels.max_pool2d import MaxPool2d


class Ran(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **kwargs or {})


def ran(model: nn.Module, *args: Tensor) -> Counter[str]:
    with Ran() as ran, torch.no_grad():
        copy.deepcopy(model)(*args)  # norms remember what they saw
    return ran.counts


def is_fused(model: nn.Module, *args: Tensor) -> bool:
    """Whether a call runs no ReLU and no max-pool of PyTorch's; not to be asked of a norm in training."""
    return not ran(model, *args).keys() & {"aten::relu", "aten::relu_", "aten::max_pool2d_with_indices"}


def step(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Outputs, then gradients of their squares' sum, those of inputs that ask for one included, then buffers."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    outputs = torch.utils._pytree.tree_leaves(model(*args))
    sources = [t for t in (*args, *model.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), sources, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None), *(b.clone() for b in model.buffers())]


def assert_alike(fused: nn.Module, model: nn.Module, *args: Tensor) -> None:
    """In float64, where only the order of adding tells the two apart."""
    for ours, expected in zip(step(fused, *args), step(model, *args), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10 * max(1, expected.abs().max().item()))


def images(side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """Layers, and a way to use them."""

    def __init__(self, way: Callable[["Block", Tensor], object] | None = None):
        torch.manual_seed(0)
        super().__init__()
        self.conv1, self.conv2 = Conv2d(3, 4, 3, padding=1), Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.way, self.scale, self.calls = way, 2.0, []
        self.double()

    def forward(self, x, mask=None):
        if self.way is not None:
            return self.way(self, x)
        y = self.relu(self.norm(self.conv1(x))) * self.scale * (1 + len(self.calls))
        return self.pool(self.relu(self.conv2(y if mask is None else y * mask)))

    def half(self, x):
        return self.relu(self.conv1(x))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A fused block and the same block unfused, in evaluation."""
    block = Block().eval()
    return fuse(copy.deepcopy(block)), block


# --- the lab's models and torchvision's -------------------------------------------------------------------------------


def test_simplenets_chains():
    assert fusion(models.build("simplenet", image_size=32)) == Fusion(chains=(
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
        ("resnet18", 20, (16, 8)),  # those after the eight sums, and in training after norms
    ],
)
def test_the_labs_models_compute_the_same(name, chains, relus, train):
    torch.manual_seed(0)
    model = models.build(name, num_classes=5, image_size=32).double().train(train)
    fused = fuse(copy.deepcopy(model))
    assert len(fusion(fused).chains) == chains
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
        pytest.param("vgg11_bn", 8, 0, id="containers"),
        pytest.param("densenet121", 59, 61, id="norm-first"),
        pytest.param("mobilenet_v3_small", 43, 9, id="other-activations"),
        pytest.param("googlenet", 70, 0, id="asks-for-the-mode"),
        pytest.param("shufflenet_v2_x0_5", 56, 0, id="shape-logic"),
        pytest.param("vit_b_16", 0, 1, id="transformer"),
        pytest.param("maxvit_t", 23, 38, id="untraceable"),
    ],
)
def test_torchvisions_models_compute_the_same(name, chains, left):
    options = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 32}}.get(name, {})
    side = {"maxvit_t": 224, "vit_b_16": 32}.get(name, 64)
    torch.manual_seed(0)
    model = swap_conv2d(torchvision.models.get_model(name, weights=None, **options))
    report = fusion(model)
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


# --- which calls are a chain ------------------------------------------------------------------------------------------

F = functional
OTHERS, BY_RELU = "an in-place ReLU of a value that others may see", ("relu() + pool", "ReLU + max-pool")
CONV1, POOL = ("conv1 + relu", "convolution + ReLU"), ("pool", "max-pool")


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
    ],
)  # fmt: skip
def test_chains_are_found_where_nobody_else_sees_their_values(way, chains, left):
    model = Block(way)
    report = fusion(model)
    assert list(report.chains) == chains
    assert dict(report.left) == left
    fused = fuse(copy.deepcopy(model))
    assert fusion(fused) == report
    for train in (True, False):
        assert_alike(fused.train(train), model.train(train), images().requires_grad_())
    assert type(fused(images())) is type(model(images()))


def test_what_becomes_of_the_callers_tensor_is_part_of_what_a_model_does():
    model = Block(lambda m, x: m.conv1(m.pool(m.relu(x))))
    fused, x = fuse(copy.deepcopy(model)), [images(), images()]
    assert dict(fusion(model).left)["relu"] == OTHERS
    assert torch.equal(fused(x[0]), model(x[1]))
    assert torch.equal(*x)
    assert x[0].min() == 0


def test_only_our_convolutions_are_fused():
    report = fusion(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)))
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


# --- what a trace would lose ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda m, x: m.half(x) if x.sum() > 0 else m.half(-x), "inputs to control flow"),
        (lambda m, x: m.half(x) * (m.calls.append(0) or len(m.calls)), "sets calls while it runs"),
        (under(torch.no_grad), "switches gradients or autocast"),
        (under(torch.autocast, "cpu", enabled=False), "switches gradients or autocast"),
        (lambda m, x: checkpoint(m.half, x, use_reentrant=False), "switches gradients or autocast"),
        (lambda m, x: Reversed.apply(m.half(x)), "asks for the type of a value"),
        (lambda m, x: m.half(x) if isinstance(x, Tensor) else m.half(x[0]), "asks for the type of a value"),
        (lambda m, x: m.half(x) * (1 + torch.is_grad_enabled()), "asks whether gradients or autocast are on"),
        (lambda m, x: m.half(x) * random.random(), "draws random numbers"),
        (lambda m, x: m.half(x) * np.random.rand(), "draws random numbers"),  # noqa: NPY002
        (lambda m, x: m.half(x) * torch.rand(()).item(), "computes aten.rand.default of no input"),
    ],
)
def test_what_a_trace_would_lose_stays_and_is_reported(way, reason):
    model = Block(way)
    before = [vars(module).copy() for module in model.modules()], random.getstate(), torch.get_rng_state()
    assert reason in dict(fusion(model).left)["the model"]
    assert [vars(module) for module in model.modules()] == before[0]
    assert not model.calls
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert_alike(fuse(copy.deepcopy(model)), model, images())


def test_around_a_module_that_cannot_be_traced_the_rest_is_fused():
    inner = Block(lambda m, x: y if (y := m.seq(x)).sum() > 0 else x)
    inner.seq = nn.Sequential(Conv2d(3, 3, 1), nn.ReLU())
    model = nn.Sequential(Conv2d(3, 3, 1), nn.ReLU(), inner, nn.MaxPool2d(2)).double()
    report = fusion(model)
    assert [names for names, _ in report.chains] == ["0 + 1", "3", "2.seq.0 + 2.seq.1", "2.pool"]
    assert "inputs to control flow" in dict(report.left)["2"]
    assert_alike(fuse(copy.deepcopy(model)), model, images())
    assert is_fused(fuse(model), images())


def test_a_frozen_decision_that_changes_is_noticed(pair):
    fused, model = pair
    x, mask = images(), images()[:, :1]
    assert is_fused(fused, x)
    assert torch.equal(fused(x, mask), model(x, mask))
    assert torch.equal(fused(x=x, mask=mask), model(x, mask))
    for name, other in (("scale", 3.0), ("calls", [1])):
        before = getattr(fused, name)
        for each in pair:
            setattr(each, name, other)
        assert_alike(fused, model, x)
        for each in pair:
            setattr(each, name, before)
        assert is_fused(fused, x)
    model.calls = []
    fused.calls.append(1)
    assert not is_fused(fused, x)
    assert not torch.equal(fused(x), model(x))


class AsksForTheMode(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y * 3 if self[0].training else y


def test_each_mode_has_its_program_and_modes_may_be_mixed():
    torch.manual_seed(0)
    body = nn.Sequential(Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(AsksForTheMode(body, nn.Dropout(0.5)), AsksForTheMode(Conv2d(4, 4, 1), nn.ReLU())).double()
    fused, x = fuse(copy.deepcopy(model)), images()
    for train in (True, False):
        assert_alike(fused.train(train), model.train(train), x)
        assert is_fused(fused, x)
    for each in (model, fused):
        each.train()[0].eval()
    assert_alike(fused, model, x)
    fuse(body)[0].eval()  # nothing here asks, and one program serves all modes
    assert is_fused(body, x)


# --- hooks, replaced modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["conv1"], ["norm"], ["relu"], ["conv2", "pool"]])
def test_hooks_see_what_they_would_see_unfused(names, pair):
    seen = [], []
    for model, values in zip(pair, seen, strict=True):
        handles = [
            model.get_submodule(name).register_forward_hook(lambda m, a, y, v=values: v.append(y.clone()))
            for name in names
        ]
        model(images())
        for handle in handles:
            handle.remove()
    assert len(seen[0]) >= len(names)
    torch.testing.assert_close(*seen)
    assert is_fused(pair[0], images())
    handle = pair[0].relu.register_full_backward_hook(lambda *_: None)
    assert not is_fused(pair[0], images())
    handle.remove()
    pair[0].conv1.forward = pair[0].conv1.forward  # how some libraries wrap a module
    assert not is_fused(pair[0], images())


def test_a_hook_on_a_container_and_hooks_there_before():
    model, x = fuse(nn.Sequential(nn.Sequential(Conv2d(3, 4, 3), nn.ReLU()), nn.MaxPool2d(2)).double()), images()
    seen = []
    handle = model[0].register_forward_hook(lambda m, a, y: seen.append(y))
    model(x)
    assert seen[0].min() == 0
    handle.remove()
    assert is_fused(model, x)
    for module in (model[0], model[0][0]):
        module.register_forward_hook(lambda m, a, y: None)
    report = fusion(fuse(model))
    assert report == Fusion(chains=(("1", "max-pool"),), left=(("0", "has hooks"), ("0.0", "has hooks")))


def test_replaced_modules_are_called(pair):
    x = images()
    model = fuse(nn.Sequential(pair[0], nn.Flatten(), nn.Linear(64, 3)).double().eval())
    model[2] = nn.Linear(64, 7).double()
    assert model(x).shape == (2, 7)
    assert is_fused(model, x)
    for each in pair:
        each.conv2 = Conv2d(4, 4, 3, padding=1, bias=False).double().requires_grad_(False)
        nn.init.ones_(each.conv2.weight)
    torch.testing.assert_close(model(x), model[2](pair[1](x).flatten(1)))
    assert not is_fused(model, x)
    assert is_fused(fuse(model), x)
    model.append(nn.Softmax(1))
    torch.testing.assert_close(model(x).sum(1), torch.ones(2, dtype=torch.float64))


# --- copies and other ways to run -------------------------------------------------------------------------------------


def doubled(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_equal_and_independent(copied, pair):
    fused, x = pair[0], images()
    other = copied(fused)
    assert isinstance(other, Block)
    assert is_fused(other, x)
    assert torch.equal(other(x), fused(x))
    other.conv1.register_forward_hook(lambda m, a, y: y * 0)
    assert not is_fused(other, x)
    assert is_fused(fused, x)


def test_a_replica_uses_its_own_children(pair):
    """As nn.DataParallel makes them."""
    replica = pair[0]._replicate_for_data_parallel()
    for name, child in pair[0].named_children():
        setattr(replica, name, child._replicate_for_data_parallel())
        for key, parameter in child.named_parameters():
            setattr(getattr(replica, name), key, parameter * 2)
    assert torch.equal(replica(images()), torch.func.functional_call(pair[1], doubled(pair[1]), images()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_compiled_model_is_fused(backend, train):
    torch.compiler.reset()
    model = Block().train(train)
    graphs = []

    def compile_it(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    assert_alike(torch.compile(fuse(copy.deepcopy(model)), fullgraph=True, backend=compile_it), model, images())
    names = {getattr(node.target, "__name__", node.target) for node in graphs[0].graph.nodes}
    assert names & {"relu", "relu_", "max_pool2d", "pooling"} == ({"pooling", "relu_"} if train else {"pooling"})


def test_other_ways_to_run_a_model(pair, tmp_path):
    fused, model = pair
    x = images()
    torch.testing.assert_close(fx.symbolic_trace(fused, concrete_args={"mask": None})(x), model(x))
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), model(x))
    ours, theirs = (torch.func.functional_call(each, doubled(each), x) for each in pair)
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [copy.deepcopy(each).float()(x.float()) for each in pair]
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=0.1, atol=0.1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert_alike(DistributedDataParallel(fused), model, x)
    finally:
        dist.destroy_process_group()


def test_a_fused_model_is_freed_when_it_is_dropped():
    model = fuse(Block())
    there = weakref.ref(model)
    gc.disable()  # what is part of a cycle would stay until it collects
    try:
        del model
        assert there() is None
    finally:
        gc.enable()


def test_the_report_is_readable():
    text = str(fusion(models.build("customnet", image_size=32)))
    assert "\n  block2: 1 + 2 " in text
    assert "left as they were, 6:\n  block1.2, block2.7, " in text
