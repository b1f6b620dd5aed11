"""What holds of a fused model: changes in it are noticed; hooks, copies, compilers and wrappers work as before."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from fusible import Block, assert_alike, images, is_fused
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from kernels import Conv2d, fuse, fusion_report
from kernels.fusion import Fusion


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A fused block and the same block unfused, in evaluation."""
    block = Block().eval()
    return fuse(copy.deepcopy(block)), block


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


class TakesAMask(Block):
    def forward(self, x, mask):
        y = self.half(x)
        return y if mask is None else y * mask


def test_a_program_of_tensors_runs_on_tensors():
    model = TakesAMask().eval()
    fused, x = fuse(copy.deepcopy(model)), images()
    assert is_fused(fused, x, x[:, :1])
    assert torch.equal(fused(x, None), model(x, None))


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


class DecidesInEvaluation(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training or y.sum() > 0 else -y


def test_what_one_mode_cannot_look_into_is_called_in_all():
    model = fuse(nn.Sequential(DecidesInEvaluation(Conv2d(3, 3, 1), nn.ReLU()), Conv2d(3, 3, 1), nn.ReLU()))
    seen = []
    model[0].register_forward_hook(lambda m, a, y: seen.append(y))
    x = images().float()
    model(x)
    assert len(seen) == 1
    model[0] = nn.Identity()
    torch.testing.assert_close(model(x), model[2](model[1](x)))


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
    report = fusion_report(fuse(model))
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


def test_one_of_several_places_of_a_module_is_given_another():
    shared = nn.Hardtanh()
    model = fuse(nn.Sequential(Conv2d(3, 4, 3), nn.ReLU(), shared, shared))
    x = images().float()
    clipped = model(x)
    assert is_fused(model, x)
    model[3] = nn.Sigmoid()
    torch.testing.assert_close(model(x), clipped.sigmoid())


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


class _InPlace(nn.Module):
    """Forwards that change a value in place, or look whether it has something."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.mix = Conv2d(3, 3, 3, padding=1).double(), Conv2d(3, 3, 1).double()
        self.norm = nn.BatchNorm2d(3).double()
        self.way = way

    def forward(self, x):
        return getattr(self, self.way)(x)

    def skip_is_the_sum(self, x):
        out = functional.relu(self.conv(x))
        skip = out
        out += x
        return functional.relu(self.mix(out)) + skip

    def copy_is_changed(self, x):
        x = x.clone()
        same = x
        same *= 2
        return functional.relu(self.conv(x))

    def asks_for_an_attribute(self, x):
        return functional.relu(self.conv(x)) if hasattr(x, "no_tensor_has_it") else self.conv(x)

    def statistics_before_the_norm(self, x):
        y = self.conv(x)
        before = self.norm.running_mean * 1
        return functional.relu(self.norm(y)) + before[:, None, None]


@pytest.mark.parametrize(
    "way", ["skip_is_the_sum", "copy_is_changed", "asks_for_an_attribute", "statistics_before_the_norm"]
)
def test_what_a_value_is_called_does_not_decide_what_it_is(way):
    torch.manual_seed(0)
    model = _InPlace(way)
    with torch.no_grad():
        expected = copy.deepcopy(model)(images())
        torch.testing.assert_close(fuse(copy.deepcopy(model))(images()), expected)


def test_an_argument_that_is_added_to_is_the_callers():
    class Adds(_InPlace):
        def forward(self, x, total):
            total += functional.relu(self.conv(x))
            return total.sum()

    model, total = fuse(Adds("")), torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert is_fused(model, images(), total)
        assert model(images(), total) == total.sum() > 0


@pytest.mark.parametrize(
    ("model", "shape", "error"),
    [
        (lambda: nn.Sequential(Conv2d(3, 1, 3), nn.BatchNorm2d(4)), (2, 3, 8, 8), "running_mean should contain 1"),
        (lambda: nn.Sequential(Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 8, 8), "expected 4D input"),
    ],
    ids=["other-channels", "unbatched"],
)
def test_a_norm_that_does_not_fit_says_so_in_evaluation_too(model, shape, error):
    with pytest.raises((RuntimeError, ValueError), match=error):
        fuse(model().eval())(torch.zeros(shape))
