"""What SimpleNet's fused operators replace: chains of operations, ours, PyTorch's, and ours one after the other.

    conv_relu           relu(conv(x, w) + bias)
    conv_relu_grad      its gradients of x, w and bias; the stem's input needs none
    relu_max_pool       max_pool(relu(x)) and the winners' index
    relu_max_pool_grad  its gradient of x
    bias_grad           the sum of dy over images and pixels

All tensors are channels-last. A chain's results are tuples.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

import models
from bench.gpu_check.operations import told_of
from bench.rows import MODEL, SIZES
from bench.shapes import Layer, timed_layers
from kernels import runtime
from kernels.bias_grad import bias_grad
from kernels.forward import forward
from kernels.geometry import ConvGeometry, PoolGeometry
from kernels.input_grad import input_grad
from kernels.pool import index_dtype, max_pool, max_pool_grad
from kernels.weight_grad import weight_grad

aten = torch.ops.aten
LAST = torch.channels_last
OF_CONVOLUTIONS = ("conv_relu", "conv_relu_grad", "bias_grad")
OF_POOLS = ("relu_max_pool", "relu_max_pool_grad")

Results = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What is timed."""

    layer: Layer
    """Of a pool, the window takes the filter's place."""
    name: str
    """One of OF_CONVOLUTIONS or OF_POOLS."""
    dtype: torch.dtype
    precision: str
    """"ieee" or "tf32"."""

    @property
    def geometry(self) -> ConvGeometry:
        return self.layer.geometry

    @property
    def pool(self) -> PoolGeometry:
        layer = self.layer
        return PoolGeometry.of(layer.x_shape, layer.w_shape[2:], layer.stride, layer.padding, layer.dilation)

    @property
    def asks_for_dx(self) -> bool:
        """Images need no gradient."""
        return self.layer.x_shape[1] > 3

    @property
    def has_unfused(self) -> bool:
        """Whether our kernels could compute it before the fusion, with PyTorch's ReLU."""
        return self.name in ("conv_relu", "conv_relu_grad")

    def row(self) -> dict:
        """As plain types."""
        return {"chain": self.name} | told_of(self.layer, self.dtype, self.precision)


