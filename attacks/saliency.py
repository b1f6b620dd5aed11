"""Where a classifier looks: gradient maps, and the check that such maps depend on what the model has learnt.

    saliency                max_c |d L / d x_c|                                          Simonyan et al. 2013
    smooth_grad             max_c |1/S sum_s d L / d x_c (x + sigma z_s)|, z_s ~ N(0, 1)    Smilkov et al. 2017
    grad_cam                relu(sum_k A_k mean_hw(d logit_y / d A_k)), resized          Selvaraju et al. 2017
    randomised_parameters   Spearman's correlation with maps of a model that forgets     Adebayo et al. 2018

x (N, C, H, W); logits (N, K); L the cross-entropy of the class y, which is the predicted one unless labels are given; A
(N, k, h, w) a layer's output. Maps are (N, H, W), not negative, not scaled.

In eval mode an image's map depends on that image alone, so a batch takes one pass: the gradient of a sum over images.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.objective import check_images, check_labels
from attacks.untouched import untouched

Method = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""method(model, x, labels) -> maps (N, H, W)."""


def saliency(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """Maps (N, H, W): the absolute input gradient of the cross-entropy, its maximum over channels.

    x           (N, C, H, W), float32 or float64
    labels      (N,), whose cross-entropy to take; None is the predicted class

    Simonyan et al. 2013, "Deep inside convolutional networks", section 3, which takes a class score's gradient;
    the course write-up takes the cross-entropy's. The gradient is taken in x's precision, never in mixed precision,
    whatever the caller's grad mode; the model is left as it was found (`untouched`), and so is x. Zeros everywhere mean
    a model so sure of the class that its gradient is below what x's type holds: in float32, a lead of about 100.

    Raises ValueError for arguments that do not fit, and for a model whose logits have no gradient.
    """
    x, labels = check_operands(x, labels)
    with explaining(model, x):
        return strongest_channel(input_gradient(model, x, labels))


def smooth_grad(
    model: nn.Module, x: Tensor, labels: Tensor | None = None, *,
    samples: int = 25, noise: float = 0.15, generator: torch.Generator | None = None,
) -> Tensor:
    """Maps (N, H, W): `saliency` of a gradient averaged over noisy copies of x.

    samples     noisy copies of each image; the batch is run once for each, so memory does not grow with them
    noise       the noise's standard deviation, as a share of the range (max - min) of each image
    generator   of the noise; None is a new one with seed 0 at each call

    What is averaged are gradients with their signs, so that what the noise turns to and fro cancels; the absolute value
    and the maximum over channels come after. Labels are those of the clean image for all its copies. All images share
    the same draws, scaled to their range: an image's map does not depend on its batch.

    Smilkov et al. 2017, "SmoothGrad: removing noise by adding noise", section 3; x, labels and errors as in `saliency`.
    """
    x, labels = check_operands(x, labels)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a share of an image's range, 0 or more, got {noise}")
    generator = generator or torch.Generator(x.device).manual_seed(0)
    with explaining(model, x):
        if labels is None:
            labels = predictions(model, x)
        deviation = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
        total = torch.zeros_like(x)
        for _ in range(samples):
            draw = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype, device=x.device)
            total += input_gradient(model, x + deviation * draw, labels)
        return strongest_channel(total / samples)


def grad_cam(model: nn.Module, x: Tensor, layer: nn.Module, labels: Tensor | None = None) -> Tensor:
    """Maps (N, H, W): where a layer speaks for a class.

    layer       a module of the model, run once, of output (N, k, h, w); `last_convolution` finds the usual one
    labels      (N,), the classes whose logits to explain; None is the predicted class

    The layer's channels are weighted by the logit's mean gradient and summed; negative sums become 0; the map is
    resized bilinearly to x. Only layers after `layer` are differentiated.

    Selvaraju et al. 2017, "Grad-CAM: visual explanations from deep networks", equations 1 and 2; x and errors as in
    `saliency`, and ValueError for a layer that does not fit.
    """
    x, labels = check_operands(x, labels)
    if not any(layer is module for module in model.modules()):
        found = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
        raise ValueError(f"layer must be one of the model's own modules, got {found} that is not")
    outputs = []

    def tap(_module: nn.Module, _args: tuple, output: object) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != len(x):
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer must give ({len(x)}, channels, height, width), got {kind}")
        outputs.append(output.detach().requires_grad_())
        return outputs[-1].clone()  # a ReLU that follows may work in place

    with explaining(model, x), layer.register_forward_hook(tap):
        logits = run(model, x)
        if len(outputs) != 1:
            raise ValueError(f"layer must run once in a forward pass, {type(layer).__name__} ran {len(outputs)} times")
        labels = classes(logits, labels)
        (gradient,) = torch.autograd.grad(differentiable(logits).gather(1, labels[:, None]).sum(), outputs)
        weights = gradient.mean((2, 3), keepdim=True)  # (N, k, 1, 1)
        maps = (weights * outputs[0].detach()).sum(1, keepdim=True).relu()  # (N, 1, h, w)
        return F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)


