"""Conv2d, LazyConv2d and swap_conv2d as modules: everything that holds of nn.Conv2d holds of them."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kernels import Conv2d, LazyConv2d, conv2d, swap_conv2d

pytestmark = pytest.mark.on_device


def test_constructors_take_device_and_dtype():
    for cls in (Conv2d, LazyConv2d):
        arguments = (4, 8, 3) if cls is Conv2d else (8, 3)
        assert cls(*arguments, device="meta", dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    layer = Conv2d(4, 8, 3, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    assert layer(torch.empty(2, 4, 8, 8, device="meta", dtype=torch.float64)).shape == (2, 8, 6, 6)
    with pytest.raises(ValueError, match="groups must be a positive integer"):
        Conv2d(4, 8, 3, groups=0)
    with pytest.raises(ValueError, match="Invalid padding string"):
        Conv2d(4, 8, 3, padding="sane")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copied):
    layer = Conv2d(3, 4, 3, padding="same", padding_mode="circular", groups=1)
    other, x = copied(layer), torch.randn(2, 3, 6, 6)
    assert type(other) is Conv2d
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.any()


def test_saved_modules_and_states_load_in_both_directions():
    ours, native = Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 6, 6)
    for source, target in ((ours, native), (native, ours)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(target(x), source(x))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), ours(x))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_learns_its_channels_and_becomes_ours():
    lazy = LazyConv2d(4, 3, padding=1, groups=1, bias=False)
    assert repr(lazy) == repr(nn.LazyConv2d(4, 3, padding=1, groups=1, bias=False))
    assert lazy(torch.randn(2, 5, 6, 6)).shape == (2, 4, 6, 6)
    assert type(lazy) is Conv2d
    assert lazy.weight.shape == (4, 5, 3, 3)
    loaded = LazyConv2d(4, 3, padding=1, bias=False)
    loaded.load_state_dict(lazy.state_dict())
    x = torch.randn(2, 5, 6, 6)
    assert torch.equal(loaded(x), lazy(x))
    assert type(loaded) is Conv2d


def test_batch_norm_folds_into_ours():
    layer, norm = Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()
    norm.running_mean.uniform_()
    norm.running_var.uniform_(0.5, 2)
    fused, x = nn.utils.fuse_conv_bn_eval(layer, norm), torch.randn(2, 3, 6, 6)
    assert type(fused) is Conv2d
    torch.testing.assert_close(fused(x), norm(layer(x)))


def test_parametrizations_hooks_and_pruning_work():
    x = torch.randn(2, 3, 6, 6)
    for wrap in (parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm):
        torch.manual_seed(0)
        ours = wrap(Conv2d(3, 4, 3)).eval()
        torch.testing.assert_close(ours(x), conv2d(x, ours.weight, ours.bias))
        parametrize.remove_parametrizations(ours, "weight")
        assert type(ours) is Conv2d
    pruned = prune.l1_unstructured(Conv2d(3, 4, 3), "weight", 0.5)
    torch.testing.assert_close(pruned(x), conv2d(x, pruned.weight_orig * pruned.weight_mask, pruned.bias))
    layer, seen = Conv2d(3, 4, 3), []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(x.requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


class Standardised(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_every_plain_convolution_is_swapped_in_place():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1)), shared).eval()
    tied = nn.Conv2d(3, 3, 3, padding=1)
    tied.weight = shared.weight
    model.append(nn.Conv2d(4, 3, 1)).append(tied)
    modules, parameters, names = list(model.modules()), list(model.parameters()), list(model.state_dict())
    held = [model[0]]  # a reference that is in no module's children
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert swap_conv2d(model) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {Conv2d}
    assert model[0] is model[2] is held[0]
    assert model[4].weight is model[0].weight
    assert not model[0].training
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    swap_conv2d(model)  # a second time changes nothing
    assert type(model[0]) is Conv2d


def test_swapping_runs_nothing_and_needs_no_weight():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 1, bias=False)).train()
    del model[1].weight  # given at each call, by functional_call or a hypernetwork
    before = copy.deepcopy(model[0].state_dict())
    swap_conv2d(model)
    assert type(model[1]) is Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[0].state_dict().items())


def test_a_model_that_is_a_convolution_is_swapped_too():
    model = nn.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 5, 5)
    expected = model(x)
    assert type(swap_conv2d(model)) is Conv2d
    torch.testing.assert_close(model(x), expected)


def test_what_is_not_swapped_is_named_with_its_reason():
    model = nn.ModuleDict({"a": Standardised(3, 4, 3), "b": nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.cfloat)),
                           "c": nn.Conv2d(3, 4, 3), "d": nn.ConvTranspose2d(3, 4, 3)})  # fmt: skip
    with pytest.warns(UserWarning, match="swap_conv2d left") as caught:
        swap_conv2d(model)
    (message,) = [str(warning.message) for warning in caught]
    assert message == (
        "swap_conv2d left 2 modules as they were: "
        "a (Standardised, a subclass of nn.Conv2d), b.0 (torch.complex64 weights)"
    )
    assert caught[0].filename == __file__
    assert [type(m) for m in (model["a"], model["b"][0], model["c"])] == [Standardised, nn.Conv2d, Conv2d]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_and_parametrized_convolutions_are_swapped():
    lazy = swap_conv2d(nn.Sequential(nn.LazyConv2d(4, 3)))
    assert type(lazy[0]) is LazyConv2d
    lazy(torch.randn(1, 3, 5, 5))
    assert type(lazy[0]) is Conv2d
    normed = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    untouched, x = copy.deepcopy(normed), torch.randn(1, 3, 5, 5)
    expected = normed(x)
    swap_conv2d(normed)
    assert isinstance(normed[0], Conv2d)
    assert not isinstance(untouched[0], Conv2d)
    torch.testing.assert_close(normed(x), expected)
    normed(x).sum().backward()
    assert normed[0].parametrizations.weight.original0.grad.any()
    parametrize.remove_parametrizations(normed[0], "weight")
    assert type(normed[0]) is Conv2d


# --- torchvision's models -----------------------------------------------------------------------------------------

# One of each family with something of its own: plain, residual, groups, depthwise, concatenation, attention.
FEW = ["alexnet", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "vit_b_16"]
SIDES = {"inception_v3": 96, "vit_h_14": 28, "vit": 32, "maxvit_t": 224}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A torchvision model with random float64 weights in eval mode, and a batch of images as small as it takes."""
    torch.manual_seed(0)
    side = next((side for prefix, side in SIDES.items() if name.startswith(prefix)), 64)
    options = {"weights": None}
    if name.startswith("vit"):
        options["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "transform_input": True}
    model = torchvision.models.get_model(name, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)  # the head of a vision transformer begins with zeros
    # Running statistics of one batch, or deep random networks overflow or die out.
    model, x = model.double(), torch.randn(2, 3, side, side, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.train()
    with torch.no_grad():
        model(x)
    return model.eval(), x


def assert_swapped_alike(name: str, record_property) -> None:
    """In float64: in float32 the deepest of these networks, untrained, make 0.4% of a rounding error."""
    model, x = build(name)
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0, "a dead network agrees with anything"
        swap_conv2d(model)
        assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {Conv2d}
        difference = (model(x) - expected).abs().max() / expected.abs().max()
    record_property("largest output difference, of the largest output", f"{difference:.2e}")
    assert difference < 1e-8


@pytest.mark.parametrize("name", FEW)
def test_torchvision_models_swapped_give_the_same_outputs(name, record_property):
    assert_swapped_alike(name, record_property)


# Seven minutes of a core for the larger members of families, whose smaller ones are among the rest.
LARGE = (
    "convnext_base", "convnext_large", "convnext_small", "densenet161", "densenet201", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m", "regnet_x_16gf",
    "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf",
    "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_8gf", "resnext101_32x8d", "resnext101_64x4d",
    "vit_h_14", "vit_l_16", "wide_resnet101_2",
)  # fmt: skip
MORE = [name for name in torchvision.models.list_models(torchvision.models) if name not in FEW]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long][name in LARGE]) for name in MORE]
)
def test_every_torchvision_model_swapped_gives_the_same_outputs(name, record_property):
    assert_swapped_alike(name, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LARGE if not name.startswith("regnet")])
def test_the_large_ones_swapped_take_and_give_the_same_shapes(name):
    """At the size they are made for, without weights; RegNets work out their widths in tensors, which need values."""
    shapes = []
    with torch.device("meta"):
        model, x = torchvision.models.get_model(name, weights=None).eval(), torch.empty(2, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, y: shapes.append((inputs[0].shape, y.shape)))
    model(x)
    expected, shapes = shapes, []
    swap_conv2d(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {Conv2d}
    model(x)
    assert shapes == expected


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_models_swapped_give_the_same_gradients(name):
    model, x = build(name)

    def gradients():
        model.zero_grad()
        model(x).pow(2).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    swap_conv2d(model)
    for ours, native in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-8, atol=1e-8 * max(native.abs().max().item(), 1e-30))
