"""Kernels of the rows that were asked for, compiled by all cores before the first is timed on a GPU."""

from collections.abc import Iterable
from functools import cache, partial

import torch
from torch import nn

import models
from bench.gpu_check import chains, steps
from bench.gpu_check.ahead import Job, compile_all
from bench.gpu_check.chains import Chain
from bench.gpu_check.steps import StepCase
from bench.rows import SIZES
from bench.shapes import conv_layers
from bench.timing_cases import KINDS, Case, plain


def compile_ahead(cases: Iterable[Case], device: torch.device) -> dict[str, int | str]:
    """What `compile_all` says of it; what could not be compiled so is compiled by its first launch."""
    return compile_all(jobs(cases), "sm_{}{}".format(*torch.cuda.get_device_capability(device)))


def jobs(cases: Iterable[Case]) -> list[Job]:
    """Each layer and chain of the Triton rows among `cases`, once."""
    wanted: dict[tuple, Job] = {}
    for case in cases:
        if plain(case.contender) != "triton":
            continue
        subject = case.subject
        if isinstance(subject, Chain):
            wanted[(subject,)] = partial(chains.launch, subject)
        elif isinstance(subject, StepCase):
            for layer in conv_layers(case.model, *SIZES["cuda"]):
                key = (layer, subject.amp or torch.float32, subject.precision, has_bias(case.model))
                wanted[key] = partial(steps.launch, *key[:3], bias=key[3])
        else:
            kind = KINDS[case.kind]
            key = (subject, kind.dtype, kind.precision, True)
            wanted[key] = partial(steps.launch, *key[:3], bias=True)
    return list(wanted.values())


@cache
def has_bias(model: str) -> bool:
    """Whether the model's convolutions have one."""
    with torch.device("meta"):
        convolutions = [m for m in models.build(model, "torch").modules() if isinstance(m, nn.Conv2d)]
    return any(conv.bias is not None for conv in convolutions)
