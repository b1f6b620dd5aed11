"""One operation of one layer, ours and PyTorch's, on the same channels-last operands."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.rows import MODEL, SIZES
from bench.shapes import Layer, conv_layers, timed_layers
from kernels import few_channels, runtime, tiles
from kernels.forward import forward
from kernels.geometry import ConvGeometry
from kernels.input_grad import input_grad
from kernels.tiles import Tile
from kernels.weight_grad import weight_grad

OPS = ("forward", "input_grad", "weight_grad")
LAST = torch.channels_last


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is tuned for, or timed."""

    layer: Layer
    op: str
    """One of OPS."""
    dtype: torch.dtype
    precision: str
    """"ieee" or "tf32"."""

    @property
    def geometry(self) -> ConvGeometry:
        layer = self.layer
        return ConvGeometry.of(
            layer.x_shape, layer.w_shape, layer.stride, layer.padding, layer.dilation, layer.groups
        )  # fmt: skip

    def candidates(self, target: runtime.Target) -> tuple[Tile, ...]:
        op, geometry = few_channels.product_of(self.op, target, self.geometry)
        return tiles.candidates(op, target, geometry, self.dtype, self.precision)

    def row(self) -> dict:
        """As plain types."""
        return {"op": self.op} | told_of(self.layer, self.dtype, self.precision)


def told_of(layer: Layer, dtype: torch.dtype, precision: str) -> dict:
    """A layer's shapes and what it is computed in, as plain types."""
    return {
        "dtype": str(dtype).removeprefix("torch."), "precision": precision,
        "layer": layer.name, "x_shape": list(layer.x_shape), "w_shape": list(layer.w_shape),
        "stride": list(layer.stride), "padding": list(layer.padding), "dilation": list(layer.dilation),
        "groups": layer.groups,
    }  # fmt: skip


def cases(arch: str, *, quick: bool) -> list[Case]:
    """Every operation of SimpleNet's layers in fp16, bf16, TF32 and IEEE fp32; TF32 where the GPU has it."""
    layers = (timed_layers if quick else conv_layers)(MODEL, *SIZES["cuda"])
    kinds = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    if int(arch.removeprefix("sm_")) < 80:
        kinds.remove((torch.float32, "tf32"))
    return [
        Case(layer=layer, op=op, dtype=dtype, precision=precision)
        for layer in layers
        for dtype, precision in kinds
        for op in OPS
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """Of all three operations of a layer, channels-last."""

    x: torch.Tensor
    """(N, Ci, H, W)"""
    w: torch.Tensor
    """(Co, Ci/groups, R, S)"""
    dy: torch.Tensor
    """(N, Co, P, Q)"""

    @classmethod
    def of(cls, case: Case, device: torch.device | str) -> "Operands":
        """Normal values, the same at each call; meta tensors have none."""
        g = case.geometry
        shapes = {"x": g.x_shape, "w": g.w_shape, "dy": g.y_shape}
        if str(device) == "meta":
            return cls(**{name: runtime.meta_channels_last(shape, case.dtype) for name, shape in shapes.items()})
        generator = torch.Generator(device).manual_seed(0)
        return cls(**{
            name: torch.randn(shape, generator=generator, device=device).to(case.dtype, memory_format=LAST)
            for name, shape in shapes.items()
        })  # fmt: skip

    def double(self) -> "Operands":
        return Operands(x=self.x.double(), w=self.w.double(), dy=self.dy.double())


def ours(case: Case, operands: Operands) -> torch.Tensor:
    """By the Triton kernels."""
    x, w, dy, g = operands.x, operands.w, operands.dy, case.geometry
    if case.op == "forward":
        return forward(x, w, None, g, precision=case.precision)
    if case.op == "input_grad":
        return input_grad(dy, w, g, precision=case.precision)
    return weight_grad(dy, x, g, precision=case.precision)


def native(case: Case, operands: Operands) -> torch.Tensor:
    """By PyTorch: cuDNN on a GPU, where `precision_of` opens the switch for TF32."""
    x, w, dy, layer = operands.x, operands.w, operands.dy, case.layer
    geometry = layer.stride, layer.padding, layer.dilation
    if case.op == "forward":
        return torch.nn.functional.conv2d(x, w, None, *geometry, layer.groups)
    asked = [case.op == "input_grad", case.op == "weight_grad", False]
    gradients = torch.ops.aten.convolution_backward(
        dy, x, w, None, *geometry, False, [0, 0], layer.groups, asked
    )  # fmt: skip
    return gradients[asked.index(True)]


class Precise(Protocol):
    """Anything that is timed: a Case, a chain, a training step."""

    @property
    def precision(self) -> str:
        """"ieee" or "tf32"."""
        ...


@contextlib.contextmanager
def precision_of(case: Precise, *, benchmark: bool) -> Iterator[None]:
    """While open, cuDNN multiplies float32 as the case says; with `benchmark` it looks for its fastest algorithm.

    Where there is no GPU that flag is left alone: PyTorch's own test helpers, once imported, forbid to set it.
    """
    conv, cudnn = torch.backends.cudnn.conv, torch.backends.cudnn
    before, has_gpu = (conv.fp32_precision, cudnn.benchmark), torch.cuda.is_available()
    try:
        conv.fp32_precision = case.precision
        if has_gpu:
            cudnn.benchmark = benchmark
        yield
    finally:
        conv.fp32_precision = before[0]
        if has_gpu:
            cudnn.benchmark = before[1]


@contextlib.contextmanager
def only(tile: Tile) -> Iterator[None]:
    """While open, every launch takes this tile."""
    candidates = tiles.candidates
    tiles.candidates = lambda *_: (tile,)
    try:
        yield
    finally:
        tiles.candidates = candidates


def launch(case: Case, tile: Tile) -> None:
    """Ours with this tile, on meta tensors."""
    with only(tile):
        ours(case, Operands.of(case, "meta"))