def chains(arch: str) -> list[Chain]:
    """Those of the layers that are timed, and of the pools, in fp16, TF32 and IEEE fp32; TF32 where the GPU has it."""
    kinds = [(torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    if int(arch.removeprefix("sm_")) < 80:
        kinds.remove((torch.float32, "tf32"))
    found = [
        Chain(layer=layer, name=name, dtype=dtype, precision=precision)
        for name in OF_CONVOLUTIONS
        for layer in timed_layers(MODEL, *SIZES["cuda"])
        for dtype, precision in kinds
        if precision == "ieee" or name != "bias_grad"  # which multiplies nothing
    ]
    return found + [
        Chain(layer=layer, name=name, dtype=dtype, precision="ieee")
        for name in OF_POOLS
        for layer in pool_layers(MODEL, *SIZES["cuda"])
        for dtype in (torch.float16, torch.float32)
    ]


def pool_layers(model_name: str, batch_size: int, image_size: int) -> list[Layer]:
    """The model's max-pools in the order they run, with the window in the filter's place."""
    with torch.device("meta"):
        model = models.build(model_name, conv="torch", image_size=image_size)
        images = torch.empty(batch_size, 3, image_size, image_size)
    layers = []

    def note(pool: nn.MaxPool2d, inputs: Results) -> None:
        (x,) = inputs
        geometry = PoolGeometry.of(x.shape, pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        g = geometry
        layers.append(Layer(
            name=f"pool{g.R}x{g.S}-{g.C}", x_shape=tuple(x.shape), w_shape=(g.C, g.C, g.R, g.S),
            stride=(g.SH, g.SW), padding=(g.PH, g.PW), dilation=(g.DH, g.DW), groups=1,
        ))  # fmt: skip

    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_pre_hook(note)
    model(images)
    return list(dict.fromkeys(layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """Of a layer's chains, or of a pool's."""

    x: torch.Tensor
    """(N, Ci, H, W)"""
    w: torch.Tensor
    """(Co, Ci/groups, R, S)"""
    bias: torch.Tensor
    """(Co,)"""
    y: torch.Tensor
    """The chain's result after its ReLU, which is what is kept of it: (N, Co, P, Q); before a pool, (N, C, H, W)."""
    dy: torch.Tensor
    """(N, Co, P, Q)"""
    index: torch.Tensor | None = None
    """Our pool's winners, (N, C, P, Q)."""
    native_index: torch.Tensor | None = None
    """PyTorch's."""

    @classmethod
    def of(cls, chain: Chain, device: torch.device | str) -> "Operands":
        """Normal values, the same at each call; meta tensors have none."""
        g = chain.geometry
        is_pool = chain.name in OF_POOLS
        shapes = {"x": g.x_shape, "w": g.w_shape, "y": g.x_shape if is_pool else g.y_shape, "dy": g.y_shape}
        if str(device) == "meta":
            made = {name: runtime.meta_channels_last(shape, chain.dtype) for name, shape in shapes.items()}
            index = runtime.meta_channels_last(g.y_shape, index_dtype(chain.pool)) if is_pool else None
            return cls(**made, bias=torch.empty(g.Co, dtype=chain.dtype, device="meta"), index=index)
        generator = torch.Generator(device).manual_seed(0)
        made = {
            name: torch.randn(shape, generator=generator, device=device).to(chain.dtype, memory_format=LAST)
            for name, shape in shapes.items()
        }
        made["y"] = made["x"].relu() if is_pool else made["y"].relu_()
        bias = torch.randn(g.Co, generator=generator, device=device).to(chain.dtype)
        found = cls(**made, bias=bias)
        if chain.name == "relu_max_pool_grad":
            return replace(
                found,
                index=max_pool(found.x, chain.pool, relu=True)[1],
                native_index=aten.max_pool2d_with_indices(found.y, *_window(chain))[1],
            )
        return found

    def double(self) -> "Operands":
        names = ("x", "w", "bias", "y", "dy")
        return replace(self, **{name: getattr(self, name).double() for name in names})


def ours(chain: Chain, operands: Operands) -> Results:
    """By the fused kernels."""
    o, g, precision = operands, chain.geometry, chain.precision
    if chain.name == "conv_relu":
        return (forward(o.x, o.w, o.bias, g, relu=True, precision=precision),)
    if chain.name == "conv_relu_grad":
        dx = [input_grad(o.dy, o.w, g, mask=o.y, precision=precision)] if chain.asks_for_dx else []
        return (*dx, weight_grad(o.dy, o.x, g, mask=o.y, precision=precision), bias_grad(o.dy, mask=o.y))
    if chain.name == "relu_max_pool":
        return max_pool(o.x, chain.pool, relu=True)[:1]
    if chain.name == "relu_max_pool_grad":
        return (max_pool_grad(o.dy, o.index, chain.pool),)
    return (bias_grad(o.dy),)


def unfused(chain: Chain, operands: Operands) -> Results:
    """By our kernels and PyTorch's ReLU, of a chain that `has_unfused`."""
    o, g, precision = operands, chain.geometry, chain.precision
    if chain.name == "conv_relu":
        return (forward(o.x, o.w, o.bias, g, precision=precision).relu_(),)
    dy = aten.threshold_backward(o.dy, o.y, 0)
    dx = [input_grad(dy, o.w, g, precision=precision)] if chain.asks_for_dx else []
    return (*dx, weight_grad(dy, o.x, g, precision=precision), bias_grad(dy))


def native(chain: Chain, operands: Operands) -> Results:
    """By PyTorch: cuDNN on a GPU, where `operations.precision_of` opens the switch for TF32."""
    o, layer = operands, chain.layer
    geometry = layer.stride, layer.padding, layer.dilation
    if chain.name == "conv_relu":
        return (nn.functional.conv2d(o.x, o.w, o.bias, *geometry, layer.groups).relu_(),)
    if chain.name == "conv_relu_grad":
        dy = aten.threshold_backward(o.dy, o.y, 0)
        gradients = aten.convolution_backward(
            dy, o.x, o.w, [layer.w_shape[0]], *geometry, False, [0, 0], layer.groups, [chain.asks_for_dx, True, True]
        )
        return tuple(gradient for gradient in gradients if gradient is not None)
    if chain.name == "relu_max_pool":
        # In place, as models do: of operands that were already rectified, which takes no other time.
        return aten.max_pool2d_with_indices(o.y.relu_(), *_window(chain))[:1]
    if chain.name == "relu_max_pool_grad":
        dy = aten.max_pool2d_with_indices_backward(o.dy, o.y, *_window(chain), False, o.native_index)
        return (aten.threshold_backward(dy, o.y, 0),)
    return (o.dy.sum((0, 2, 3)),)


def _window(chain: Chain) -> tuple:
    """Window, stride, padding and dilation, as PyTorch takes them."""
    g = chain.pool
    return (g.R, g.S), (g.SH, g.SW), (g.PH, g.PW), (g.DH, g.DW)


def launch(chain: Chain) -> None:
    """Ours, fused and not, on meta tensors."""
    operands = Operands.of(chain, "meta")
    ours(chain, operands)
    if chain.has_unfused:
        unfused(chain, operands)
