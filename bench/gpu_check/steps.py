"""Whole training steps, side by side: PyTorch's convolutions, ours, and ours fused with what stands around them."""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from bench.rows import SIZES, TOLERANCE, relative_error
from bench.shapes import Layer, conv_layers
from kernels import runtime
from kernels.bias_grad import bias_grad
from kernels.forward import forward
from kernels.input_grad import input_grad
from kernels.weight_grad import weight_grad
from train.loop import AMP_DTYPES
from train.rehearsal import UNFUSED, Step, Training

MODELS = ("simplenet", "resnet18")
LAST = "-channels-last"
"""Behind "torch": channels-last tensors, as its fp16 kernels want them; else contiguous ones, as in the write-up."""
CONTENDERS = ("torch", f"torch{LAST}", f"triton{UNFUSED}", "triton")
# (precision of float32 convolutions, autocast)
KINDS = {"fp32": ("ieee", "off"), "tf32": ("tf32", "off"), "fp16": ("ieee", "fp16")}
TOLERANCES = {"fp32": TOLERANCE["step"], "tf32": 2e-2, "fp16": 2e-2}
"""How far all gradients may be from float64's; of the shorter types, some ten times what one layer's may."""
TIMES_NATIVE = 5
"""How much further from them than PyTorch's ours may be: batch norms amplify roundings, a ReLU at 0 may fall over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """What is timed."""

    model: str
    kind: str
    """One of KINDS."""
    batch_size: int
    image_size: int

    @property
    def precision(self) -> str:
        return KINDS[self.kind][0]

    @property
    def amp(self) -> torch.dtype | None:
        return AMP_DTYPES[KINDS[self.kind][1]]

    def row(self) -> dict:
        """As plain types."""
        return {
            "step": self.model, "kind": self.kind, "batch_size": self.batch_size, "image_size": self.image_size,
        }  # fmt: skip


def step_cases(arch: str) -> list[StepCase]:
    """The models of MODELS in each of KINDS that the GPU has."""
    batch, size = SIZES["cuda"]
    kinds = [kind for kind in KINDS if kind != "tf32" or int(arch.removeprefix("sm_")) >= 80]
    return [StepCase(model=name, kind=kind, batch_size=batch, image_size=size) for name in MODELS for kind in kinds]


def training(case: StepCase, contender: str, device: torch.device) -> Training:
    """The same weights and images for each contender."""
    torch.manual_seed(0)
    step = Step(
        model=case.model, conv=contender.removesuffix(LAST), batch_size=case.batch_size, image_size=case.image_size,
        amp=KINDS[case.kind][1],
    )  # fmt: skip
    made = Training(step, device)
    if contender.endswith(LAST):
        made.model.to(memory_format=torch.channels_last)
        made.x = made.x.contiguous(memory_format=torch.channels_last)
    return made


def gradients(model: torch.nn.Module, made: Training, amp: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
    """Of one step of `model` on the images of `made`, all in one row."""
    x = made.x.to(dtype)
    with torch.autocast(made.device.type, dtype=amp, enabled=amp is not None):
        logits = model(x)
    loss = cross_entropy(logits if dtype == torch.float64 else logits.float(), made.y)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten().double() for part in parts])


@functools.cache
def exact_gradients(model: str, batch_size: int, image_size: int, device: torch.device) -> torch.Tensor:
    """In float64, of the weights and images that all contenders of all types start from."""
    made = training(
        StepCase(model=model, kind="fp32", batch_size=batch_size, image_size=image_size), CONTENDERS[0], device
    )
    return gradients(made.model.double(), made, None, torch.float64)


def errors(case: StepCase, contenders: dict[str, Training]) -> dict[str, float]:
    """How far the gradients of each contender's first step are from float64's."""
    device = contenders[CONTENDERS[0]].device
    exact = exact_gradients(case.model, case.batch_size, case.image_size, device)
    found = {}
    for name, made in contenders.items():
        statistics = copy.deepcopy(made.model.state_dict())  # which batch norms write at each pass
        found[name] = relative_error(gradients(made.model, made, case.amp, torch.float32), exact)
        made.model.load_state_dict(statistics)
    return found


def host_seconds(made: Training) -> float:
    """What the host needs to queue one step: where it is above the GPU's time, the host is what is timed."""
    begun = time.perf_counter()
    made.step()
    return time.perf_counter() - begun


def launch(layer: Layer, dtype: torch.dtype, precision: str, *, bias: bool) -> None:
    """What a layer launches in a step, on meta tensors: with a bias fused and not, without one not."""
    g = layer.geometry
    x, w, dy, y = (runtime.meta_channels_last(s, dtype) for s in (g.x_shape, g.w_shape, g.y_shape, g.y_shape))
    b = torch.empty(g.Co, dtype=dtype, device="meta") if bias else None
    for fused in (False, True) if bias else (False,):
        mask = y if fused else None
        forward(x, w, b, g, relu=fused, precision=precision)
        if g.Ci > 3:
            input_grad(dy, w, g, mask=mask, precision=precision)
        weight_grad(dy, x, g, mask=mask, precision=precision)
        if bias:
            bias_grad(dy, mask=mask)


def jobs(arch: str) -> list[Callable[[], None]]:
    """`launch` of each of the steps' layers, once."""
    found = [
        (layer, case.amp or torch.float32, case.precision, case.model == "simplenet")
        for case in step_cases(arch)
        for layer in conv_layers(case.model, case.batch_size, case.image_size)
    ]
    return [
        functools.partial(launch, layer, dtype, precision, bias=bias)
        for layer, dtype, precision, bias in dict.fromkeys(found)
    ]
