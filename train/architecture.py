"""What a model is made of, found by running it: its layers in order, the shapes between them, its skip connections.

The model runs once on a meta tensor, which has a shape and no values. Hooks tell the layers and the shapes they make;
a TorchFunctionMode follows the tensors between them, so a sum of two layers' results shows itself as a skip connection.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import StochasticDepth

ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
# Layers that belong to the one before them, and are drawn in its row.
FOLLOWERS = {
    nn.BatchNorm1d: "batch norm",
    nn.BatchNorm2d: "batch norm",
    nn.LayerNorm: "layer norm",
    nn.ReLU: "ReLU",
    nn.GELU: "GELU",
}


@dataclass(kw_only=True, eq=False, slots=True)
class Layer:
    """One step of the forward pass."""

    kind: str
    """conv, linear, pool, attention, add, follower, input or other: its colour, and whether it needs its own row."""
    label: str
    path: str
    """Of the module it is, or is a call of: "skips.0.branch.1"; empty for a call in the model's own forward."""
    shape: tuple[int, ...]
    """Of its result, for one image."""
    sources: list["Layer"]
    """The layers whose results it takes; two for a sum."""


class Tracer(TorchFunctionMode):
    """Inside the block, `layers` grows by what `model` does, in the order in which it does it."""

    def __init__(self, model: nn.Module, image: Tensor):
        super().__init__()
        self.layers = [Layer(kind="input", label="image", path="", shape=tuple(image.shape[1:]), sources=[])]
        self.makers = {id(image): self.layers[0]}
        self.alive = [image]  # an id is one tensor's only as long as that tensor lives
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.calls: list[tuple[str, nn.Module]] = []  # the modules being called, outermost first
        self.hooks = []
        for path, module in model.named_modules():
            enter = partial(self.enter, path)
            self.hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(self.leave)]

    def enter(self, path: str, module: nn.Module, inputs: tuple) -> None:
        self.calls.append((path, module))

    def leave(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if is_leaf(module):
            self.note(*describe(module), inputs, output)
        self.calls.pop()

    def note(self, kind: str, label: str, inputs: object, output: Tensor) -> None:
        path, _ = self.calls[-1]
        shape = tuple(output.shape)[output.shape[0] == 1 :]  # windows of an image lie along the batch
        self.layers.append(Layer(kind=kind, label=label, path=path, shape=shape, sources=self.sources(inputs)))
        self.made(output, self.layers[-1])

    def made(self, tensor: Tensor, layer: Layer) -> None:
        self.makers[id(tensor)] = layer
        self.alive.append(tensor)

    def sources(self, values: object) -> list[Layer]:
        """The different layers that made the tensors among `values`."""
        makers = (self.makers.get(id(value)) for value in tree_leaves(values))
        return list(dict.fromkeys(maker for maker in makers if maker is not None))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sources = self.sources(args)
        step = None
        if sources and not is_leaf(self.calls[-1][1]):
            step = self.describe_call(func.__name__, args, len(sources))
        if step is not None:
            self.note(*step, args, result)
        elif sources:
            latest = max(sources, key=self.layers.index)
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    self.made(value, latest)
        return result

    def describe_call(self, name: str, args: tuple, sources: int) -> tuple[str, str] | None:
        """(kind, label) of a function called between the layers; None for one that only rearranges."""
        if name in ADDITIONS and sources == 2:
            return "add", ""
        if name in ADDITIONS:
            learned = [self.names[id(value)] for value in tree_leaves(args) if id(value) in self.names]
            return ("other", f"add {learned[0]} (learned)") if learned else None
        if name == "scaled_dot_product_attention":
            groups, heads, tokens, _ = args[0].shape
            where = f"{groups} windows of {tokens}" if groups > 1 else f"all {tokens}"
            return "attention", f"attention, {heads} heads, {where} tokens"
        return ("pool", "average over tokens") if name == "mean" else None


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def describe(module: nn.Module) -> tuple[str, str]:
    """(kind, label) of a layer."""
    match module:
        case nn.Conv2d():
            kernel = "×".join(map(str, module.kernel_size))
            stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
            return "conv", f"conv {kernel}, {module.in_channels} → {module.out_channels}{stride}"
        case nn.Linear():
            return "linear", f"linear {module.in_features} → {module.out_features}"
        case nn.MaxPool2d():
            return "pool", f"max pool {module.kernel_size}×{module.kernel_size}, stride {module.stride}"
        case nn.AdaptiveAvgPool2d():
            return "pool", "global average pool"
        case StochasticDepth():
            return "follower", f"stochastic depth {module.p:.2g}"
    return ("follower", FOLLOWERS[type(module)]) if type(module) in FOLLOWERS else ("other", type(module).__name__)


def trace(model: nn.Module, image_size: int) -> list[Layer]:
    """What `model`, on the meta device, does in eval mode to one image of 3 x image_size x image_size, in order."""
    tracer = Tracer(model.eval(), torch.empty(1, 3, image_size, image_size, device="meta"))
    with torch.no_grad(), tracer:
        model(*tracer.alive)
    for hook in tracer.hooks:
        hook.remove()
    return tracer.layers


def skip_of(total: Layer) -> tuple[Layer, list[Layer]]:
    """Where the two branches of a sum part, and the layers of the shorter one in order."""
    first, second = (ancestry(source) for source in total.sources)
    common = next(layer for layer in first if layer in second)
    branches = (first[: first.index(common)], second[: second.index(common)])
    return common, min(branches, key=len)[::-1]


def ancestry(layer: Layer) -> list[Layer]:
    """The layer, the one before it, and so on to the image; through a sum along the branch that ended last."""
    line = [layer]
    while line[-1].sources:
        line.append(line[-1].sources[-1])
    return line
