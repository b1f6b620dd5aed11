"""Saliency maps: known truth, captum's maps, the model left as it was, and the randomised-parameter check."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from attacks.saliency import (
    grad_cam,
    last_convolution,
    randomised_parameters,
    rank_correlation,
    saliency,
    smooth_grad,
)

captum = pytest.importorskip("captum.attr", reason="captum, the oracle of these tests, is not installed")


def smooth(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Tensor:
    return smooth_grad(model, x, labels, samples=3)


def cam(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Tensor:
    return grad_cam(model, x, last_convolution(model), labels)


def check(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Tensor:
    return torch.stack([step.maps for step in randomised_parameters(model, x, saliency, labels)])


EXPLAIN = [
    pytest.param(saliency, id="saliency"),
    pytest.param(smooth, id="smooth_grad"),
    pytest.param(cam, id="grad_cam"),
]
ALL = [*EXPLAIN, pytest.param(check, id="randomised_parameters")]


def images(count: int = 3, side: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small_net(inplace: bool = True) -> nn.Sequential:
    """Two convolutions and all that an explanation could leave changed: batch norm, dropout, in-place layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    model(images(8) + 1)  # so that batch norm's statistics are not those of a new layer
    return model


def linear_model(classes: int = 4, side: int = 5, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes)).to(dtype)


def cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What captum differentiates: images, labels -> (N,)."""
    return lambda x, labels: F.cross_entropy(model(x), labels, reduction="none")


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x.clone()).argmax(1)


# ---- saliency


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 0, 1])], ids=["predicted", "given"])
def test_a_linear_model_has_the_map_one_writes_down(labels):
    model, x = linear_model(), images(side=5, dtype=torch.float64)
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    logits = x.flatten(1) @ weight.T + bias
    wanted = logits.argmax(1) if labels is None else labels
    gradient = (logits.softmax(1) - F.one_hot(wanted, 4)) @ weight
    torch.testing.assert_close(saliency(model, x, labels), gradient.abs().view_as(x).amax(1))


@pytest.mark.parametrize("name", list(models.MODELS))
@pytest.mark.parametrize("given", [False, True], ids=["predicted", "given"])
def test_equals_captum(name, given):
    torch.manual_seed(0)
    model, x = models.build(name, "torch", 10, 32).eval().double(), images(2, 32, torch.float64)
    labels = (predicted(model, x) + given) % 10
    theirs = captum.Saliency(cross_entropy(model)).attribute(x.clone(), additional_forward_args=labels, abs=True)
    torch.testing.assert_close(saliency(model, x, labels if given else None), theirs.amax(1))


@pytest.mark.parametrize("conv", ["unfold", "triton"])
@pytest.mark.parametrize("explain", [saliency, cam])
def test_every_convolution_draws_the_same_map(explain, conv):
    x, maps = images(2, 32), {}
    for kind in ("torch", conv):
        torch.manual_seed(0)
        model = models.build("simplenet", kind, 10, 32)
        maps[kind] = explain(model, x.to(memory_format=models.memory_format(kind)))
    scale = maps["torch"].amax()
    assert scale > 0
    torch.testing.assert_close(maps[conv] / scale, maps["torch"] / scale, rtol=1e-4, atol=1e-5)


def test_a_confident_model_keeps_its_map():
    """In float32, softmax rounds the label's probability to 1 and F.cross_entropy loses the label's logit."""
    model, x = linear_model(), images(side=5, dtype=torch.float64)
    model[1].bias.data[2] += 30
    labels = torch.tensor([2, 2, 2])
    weight, logits = model[1].weight.detach(), model(x).detach()
    assert (logits[:, 2] - logits[:, [0, 1, 3]].amax(1)).min() > 25
    truth = (logits.softmax(1) @ (weight - weight[2])).abs().view_as(x).amax(1)
    scale = truth.amax()
    model, x = model.float(), x.float()
    # Logits around 30 are rounded by 2e-6, of which exp() makes a share of each class's part in the map.
    torch.testing.assert_close(saliency(model, x).double() / scale, truth / scale, rtol=0, atol=1e-5)
    plain = captum.Saliency(cross_entropy(model)).attribute(x, additional_forward_args=labels).amax(1)
    assert (plain - truth).abs().max() > 0.1 * scale


@pytest.mark.parametrize("explain", EXPLAIN)
def test_an_image_has_its_map_whatever_its_batch(explain):
    model, x = small_net().double(), images(dtype=torch.float64)
    together = explain(model, x)
    assert (together.flatten(1).amax(1) > 0).any()
    for image, its_map in zip(x, together, strict=True):
        torch.testing.assert_close(explain(model, image[None])[0], its_map)


@pytest.mark.parametrize("explain", ALL)
def test_no_mode_of_the_caller_changes_a_map(explain):
    model, x = small_net(), images()
    plain = explain(model, x)
    assert plain.dtype == x.dtype
    assert plain.shape[-3:] == (3, 12, 12)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(explain(model, x), plain)
    with torch.inference_mode():
        assert torch.equal(explain(model, x.clone()), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(explain(model, x), plain)
    asking = x.clone().requires_grad_()
    assert torch.equal(explain(model, asking), plain)
    assert asking.grad is None
    assert torch.equal(explain(model.eval(), x), plain)


@pytest.mark.parametrize("explain", ALL)
def test_images_stay_as_they_are_under_in_place_layers(explain):
    model, x = nn.Sequential(nn.ReLU(inplace=True), small_net()), images()
    before = x.clone()
    explain(model, x)
    assert torch.equal(x, before)
    assert (x < 0).any()


# ---- the model left as it was found


class Fails(nn.Module):
    """Passes on what it gets, until the pass numbered `at`."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("this model fails")
        return x


