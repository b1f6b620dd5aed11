"""The list of rows, the same on a GPU and on the CPU but for sizes: who computes what, in which type.

    operations    one layer's forward, input_grad, weight_grad, and step: all of them and the bias's, through autograd
    fused         what SimpleNet's fused operators replace: bench.gpu_check.chains says which
    train steps   whole training steps of each model

Every layer is timed in float32. The other types cost as much again each, and have the two layers that differ most:
SimpleNet's stem, 3 channels and a stride, which memory bounds, and its 3x3 of 64 channels, which the products do. So
have the peers. The fused operators are timed in float32 and float16, the steps in float32 and, with autocast, in
float16; a CPU computes float16 so slowly that it does SimpleNet's alone.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import models
from bench import peers
from bench.gpu_check.chains import OF_CONVOLUTIONS, OF_POOLS, Chain, pool_layers
from bench.gpu_check.steps import LAST, StepCase
from bench.rows import MODEL, SIZES, TOLERANCE
from bench.shapes import TIMED, Layer, timed_layers
from kernels.fusion import fusion_report
from train.rehearsal import UNFUSED
from train.report import backend_of

OPERATIONS = ("forward", "input_grad", "weight_grad", "step")
FUSED = (*OF_CONVOLUTIONS, *OF_POOLS)
IN_EVERY_KIND = ("conv7x7-64-s2", "conv3x3-64")
"""The two layers of SimpleNet that differ most."""
OTHERS = 10
"""cuDNN's weight gradients were wrong by up to 2.5e-5 in float32 and 1.1e-3 in float16 on an H100."""
SLOWEST_ALLOWED = {"simplenet": 1.0}
"""The most that triton's time may be of PyTorch's, on a GPU: the aim for the operations of this model's layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What a row is computed in."""

    name: str
    dtype: torch.dtype
    precision: str = "ieee"
    """"tf32" where float32 is multiplied by tensor cores, rounded to TF32."""

    def missing(self, device: torch.device) -> str | None:
        """Why `device` cannot compute in it; None where it can."""
        if self.precision == "ieee":
            return None
        if device.type != "cuda":
            return "TF32 is multiplied by GPUs' tensor cores"
        return None if torch.cuda.get_device_capability(device) >= (8, 0) else "this GPU has no TF32"


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="float32", dtype=torch.float32), Kind(name="tf32", dtype=torch.float32, precision="tf32"),
        Kind(name="float16", dtype=torch.float16), Kind(name="bfloat16", dtype=torch.bfloat16),
    )
}  # fmt: skip
AMP = "fp16 amp"
STEP_KINDS = {"float32": "fp32", AMP: "fp16"}
"""A step's kind as the tables have it, and as gpu_check.steps does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What one contender computes in one row."""

    group: str
    contender: str
    kind: str
    """Of KINDS; of a step, of STEP_KINDS."""
    model: str
    subject: Layer | Chain | StepCase
    """An operation's layer, a chain of operators, or a whole step."""

    @property
    def layer(self) -> Layer | None:
        """None of a whole step."""
        if isinstance(self.subject, StepCase):
            return None
        return self.subject.layer if isinstance(self.subject, Chain) else self.subject

    @property
    def layout(self) -> torch.memory_format:
        """Of the tensors that are given; a chain's are channels-last for everybody."""
        return torch.channels_last if isinstance(self.subject, Chain) else layout(self.contender)

    @property
    def what(self) -> str:
        return self.model if self.layer is None else f"{self.model} {self.layer.label}"

    @property
    def target(self) -> float | None:
        return SLOWEST_ALLOWED.get(self.model) if self.group in OPERATIONS else None

    @property
    def tolerance(self) -> float:
        """How wrong its result may be, `rows.TOLERANCE`; of PyTorch's and peers', which are here to be compared with
        and choose their own algorithms, OTHERS times that."""
        theirs = plain(self.contender) == "torch" or self.contender in peers.CONVOLUTIONS
        return TOLERANCE[self.kind] * (OTHERS if theirs else 1)

    def label(self, device: torch.device) -> str:
        """For the row's id: contender, its backend, model, layer, kind."""
        parts = (self.contender, backend(self.contender, device), *self.what.split(), self.kind.replace(" ", "_"))
        return "-".join(parts)

    def facts(self, device: torch.device) -> dict:
        """What the row's figures depend on, as plain types."""
        images, pixels = SIZES[device.type]
        layer = self.layer
        step = isinstance(self.subject, StepCase)
        return {
            "model": self.model, "layer": layer and layer.label, "conv": self.contender,
            "backend": backend(self.contender, device), "kind": self.kind,
            "dtype": "float32" if step else str(KINDS[self.kind].dtype).removeprefix("torch."),
            "amp": "fp16" if self.kind == AMP else "off",
            "precision": "ieee" if step else KINDS[self.kind].precision,
            "layout": str(self.layout).removeprefix("torch."),
            "batch_size": images, "image_size": pixels,
            "x_shape": layer.x_shape if layer else (images, 3, pixels, pixels),
            **{
                name: getattr(layer, name) if layer else None
                for name in ("w_shape", "stride", "padding", "dilation", "groups")
            },
        }  # fmt: skip


