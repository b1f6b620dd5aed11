"""Models: the write-up's sizes, the choice of convolution, and what it must not change."""

import pytest
import torch
from torch import nn

import models
from train.optim import initialise

CONVS = list(models.CONVOLUTIONS)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(("classes", "parameters"), [(100, 365_028), (10, 365_028 - 90 * 513)])
def test_simplenet_has_the_parameters_of_the_writeup(conv, classes, parameters):
    model = models.build("simplenet", conv, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_simplenet_is_made_of_the_layers_of_the_writeup():
    layers = []
    for module in models.build("simplenet", "torch").modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            kernel, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
            layers.append((kernel, stride, padding, module.in_channels, module.out_channels))
        elif isinstance(module, nn.MaxPool2d):
            layers.append(("maxpool", module.kernel_size, module.stride, module.padding))
        elif isinstance(module, nn.ReLU):
            layers.append("relu")
    pool = ("maxpool", 3, 2, 1)
    assert layers == [
        (7, 2, 3, 3, 64), "relu", pool,
        (1, 1, 0, 64, 64), "relu", (3, 1, 1, 64, 64), "relu", (1, 1, 0, 64, 256), "relu", pool,
        (1, 1, 0, 256, 128), "relu", (3, 1, 1, 128, 128), "relu", (1, 1, 0, 128, 512), "relu",
    ]


@pytest.mark.parametrize("conv", CONVS)
def test_every_convolution_is_of_the_class_asked_for(conv):
    model = models.build("simplenet", conv)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 7
    assert all(type(module) is models.CONVOLUTIONS[conv] for module in convolutions)


@pytest.mark.parametrize("init", ["pytorch", "kaiming"])
@pytest.mark.parametrize("conv", CONVS)
def test_the_seed_alone_decides_the_initial_parameters(conv, init):
    states = []
    for name in ("torch", conv):
        torch.manual_seed(3)
        model = models.build("simplenet", name, num_classes=10)
        initialise(model, init)
        states.append(model.state_dict())
    expected, actual = states
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_kaiming_is_not_the_default_and_zeroes_the_biases():
    torch.manual_seed(0)
    model = models.build("simplenet", "torch")
    first = model.block2[3].weight.detach().clone()  # the 3x3 convolution, fan-in 576
    initialise(model, "kaiming")
    assert not torch.equal(model.block2[3].weight, first)
    assert model.block2[3].weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("conv", CONVS)
def test_parameters_lie_in_the_layout_the_convolution_wants(conv):
    weight = models.build("simplenet", conv).block2[3].weight
    assert weight.is_contiguous(memory_format=models.memory_format(conv))
    assert (models.memory_format(conv) == torch.channels_last) == (conv == "triton")


@pytest.mark.parametrize("size", [8, 33, 128])
def test_simplenet_takes_images_of_any_size_from_eight_pixels(size):
    model = models.build("simplenet", "torch", num_classes=7, image_size=size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "alexnet"}, ["unknown model 'alexnet'", "simplenet"]),
        ({"name": "simplenet", "conv": "fft"}, ["unknown convolution 'fft'", "torch, unfold, triton"]),
        ({"name": "simplenet", "image_size": 4}, ["image size 4"]),
    ],
    ids=["model", "conv", "image-size"],
)
def test_what_cannot_be_built_is_named_in_one_line(arguments, words):
    with pytest.raises(ValueError) as error:
        models.build(**arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