def state_of(model: nn.Module) -> tuple:
    """All that an explanation must leave alone, as it is now."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [(m.training, *(len(getattr(m, kind)) for kind in hooks)) for m in model.modules()]
    gradients = [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()]
    asking = [p.requires_grad for p in model.parameters()]
    values = {name: (id(value), value.tolist()) for name, value in model.state_dict(keep_vars=True).items()}
    return modules, gradients, asking, values, torch.get_rng_state().tolist()


def lived_in(model: nn.Sequential) -> nn.Sequential:
    """In training, with a layer frozen in eval mode, a parameter that asks for nothing, and gradients of a step."""
    model.train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model(images()).sum().backward()
    return model


@pytest.mark.parametrize("explain", ALL)
def test_model_is_left_as_it_was_found(explain):
    model = lived_in(small_net())
    before = state_of(model)
    explain(model, images())
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("explain", "at"), [(saliency, 0), (smooth, 0), (smooth, 2), (cam, 0), (check, 0), (check, 2)]
)
def test_model_is_left_as_it_was_found_by_an_exception(explain, at):
    model = lived_in(small_net())
    model.append(Fails(at))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="this model fails"):
        explain(model, images())
    assert state_of(model) == before


def test_model_is_left_as_it_was_found_by_an_error_of_ours():
    model = lived_in(small_net())
    before = state_of(model)
    for layer in (model[8], model[9]):
        with pytest.raises(ValueError, match="layer must give"):
            grad_cam(model, images(), layer)
    with pytest.raises(ValueError, match="labels must be 0 to 3"):
        grad_cam(model, images(), model[4], torch.tensor([0, 4, 1]))
    assert state_of(model) == before


def test_weights_gradients_are_never_computed(launches):
    model = models.build("simplenet", "triton", 10, 16)
    saliency(model, images(1, 16).to(memory_format=torch.channels_last))
    assert launches.count("forward") == launches.count("input_grad") == 7
    assert "weight_grad" not in launches


# ---- SmoothGrad


class Recorder(nn.Module):
    """A model that keeps what it is asked."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.model(x)


def test_smooth_grad_equals_captum():
    model, x = small_net().eval(), images(1)
    labels = predicted(model, x)
    theirs = captum.NoiseTunnel(captum.Saliency(cross_entropy(model)))
    deviation = 0.2 * float(x.max() - x.min())
    torch.manual_seed(5)
    mean = theirs.attribute(
        x, nt_samples=6, nt_samples_batch_size=1, stdevs=deviation, additional_forward_args=labels, abs=False
    )
    ours = smooth_grad(model, x, samples=6, noise=0.2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, mean.abs().amax(1), rtol=1e-4, atol=1e-6)


def test_smooth_grad_without_noise_is_saliency():
    model, x = small_net(), images()
    assert torch.equal(smooth_grad(model, x, samples=1, noise=0), saliency(model, x))
    torch.testing.assert_close(smooth_grad(model, x, samples=7, noise=0), saliency(model, x))