def backend(contender: str, device: torch.device) -> str:
    """"native", "compiled" or "interpreter"; a peer of bench.peers is compiled by its own package."""
    return "compiled" if contender in peers.CONVOLUTIONS else backend_of(plain(contender), device)


def why_not(case: Case, device: torch.device) -> str | None:
    """Why the row cannot be timed on `device`, in one line; None where it can."""
    if refusal := getattr(models.CONVOLUTIONS.get(plain(case.contender)), "refusal", None):
        return refusal  # of a variant whose file cannot be used
    if case.contender in peers.CONVOLUTIONS:
        return peers.why_no_convolution(case.contender, device)
    if case.kind == AMP:
        slow = device.type != "cuda" and case.model != MODEL
        return f"float16 is slow on a CPU: {MODEL}'s step alone has it there" if slow else None
    return KINDS[case.kind].missing(device)


def plain(contender: str) -> str:
    """Its convolution, of models.CONVOLUTIONS or a peer's: without what is said about layout or fusion."""
    return contender.removesuffix(UNFUSED).removesuffix(LAST)


def layout(contender: str) -> torch.memory_format:
    """Of the tensors it is given."""
    if contender.endswith(LAST):
        return torch.channels_last
    if contender in peers.CONVOLUTIONS:
        return peers.CONVOLUTIONS[contender].layout
    return models.memory_format(plain(contender))


def convolution(contender: str) -> type[nn.Conv2d]:
    peer = peers.CONVOLUTIONS.get(contender)
    return peer.module if peer else models.CONVOLUTIONS[plain(contender)]


def operation_cases(operation: str, device_type: str) -> list[Case]:
    """Of one of OPERATIONS, on "cuda" or "cpu"."""
    found = []
    for model in TIMED:
        for layer in timed_layers(model, *SIZES[device_type]):
            special = model == MODEL and layer.label in IN_EVERY_KIND
            for kind in KINDS if special else ("float32",):
                others = [
                    name
                    for name, peer in peers.CONVOLUTIONS.items()
                    if special and operation in peer.operations and kind in peer.kinds
                ]
                found += [
                    Case(group=operation, contender=contender, kind=kind, model=model, subject=layer)
                    for contender in (*models.CONVOLUTIONS, f"torch{LAST}", *others)
                ]
    return found


def fused_cases(name: str, device_type: str) -> list[Case]:
    """Of one of FUSED."""
    chains = [
        (kind, Chain(layer=layer, name=name, dtype=KINDS[kind].dtype, precision="ieee"))
        for layer in (pool_layers if name in OF_POOLS else timed_layers)(MODEL, *SIZES[device_type])
        for kind in ("float32", "float16")
    ]
    return [
        Case(group=name, contender=contender, kind=kind, model=MODEL, subject=chain)
        for kind, chain in chains
        for contender in ("torch", *([f"triton{UNFUSED}"] if chain.has_unfused else []), "triton")
    ]


def step_cases(group: str, device_type: str) -> list[Case]:
    """Of each model."""
    images, pixels = SIZES[device_type]
    return [
        Case(
            group=group, contender=contender, kind=kind, model=model,
            subject=StepCase(model=model, kind=STEP_KINDS[kind], batch_size=images, image_size=pixels),
        )
        for model in models.MODELS
        for kind in STEP_KINDS
        for contender in (*models.CONVOLUTIONS, f"torch{LAST}", *([f"triton{UNFUSED}"] if fuses(model) else []))
    ]  # fmt: skip


@cache
def fuses(model: str) -> bool:
    """Whether `kernels.fuse` finds anything in it."""
    with torch.device("meta"):
        return bool(fusion_report(models.build(model, "triton", fuse=False)).chains)
