"""Forward kernels of your own: each file in this folder is one, and its name is a name of --conv.

A variant, kernels/variants/mine.py, holds a Triton kernel, the function that launches it, and one line:

    def forward(x, w, bias, y, geometry, precision): ...         # launches the kernel, which fills y
    Conv2d = conv2d_by(forward)

That makes `--conv mine` and `python -m bench.report_card --op mine`; deleting the file takes both away. Everything but
the forward pass is the lab's: gradients, their derivatives and tangents are those of a convolution, by kernels/ops.py.
docs/your-own-kernel.md writes one from nothing.

A file that cannot be used keeps its name, and whoever uses that name is told why; other names work as before.
"""

import importlib
import pkgutil
import traceback
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from kernels import runtime
from kernels.autocast import autocast
from kernels.geometry import ConvGeometry
from kernels.operators import like, operator
from kernels.ops import Convolution, precision_for

Launch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, ConvGeometry, str], None]

OPERATIONS: set[str] = set()
"""Names of variants that `kernels.runtime.compile_ahead` knows; each is a forward pass, with a bias."""


class Variant(nn.Conv2d):
    """`torch.nn.Conv2d` whose forward pass is a variant's: same constructor, parameters and state_dict.

    Raises NotImplementedError for padding by name and padding modes other than zeros, and ValueError, with the reason,
    where the variant's file cannot be used.
    """

    memory_format: ClassVar[torch.memory_format]
    """The layout of x, w and y as the launcher gets them, and the one that its models run in."""
    refusal: ClassVar[str | None] = None
    """Which file cannot be used, and why."""

    def __init__(self, *args, **kwargs) -> None:
        if self.refusal is not None:
            raise ValueError(self.refusal)
        super().__init__(*args, **kwargs)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise NotImplementedError(
                f"a variant pads with zeros, so many pixels: got padding {self.padding!r}, mode {self.padding_mode!r}"
            )


def conv2d_by(forward: Launch, *, memory_format: torch.memory_format = torch.channels_last) -> type[Variant]:
    """The `Conv2d` class of a variant whose forward pass is `forward`, a function of the variant's own file.

    forward(x, w, bias, y, geometry, precision)   launches kernels that write y (N, Co, P, Q), which is not empty; x (N,
                                                  Ci, H, W), w (Co, Ci/groups, R, S) and y lie in `memory_format`, bias
                                                  (Co,) or None is dense; all of one dtype of `runtime.DTYPES` on one
                                                  device. precision is "ieee" or "tf32" and concerns float32 alone

    Registers what `runtime.compile_ahead` calls by the file's name. Raises ValueError where another operation has it,
    and for a function of no file here.
    """
    folder, _, name = forward.__module__.rpartition(".")
    if folder != __name__:
        raise ValueError(f"conv2d_by takes a function that is defined in kernels/variants, got one of {folder or name}")
    is_channels_last = memory_format == torch.channels_last
    lay = runtime.channels_last if is_channels_last else runtime.dense

    def run(
        x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geometry: ConvGeometry, precision: str
    ) -> torch.Tensor:
        y = runtime.empty(geometry.y_shape, "output", dtype=x.dtype, device=x.device, memory_format=memory_format)
        if y.numel() > 0:
            bias = bias if bias is None else runtime.dense(bias, "dense bias")
            forward(lay(x, "laid-out input"), lay(w, "laid-out weight"), bias, y, geometry, precision)
        return y

    @runtime.operation(name)
    def _ahead(geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> torch.Tensor:
        x, w = (
            torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
            for shape in (geometry.x_shape, geometry.w_shape)
        )
        return run(x, w, torch.empty(geometry.Co, dtype=dtype, device="meta"), geometry, precision)

    OPERATIONS.add(name)

    def launch(
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> torch.Tensor:
        geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
        return run(x, w, bias, geometry, precision_for(x.dtype))

    def launch_like(x, w, bias, stride, padding, dilation, groups):
        geometry = ConvGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
        return like(x, geometry.y_shape, is_channels_last)

    raw = operator(f"variant_{name}", launch, launch_like)

    class Forward(Convolution):
        """`Convolution`, and so its gradients, with another forward pass."""

        @staticmethod
        def forward(x, w, bias, stride, padding, dilation, groups, relu=False):
            return raw(x, w, bias, stride, padding, dilation, groups)

        @staticmethod
        def vmap(info, in_dims, *operands):
            raise NotImplementedError(f"the variant {name} has no vmap; the lab's own convolution has")

    @torch.compiler.allow_in_graph
    def convolution(x, w, bias, stride, padding, dilation, groups):
        return Forward.apply(x, w, bias, stride, padding, dilation, groups, False)

    def conv2d(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry: Sequence[int] | int
    ) -> torch.Tensor:
        operands = (input, weight, bias)
        if has_torch_function(operands):
            return handle_torch_function(conv2d, operands, *operands, *geometry)
        operands = autocast(operands)
        _check(name, operands)
        return convolution(*operands, *geometry)

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    return type(
        "Conv2d", (Variant,),
        {"__module__": forward.__module__, "memory_format": memory_format, "_conv_forward": _conv_forward},
    )  # fmt: skip


def _check(name: str, operands: tuple) -> None:
    """Raises RuntimeError for operands of several dtypes or devices, and for a dtype that kernels do not compute in."""
    kinds = {(operand.dtype, operand.device) for operand in operands if operand is not None}
    if len(kinds) > 1:
        told = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise RuntimeError(f"{name}: input, weight and bias should be of one dtype on one device, got {told}")
    ((dtype, _),) = kinds
    if dtype not in runtime.DTYPES:
        raise RuntimeError(f"{name}: {dtype} is not supported; supported: {', '.join(map(str, runtime.DTYPES))}")


def find(reserved: Container[str]) -> dict[str, type[Variant]]:
    """{name: its Conv2d} of the files in this folder, by name; of one that cannot be used, a class that tells why.

    None of them may be called what is `reserved`.
    """
    return {name: _load(name, reserved) for name in sorted(found.name for found in pkgutil.iter_modules(__path__))}


def _load(name: str, reserved: Container[str]) -> type[Variant]:
    if name in reserved:
        return _refused(name, f"{name} is a convolution that the lab knows already; give the file another name")
    if not name.isidentifier():
        return _refused(name, "Python cannot import a file of that name; use letters, digits and underscores")
    try:
        found = vars(importlib.import_module(f"{__name__}.{name}")).get("Conv2d")
    except (Exception, SystemExit) as error:  # noqa: BLE001  a variant's file may raise anything
        _withdraw(name)
        return _refused(name, f"{type(error).__name__}: {error}", _line(error, name))
    if not (isinstance(found, type) and issubclass(found, Variant)):
        _withdraw(name)
        return _refused(name, "it has no Conv2d = conv2d_by(...), from kernels.variants")
    return found


def _withdraw(name: str) -> None:
    """Takes back what `conv2d_by` registered before the file turned out to be of no use."""
    if name in OPERATIONS:
        OPERATIONS.remove(name)
        runtime.withdraw_operation(name)


def _refused(name: str, reason: str, where: str = "") -> type[Variant]:
    attributes = {"memory_format": torch.channels_last, "refusal": f"kernels/variants/{name}.py{where}: {reason}"}
    return type("Conv2d", (Variant,), attributes)


def _line(error: BaseException, name: str) -> str:
    """", line 12", the last in the variant's file that led to the error; nothing where that file was not reached."""
    if isinstance(error, SyntaxError):  # its text has the line
        return ""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem == name
    ]
    return f", line {lines[-1]}" if lines else ""
