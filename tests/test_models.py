"""Models: the write-up's sizes and layers, the choice of convolution, and what it must not change."""

import pickle

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import ResNet18_Weights

import models
from train.optim import initialise

CONVS = [name for name, conv in models.CONVOLUTIONS.items() if not getattr(conv, "refusal", None)]
MODELS = list(models.MODELS)
SMALLEST = {"simplenet": 8, "customnet": 8, "simplevit": 8, "resnet18": 32}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Last hidden features: of 100 classes' weights and biases, 90 go where there are ten.
@pytest.mark.parametrize(
    ("name", "at_100", "features"),
    [("simplenet", 365_028, 512), ("customnet", 577_636, 256), ("simplevit", 1_959_076, 192)],
)
@pytest.mark.parametrize("conv", CONVS)
def test_parameters_are_those_of_the_writeup(name, conv, at_100, features):
    assert parameters(models.build(name, conv)) == at_100
    assert parameters(models.build(name, conv, num_classes=10)) == at_100 - 90 * (features + 1)


def test_resnet18_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7)
    torch.manual_seed(0)
    ours = models.build("resnet18", "torch", 7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def layers(model: nn.Module) -> list:
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            kernel, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
            found.append((kernel, stride, padding, module.in_channels, module.out_channels))
        elif isinstance(module, nn.MaxPool2d):
            found.append(("maxpool", module.kernel_size, module.stride, module.padding))
        elif isinstance(module, nn.Linear):
            found.append((module.in_features, module.out_features))
        elif isinstance(module, nn.ReLU | nn.BatchNorm2d | nn.BatchNorm1d):
            found.append(type(module).__name__)
    return found


POOL = ("maxpool", 3, 2, 1)


def bottleneck(channels: int, width: int, out: int) -> list:
    return [(1, 1, 0, channels, width), "ReLU", (3, 1, 1, width, width), "ReLU", (1, 1, 0, width, out), "ReLU"]


def test_simplenet_is_made_of_the_layers_of_the_writeup():
    assert layers(models.build("simplenet", "torch")) == [
        (7, 2, 3, 3, 64), "ReLU", POOL, *bottleneck(64, 64, 256), POOL, *bottleneck(256, 128, 512), (512, 100),
    ]  # fmt: skip


def test_customnet_is_made_of_the_layers_of_the_writeup():
    assert layers(models.build("customnet", "torch")) == [
        (7, 2, 3, 3, 64), "ReLU", "BatchNorm2d",
        POOL, *bottleneck(64, 64, 256), "BatchNorm2d",
        *([*bottleneck(256, 32, 256), "BatchNorm2d"] * 4),
        POOL, *bottleneck(256, 128, 512),
        (512, 256), "ReLU", "BatchNorm1d", (256, 100),
    ]  # fmt: skip


def test_a_skip_block_adds_its_branch_to_an_input_that_it_leaves_alone():
    block = models.build("customnet", "torch").skips[0]
    x = torch.randn(2, 256, 4, 4)
    before = x.clone()
    y = block(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(y - x, block.branch(x))


def test_simplevit_is_made_of_the_layers_of_the_writeup():
    model = models.build("simplevit", "torch")
    assert (model.patch.kernel_size, model.patch.stride, model.patch.padding) == ((16, 16), (16, 16), (0, 0))
    assert model.position.shape == (1, 8, 8, 192)
    assert [block.attention.window for block in model.blocks] == [4, 8, 4, 8]
    assert [block.drop.p for block in model.blocks] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    assert all(block.drop.mode == "row" for block in model.blocks)
    assert all(block.attention.qkv.bias is not None for block in model.blocks)
    # The normal distribution cut off at 2 is 2 / 0.02 = 100 deviations away, so nothing is cut.
    assert model.position.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("block", "rows", "columns"), [(0, range(4, 8), range(4)), (1, range(8), range(8))])
def test_attention_sees_its_window_or_everything(block, rows, columns):
    x = torch.randn(1, 8, 8, 192, requires_grad=True)
    models.build("simplevit", "torch").blocks[block].eval()(x)[0, 5, 2].sum().backward()
    reached = {(row, column) for row in range(8) for column in range(8) if x.grad[0, row, column].any()}
    assert reached == {(row, column) for row in rows for column in columns}


def test_stochastic_depth_drops_whole_images_in_training_alone():
    block = models.build("simplevit", "torch").blocks[3]
    block.drop.p = 0.5
    x = torch.randn(64, 8, 8, 192)
    torch.manual_seed(0)
    unchanged = (block(x) == x).flatten(1).all(1).sum().item()
    assert 6 <= unchanged <= 26  # both branches dropped: a quarter of 64, give or take three deviations
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize(("name", "count"), [("simplenet", 7), ("customnet", 19), ("simplevit", 1), ("resnet18", 20)])
@pytest.mark.parametrize("conv", CONVS)
def test_every_convolution_is_of_the_class_asked_for(name, conv, count):
    convolutions = [module for module in models.build(name, conv).modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == count
    assert all(type(module) is models.CONVOLUTIONS[conv] for module in convolutions)


@pytest.mark.parametrize("init", ["pytorch", "kaiming"])
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("name", MODELS)
def test_the_seed_alone_decides_the_initial_parameters(name, conv, init):
    states = []
    for convolution in ("torch", conv):
        torch.manual_seed(3)
        model = models.build(name, convolution, num_classes=10)
        initialise(model, init)
        states.append(model.state_dict() | {"next random number": torch.rand(())})
    expected, actual = states
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_kaiming_is_not_the_default_and_zeroes_the_biases():
    torch.manual_seed(0)
    model = models.build("simplenet", "torch")
    first = model.block2[3].weight.detach().clone()  # the 3x3 convolution, fan-in 576
    initialise(model, "kaiming")
    assert not torch.equal(model.block2[3].weight, first)
    assert model.block2[3].weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_lie_in_the_layout_the_convolution_wants(name, conv):
    model = models.build(name, conv)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=models.memory_format(conv))
    others = set(model.parameters()) - {module.weight for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert all(parameter.is_contiguous() for parameter in others)  # SimpleViT's positions among them
    if conv in models.LABS:  # a variant says its own
        assert (models.memory_format(conv) == torch.channels_last) == (conv == "triton")


SIZES = [("simplenet", 8), ("simplenet", 33), ("customnet", 8), ("customnet", 33), ("simplevit", 8), ("simplevit", 96)]


@pytest.mark.parametrize(("name", "size"), [*SIZES, ("resnet18", 32), ("resnet18", 45), *((n, 128) for n in MODELS)])
def test_models_take_images_of_the_sizes_they_say(name, size):
    model = models.build(name, "torch", num_classes=7, image_size=size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_of_the_images_changes_nothing_but_rounding(name):
    model = models.build(name, "torch", 5, SMALLEST[name]).double().eval()
    x = torch.randn(3, 3, SMALLEST[name], SMALLEST[name], dtype=torch.float64)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tokens_lie_contiguous_through_simplevit(layout):
    model = models.build("simplevit", "torch", 5, 32).to(memory_format=layout)
    found = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, inputs, output: found.extend([*inputs, output]))
    model(torch.randn(2, 3, 32, 32).contiguous(memory_format=layout))
    assert len(found) == 8
    assert all(tokens.is_contiguous() for tokens in found)


@pytest.mark.parametrize("name", MODELS)
def test_models_train_under_autocast(name):
    model = models.build(name, "torch", 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(4, 3, 32, 32))
    assert y.dtype == torch.bfloat16
    y.float().logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("conv", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compile_into_one_graph(name, conv):
    torch._dynamo.reset()
    with torch.device("meta"):  # shapes alone: the kernels are not run
        model = models.build(name, conv, 5, 32)
        x = torch.empty(4, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(x.contiguous(memory_format=models.memory_format(conv))).shape == (4, 5)


@pytest.mark.parametrize("conv", ["unfold", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_gives_the_logits_and_gradients_of_torch(name, conv):
    size = SMALLEST[name]
    results = []
    for convolution in ("torch", conv):
        torch.manual_seed(0)
        model = models.build(name, convolution, 5, size).double().eval()
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        x = x.contiguous(memory_format=models.memory_format(convolution))
        y = model(x.requires_grad_())
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    expected, actual = results
    assert len(actual) > 10
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "alexnet"}, ["unknown model 'alexnet'", "simplenet, customnet, simplevit, resnet18"]),
        ({"name": "simplenet", "conv": "fft"}, ["unknown convolution 'fft'", "torch, unfold, triton"]),
        ({"name": "simplenet", "image_size": 7}, ["image size 7", "simplenet", "8 or more"]),
        ({"name": "customnet", "image_size": 7}, ["image size 7", "customnet", "8 or more"]),
        ({"name": "resnet18", "image_size": 31}, ["image size 31", "resnet18", "32 or more"]),
        ({"name": "simplevit", "image_size": 100}, ["image size 100", "simplevit", "multiple of 8"]),
        ({"name": "simplevit", "image_size": 0}, ["image size 0", "simplevit", "multiple of 8"]),
    ],
)
def test_what_cannot_be_built_is_named_in_one_line(arguments, words):
    with pytest.raises(ValueError) as error:
        models.build(**arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def theirs() -> dict[str, torch.Tensor]:
    """The state_dict of a torchvision resnet18 of 1,000 classes."""
    torch.manual_seed(11)
    return torchvision.models.resnet18().state_dict()


WRAPPED = {
    "plain": lambda state: state,
    "DistributedDataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled-and-parallel": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "under-state_dict": lambda state: {"epoch": 90, "state_dict": state},
    "under-model": lambda state: {"epoch": 90, "model": state},
    "before-pytorch-0.4.1": lambda state: {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")},
    "without-head": lambda state: {name: value for name, value in state.items() if not name.startswith("fc.")},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_pretrained_weights_are_loaded_under_a_fresh_head(theirs, wrapped, tmp_path):
    torch.save(WRAPPED[wrapped](theirs), tmp_path / "weights.pth")
    model = models.build("resnet18", "triton", 10)
    head = model.fc.weight.detach().clone()
    models.load_pretrained(model, "resnet18", tmp_path / "weights.pth")
    state = model.state_dict()
    for name, value in theirs.items():
        if not name.startswith("fc."):
            assert torch.equal(state[name], value), name
    assert torch.equal(model.fc.weight, head)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_head_of_as_many_classes_is_loaded_too(theirs, tmp_path):
    torch.save(theirs, tmp_path / "weights.pth")
    model = models.build("resnet18", "torch", 1000)
    models.load_pretrained(model, "resnet18", tmp_path / "weights.pth")
    assert torch.equal(model.fc.weight, theirs["fc.weight"])


def broken(path, theirs: dict, how: str) -> None:
    """Writes into `path` something that is no ResNet18."""
    if how == "folder":
        path.mkdir()
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "truncated":
        torch.save(theirs, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif how == "code":
        path.write_bytes(pickle.dumps(print, protocol=2))
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "numbers":
        torch.save({"conv1.weight": 3}, path)
    elif how == "empty":
        torch.save({}, path)
    elif how == "resnet34":
        torch.save(torchvision.models.resnet34().state_dict(), path)
    elif how == "resnet50":
        torch.save(torchvision.models.resnet50().state_dict(), path)
    elif how == "other-shape":
        torch.save(theirs | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["no file of weights"]),
        ("folder", ["no file of weights"]),
        ("text", ["damaged or holds no weights"]),
        ("truncated", ["damaged or holds no weights"]),
        ("code", ["damaged or holds no weights"]),
        ("list", ["a dictionary of tensors is expected"]),
        ("numbers", ["a dictionary of tensors is expected"]),
        ("empty", ["no ResNet18", "lacks bn1.bias and"]),
        ("resnet34", ["no ResNet18", "has, beyond it, layer1.2.bn1.bias and"]),
        ("resnet50", ["no ResNet18", "layer1"]),
        ("other-shape", ["no ResNet18", "conv1.weight is (64, 1, 7, 7) and should be (64, 3, 7, 7)"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(theirs, how, words, tmp_path):
    path = tmp_path / "weights.pth"
    broken(path, theirs, how)
    model = models.build("resnet18", "torch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        models.load_pretrained(model, "resnet18", path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_imagenet_weights_are_torchvisions(theirs, monkeypatch):
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda weights, **_: theirs)
    model = models.build("resnet18", "torch")
    models.load_pretrained(model, "resnet18", "imagenet")
    assert torch.equal(model.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])


def test_without_a_network_the_message_says_what_to_fetch(monkeypatch):
    def offline(weights, **_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(ValueError) as error:
        models.load_pretrained(models.build("resnet18", "torch"), "resnet18", "imagenet")
    message = str(error.value)
    assert "\n" not in message
    for words in ("https://download.pytorch.org/models/resnet18", "no route to host", "--weights FILE"):
        assert words in message


@pytest.mark.parametrize("name", sorted(models.MODELS.keys() - {"resnet18"}))
def test_other_models_have_no_pretrained_weights(name):
    with pytest.raises(ValueError, match=f"resnet18 only, not for {name}"):
        models.load_pretrained(models.build(name, "torch"), name, "imagenet")