def last_convolution(model: nn.Module) -> nn.Module:
    """The last `nn.Conv2d` in the order in which the model lists its modules; ValueError where it has none.

    Of SimpleViT that is the patch embedding, before all attention: there Grad-CAM shows little.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d")
    return convolutions[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Randomised:
    """One step of `randomised_parameters`."""

    layer: str | None
    """Name of the layer randomised last, the model's class for parameters that are its own; None for the model as it
    came."""
    correlation: Tensor
    """(N,) float64: `rank_correlation` of `maps` with those of the model as it came."""
    maps: Tensor
    """(N, H, W)."""


@torch.inference_mode(mode=False)  # a copy made in inference mode would have parameters without gradient
def randomised_parameters(
    model: nn.Module, x: Tensor, method: Method, labels: Tensor | None = None, *, seed: int = 0
) -> list[Randomised]:
    """Maps of a model that forgets its layers one after the other, from the output to the input.

    method      method(model, x, labels) -> (N, H, W): `saliency` and `smooth_grad` as they are, Grad-CAM as
                `lambda model, x, labels: grad_cam(model, x, last_convolution(model), labels)`
    labels      (N,), the classes explained in all steps; None is what the model as it came predicts

    The first step is the model as it came; each further one randomises one more layer. A method passes where the
    correlation falls; one that ignores the model, as an edge detector does, stays at 1. Classes are held fixed because
    a map that follows the predicted class would change with it and pass for that alone.

    It falls to 0 where only parameters tell pixels apart. Strides and pooling draw a grid and borders a frame into
    absolute gradients of any parameters (SimpleNet at 32 px: 0.5), so it falls to what two models without memory have
    in common: the `rank_correlation` of the last maps of two seeds.

    A layer is a module with parameters of its own, and layers are taken in the order in which a forward pass enters
    them. Randomised is what a new layer has: `reset_parameters`, which resets BatchNorm's statistics too; where a
    module has none, its parameters' entries are shuffled. The same seed gives the same parameters on all devices.
    All happens to a copy of the model.

    Adebayo et al. 2018, "Sanity checks for saliency maps", section 3 (cascading randomisation). Raises ValueError for
    arguments that do not fit, a model without parameters, and maps that are not (N, H, W).
    """
    x, labels = check_operands(x, labels)
    model = copy.deepcopy(model)
    layers, predicted = layers_and_predictions(model, x)
    labels = predicted if labels is None else labels
    fresh = reinitialised(model, layers, seed)
    steps: list[Randomised] = []
    for layer in [None, *reversed(layers)]:
        if layer is not None:
            forget(model.get_submodule(layer), fresh.get_submodule(layer))
        maps = method(model, x, labels)
        if maps.shape != (len(x), *x.shape[2:]):
            raise ValueError(f"method must give maps {(len(x), *x.shape[2:])}, got {tuple(maps.shape)}")
        maps = maps.detach()
        original = steps[0].maps if steps else maps
        name = type(model).__name__ if layer == "" else layer
        steps.append(Randomised(layer=name, correlation=rank_correlation(original, maps), maps=maps))
    return steps


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each a[n] with b[n]: a, b (N, ...) of one shape -> (N,) float64.

    Equal values share the mean of their ranks: without that the zeros of two Grad-CAM maps would be ranked by their
    places, and correlate. NaN where a or b is constant or holds a NaN. Raises ValueError for different shapes.
    """
    if a.shape != b.shape or a.dim() < 2:
        raise ValueError(f"maps must be (N, ...) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = centred_ranks(a.flatten(1)), centred_ranks(b.flatten(1))
    return (a * b).sum(1) / ((a * a).sum(1) * (b * b).sum(1)).sqrt()


def centred_ranks(values: Tensor) -> Tensor:
    """(N, P) -> (N, P) float64, each row less its mean; equal values share the mean of their ranks."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    ranks = (below + not_above).double() / 2
    ranks = ranks.masked_fill(values.isnan(), math.nan)
    return ranks - ranks.mean(1, keepdim=True)


@contextlib.contextmanager
def explaining(model: nn.Module, x: Tensor) -> Iterator[None]:
    """The model untouched; gradients in x's precision, whatever modes the caller is in."""
    with untouched(model, x.device), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def input_gradient(model: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """d cross-entropy / d x (N, C, H, W); within `explaining`.

    The cross-entropy is written as log(1 + sum_{j != y} exp(z_j - z_y)). Its gradient, sum_{j != y} p_j d(z_j - z_y),
    is right for confident models too: F.cross_entropy weighs z_y by p_y - 1, which float32 rounds to 0 from a lead of
    about 17 on, and a map of the other classes alone would be left.
    """
    x = x.detach().clone().requires_grad_()  # a copy, for tensors made in inference mode cannot ask for a gradient
    logits = run(model, x)
    at_label = classes(logits, labels)[:, None]
    lead = differentiable(logits) - logits.gather(1, at_label)  # (N, K)
    loss = lead.scatter(1, at_label, 0).logsumexp(1)  # the label's own lead is a constant
    return torch.autograd.grad(loss.sum(), x)[0]


def strongest_channel(gradient: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W)."""
    return gradient.abs().amax(1)


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """(N,), the most likely classes; within `explaining`."""
    with torch.no_grad():
        return classes(run(model, x), None)


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, K). The model gets a copy, since its first layer may work in place; ValueError for another shape."""
    logits = model(x.clone())
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must give logits ({len(x)}, classes), got {kind}")
    return logits


def classes(logits: Tensor, labels: Tensor | None) -> Tensor:
    """(N,): labels, or the most likely classes of logits (N, K); ValueError for labels that are no classes."""
    if labels is None:
        return logits.detach().argmax(1)
    if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(
            f"labels must be 0 to {logits.shape[1] - 1}, the model's classes; got {labels.min()} to {labels.max()}"
        )
    return labels


def differentiable(logits: Tensor) -> Tensor:
    """The logits; ValueError where no gradient flows through them."""
    if not logits.requires_grad:
        raise ValueError("the logits have no gradient: they are detached, or do not depend on what is explained")
    return logits


def check_operands(x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x without its history, and labels as int64 on its device; ValueError where they do not fit."""
    return check_images(x), None if labels is None else check_labels("labels", labels, x)


def layers_and_predictions(model: nn.Module, x: Tensor) -> tuple[list[str], Tensor]:
    """Names of the modules with parameters of their own, as a forward pass last enters them, and its classes (N,)."""
    clock = itertools.count()
    entered: dict[nn.Module, int] = {}

    def note(module: nn.Module, _args: tuple) -> None:
        entered[module] = next(clock)

    with contextlib.ExitStack() as hooks, explaining(model, x):
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(note))
        predicted = predictions(model, x)
    layers: dict[str, int] = {}
    times: dict[str, int] = {}
    for name, module in model.named_modules():
        # One whose parent uses its parameters without calling it (nn.MultiheadAttention's projection) goes with that.
        times[name] = entered[module] if module in entered else times[name.rpartition(".")[0]]
        if next(module.parameters(recurse=False), None) is not None:
            layers[name] = times[name]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no parameters to randomise")
    return sorted(layers, key=layers.get), predicted


def reinitialised(model: nn.Module, layers: list[str], seed: int) -> nn.Module:
    """A copy of the model on the CPU, whose generator is the same everywhere, with these layers as new."""
    fresh = copy.deepcopy(model).cpu()
    # The seed itself would bring back the first weights of a model that was built with it.
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, which are not forked
        for name in layers:
            layer = fresh.get_submodule(name)
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
                continue
            for parameter in layer.parameters(recurse=False):
                shuffled = parameter.flatten()[torch.randperm(parameter.numel())]
                parameter.copy_(shuffled.view_as(parameter))
    return fresh


@torch.no_grad()
def forget(layer: nn.Module, fresh: nn.Module) -> None:
    """Gives a layer the parameters and buffers of its fresh copy, not those of modules in it."""
    for old, new in zip(own_tensors(layer), own_tensors(fresh), strict=True):
        old.copy_(new)


def own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