def test_noise_is_a_share_of_each_images_range():
    model, x = Recorder(small_net()), images(3, 40)
    x *= torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1)
    smooth_grad(model, x, torch.tensor([0, 1, 2]), samples=4, noise=0.3)
    draws = torch.stack(model.asked) - x
    assert draws.shape == (4, 3, 3, 40, 40)  # one copy of the batch at a time
    range_ = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    torch.testing.assert_close(draws.std((0, 2, 3, 4)), 0.3 * range_, rtol=0.02, atol=0)
    assert draws.mean((0, 2, 3, 4)).abs().div(range_).max() < 0.01


def test_noisy_copies_keep_the_clean_images_label():
    model, x = Recorder(nn.Sequential(linear_model(side=12, dtype=torch.float32), nn.Tanh())), images()
    labels = predicted(model.model, x)
    maps = smooth_grad(model, x, samples=5, noise=1)
    noisy = [predicted(model.model, copies) for copies in model.asked[1:]]
    assert len(noisy) == 5
    assert any(not torch.equal(there, labels) for there in noisy)
    assert torch.equal(maps, smooth_grad(model, x, labels, samples=5, noise=1))


def test_smooth_grad_repeats_itself_and_heeds_the_generator():
    model, x = small_net(), images()
    generator = torch.Generator().manual_seed(0)
    first = smooth_grad(model, x, samples=2)
    assert torch.equal(smooth_grad(model, x, samples=2), first)
    assert torch.equal(smooth_grad(model, x, samples=2, generator=generator), first)
    assert not torch.equal(smooth_grad(model, x, samples=2, generator=generator), first)


# ---- Grad-CAM


def test_grad_cam_is_what_one_writes_down():
    """Channels that are copies of the image, weighted by hand: logit_y = sum_k v[y, k] * mean(A_k)."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model.double()
    model[0].weight.data = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1)
    model[3].weight.data = votes = torch.tensor([[1.0, -2, 0.5], [0.25, 1, -3]], dtype=torch.float64)
    x, labels = images(2, 6, torch.float64), torch.tensor([1, 0])
    wanted = torch.einsum("nk,nkhw->nhw", votes[labels] / 36, x).relu()
    torch.testing.assert_close(grad_cam(model, x, model[0], labels), wanted)
    assert (wanted == 0).any()
    assert (wanted > 0).any()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("simplenet", "block3"), ("simplenet", "block3.1"), ("customnet", "block1.0"), ("resnet18", "layer2")],
)
def test_grad_cam_equals_captum(name, layer):
    torch.manual_seed(0)
    model, x = models.build(name, "torch", 10, 32).eval().double(), images(2, 32, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # what captum does with those that are is its own affair
    tapped, labels = model.get_submodule(layer), torch.tensor([3, 8])
    theirs = captum.LayerGradCam(model, tapped).attribute(x.clone(), labels, relu_attributions=True)
    theirs = captum.LayerAttribution.interpolate(theirs, (32, 32), "bilinear").squeeze(1)
    assert theirs.max() > 0
    torch.testing.assert_close(grad_cam(model, x, tapped, labels), theirs.detach())


@pytest.mark.parametrize("layer", [0, 1, 2, 4, 5], ids=lambda i: type(small_net()[i]).__name__ + str(i))
def test_grad_cam_goes_by_the_layers_own_output(layer):
    """Not by what a ReLU that works in place makes of it."""
    models_, labels = (small_net(inplace=True), small_net(inplace=False)), torch.tensor([0, 1, 2])
    ours, plain = (grad_cam(model, images(), model[layer], labels) for model in models_)
    assert plain.max() > 0
    assert torch.equal(ours, plain)


def test_grad_cam_explains_the_prediction_unless_told():
    model, x = small_net(), images()
    labels = predicted(model, x)
    assert torch.equal(cam(model, x), cam(model, x, labels))
    assert not torch.equal(cam(model, x), cam(model, x, (labels + 1) % 4))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.ignored = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        return self.conv(self.conv(x)).mean((2, 3))


def test_grad_cam_wants_a_layer_that_fits():
    model = Twice()
    for layer in (nn.Conv2d(3, 3, 1), "conv"):
        with pytest.raises(ValueError, match="one of the model's own modules"):
            grad_cam(model, images(), layer)
    with pytest.raises(ValueError, match="Conv2d ran 0 times"):
        grad_cam(model, images(), model.unused)
    with pytest.raises(ValueError, match="Conv2d ran 2 times"):
        grad_cam(model, images(), model.conv)
    with pytest.raises(ValueError, match="do not depend on what is explained"):
        grad_cam(model, images(), model.ignored)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("simplenet", "block3.5"), ("customnet", "block3.5"), ("resnet18", "layer4.1.conv2"), ("simplevit", "patch")],
)
@pytest.mark.parametrize("conv", list(models.CONVOLUTIONS))
def test_last_convolution(name, layer, conv):
    model = models.build(name, conv, 10, 32)
    assert last_convolution(model) is model.get_submodule(layer)


def test_no_last_convolution():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Conv2d"):
        last_convolution(linear_model())


# ---- the randomised-parameter check


def naive_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def test_rank_correlation_by_hand():
    a = torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5, 6, 7, 8, 7]])
    b = torch.tensor([[2.0, 9, 10, 11, 99], [5, 4, 1, 0, -7], [1, 2, 3, 4, 5]])
    # The third: ranks 1, 2, 3.5, 5, 3.5 and 1..5; covariance 8, variances 9.5 and 10.
    wanted = torch.tensor([1, -1, 8 / math.sqrt(95)], dtype=torch.float64)
    torch.testing.assert_close(rank_correlation(a, b), wanted)


def test_rank_correlation_shares_ranks_between_equals():
    a, b = torch.randint(0, 5, (2, 4, 6, 5), generator=torch.Generator().manual_seed(0)).float()
    ranks = [torch.tensor([naive_ranks(row.tolist()) for row in values.flatten(1)]) for values in (a, b)]
    wanted = [torch.corrcoef(torch.stack(rows).double())[0, 1] for rows in zip(*ranks, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.stack(wanted))


def test_rank_correlation_says_so_where_there_is_none():
    varied = torch.arange(6.0).view(1, 2, 3).repeat(3, 1, 1)
    other = varied.clone()
    other[0] = 7
    other[1, 0, 0] = math.nan
    assert rank_correlation(varied, other).isnan().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="of one shape"):
        rank_correlation(varied, varied[:1])


def edges(_model: nn.Module, x: Tensor, _labels: Tensor) -> Tensor:
    """A map that ignores the model."""
    grey = x.mean(1)
    return (grey - grey.roll(1, 1)).abs() + (grey - grey.roll(1, 2)).abs()


def test_a_method_that_ignores_the_model_does_not_fall():
    steps = randomised_parameters(small_net(), images(), edges)
    assert len(steps) == 5
    for step in steps:
        torch.testing.assert_close(step.correlation, torch.ones(3, dtype=torch.float64))


def test_gradients_fall_to_nothing_where_only_weights_tell_pixels_apart():
    model, x = linear_model(side=32, dtype=torch.float32), images(4, 32)
    before, after = randomised_parameters(model, x, saliency)
    assert (before.layer, after.layer) == (None, "1")
    torch.testing.assert_close(before.correlation, torch.ones(4, dtype=torch.float64))
    assert torch.equal(before.maps, saliency(model, x))
    assert after.correlation.abs().max() < 4 / 32  # four standard deviations of 32*32 independent pairs


@pytest.mark.parametrize("explain", [saliency, smooth])
def test_gradients_of_a_network_fall_to_what_two_models_without_memory_share(explain):
    torch.manual_seed(0)
    model, x = models.build("simplenet", "torch", 10, 32), images(4, 32)
    first, second = (randomised_parameters(model, x, explain, seed=seed) for seed in (0, 1))
    floor = rank_correlation(first[-1].maps, second[-1].maps).mean()
    assert floor < 0.7
    assert first[0].correlation.min() > 0.999
    for step in first[1:]:
        assert step.correlation.mean() < floor + 0.15, step.layer


def test_one_more_layer_forgets_at_each_step():
    model, states, labels = small_net(), [], []

    def watch(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        labels.append(classes)
        assert not any(module._forward_pre_hooks for module in model.modules())
        return saliency(model, x, classes)

    steps = randomised_parameters(model, images(), watch)
    assert [step.layer for step in steps] == [None, "9", "4", "1", "0"]
    for (before, after), step in zip(itertools.pairwise(states), steps[1:], strict=True):
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {step.layer}
        torch.testing.assert_close(step.correlation, rank_correlation(steps[0].maps, step.maps))
    assert torch.equal(states[-1]["1.running_mean"], torch.zeros(8))
    for given in labels:  # the last steps predict something else
        assert torch.equal(given, predicted(model, images()))
    randomised_parameters(model, images(), watch, torch.tensor([2, 2, 0]))
    assert labels[-1].tolist() == [2, 2, 0]


def test_the_same_seed_forgets_the_same_way():
    model, x = small_net(), images()
    maps = check(model, x)
    torch.manual_seed(12345)
    assert torch.equal(check(model, x), maps)
    other = torch.stack([step.maps for step in randomised_parameters(model, x, saliency, seed=1)])
    assert torch.equal(other[0], maps[0])
    assert not torch.equal(other[1], maps[1])


@pytest.mark.parametrize("make", [linear_model, small_net])
def test_forgetting_brings_no_first_weights_back(make):
    """Not even where the model was initialised with the seed of the check."""
    model = make()
    fresh = []
    randomised_parameters(
        model, images(side=5, dtype=next(model.parameters()).dtype),
        lambda copied, x, labels: fresh.append(copy.deepcopy(copied)) or saliency(copied, x, labels), seed=0,
    )  # fmt: skip
    for name, value in model.named_parameters():
        if value.std() > 0:
            pairs = torch.stack([value.detach().flatten(), fresh[-1].get_parameter(name).detach().flatten()])
            assert (pairs[0] != pairs[1]).all(), name


class Backwards(nn.Module):
    """Registers its layers the other way round, holds a parameter itself and one that its layer is not asked for."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.stem = nn.Conv2d(3, 8, 3)
        self.position = nn.Parameter(torch.randn(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (self.stem(x).flatten(2) + self.position).mT
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


def test_layers_are_taken_as_a_forward_pass_enters_them():
    torch.manual_seed(0)
    model, last = Backwards(), []
    steps = randomised_parameters(
        model, images(), lambda copied, x, labels: last.append(copied) or saliency(copied, x, labels)
    )
    names = [step.layer for step in steps]
    assert names == [None, "head", "attention.out_proj", "attention", "stem", "Backwards"]
    # Without reset_parameters: the same values elsewhere.
    position = last[-1].position
    assert not torch.equal(position, model.position)
    assert torch.equal(position.flatten().sort().values, model.position.flatten().sort().values)


# ---- errors


@pytest.mark.parametrize("explain", ALL)
@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        pytest.param(torch.zeros(3, 12, 12), None, r"x must be \(N, C, H, W\).*got \(3, 12, 12\)", id="one-image"),
        pytest.param(images().half(), None, r"got .* of torch\.float16", id="half"),
        pytest.param(images().long(), None, r"got .* of torch\.int64", id="integers"),
        pytest.param(images(), torch.tensor([0, 1]), r"labels must be 3 integer labels.*got \(2,\)", id="too-few"),
        pytest.param(images(), torch.zeros(3), r"labels must be .*got .* of torch\.float32", id="float-labels"),
        pytest.param(images(), torch.tensor([0, 1, 4]), "labels must be 0 to 3.*got 0 to 4", id="no-class"),
        pytest.param(images(), torch.tensor([0, 1, -100]), "labels must be .*got -100", id="ignore-index"),
    ],
)
def test_arguments_that_do_not_fit(explain, x, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        explain(small_net(), x, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("explain", ALL)
def test_a_model_without_logits(explain):
    with pytest.raises(ValueError, match=r"must give logits \(3, classes\), got \(3, 8, 12, 12\)"):
        explain(nn.Conv2d(3, 8, 3, padding=1), images())


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach()


@pytest.mark.parametrize("explain", ALL)
def test_a_model_without_gradient(explain):
    with pytest.raises(ValueError, match="the logits have no gradient"):
        explain(Detached(), images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"noise": -0.1}, "got -0.1"),
        ({"noise": math.nan}, "got nan"),
    ],
)
def test_noise_that_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        smooth_grad(small_net(), images(), **options)


def test_checks_that_cannot_be_made():
    with pytest.raises(ValueError, match="Sequential has no parameters to randomise"):
        randomised_parameters(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), images(), edges)
    with pytest.raises(ValueError, match=r"method must give maps \(3, 12, 12\), got \(3, 3, 12, 12\)"):
        randomised_parameters(small_net(), images(), lambda _model, x, _labels: x)
