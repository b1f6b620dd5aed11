"""A whole training step of each model, as train.run makes it by the write-up's recipe, by each convolution.

The gradients of the first step are checked against the same model in float64 before any is timed: they may be as far
from it as `steps.TOLERANCES` allows, or a few times as far as PyTorch's own convolution is in the same layout. Batch
norms amplify roundings, and PyTorch's channels-last one on a CPU makes more of them (CustomNet's gradients are wrong by
4e-3 with it).
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from bench.gpu_check import steps
from bench.gpu_check.steps import LAST, StepCase
from bench.rows import relative_error
from bench.timing_rounds import multiplying
from train.rehearsal import Training


def test_train_step(step_case, device, timed):
    subject = step_case.subject
    made = steps.training(subject, step_case.contender, device)
    native = f"torch{LAST}" if step_case.layout == torch.channels_last else "torch"
    limit = max(steps.TOLERANCES[subject.kind], steps.TIMES_NATIVE * native_error(subject, native, device))
    with multiplying(subject):
        error = error_of(subject, made)
        assert error <= limit, f"{step_case.contender} is wrong by {error:.1e}, so its time means nothing"
        timed([made.step], step_case, error=error)


def error_of(subject: StepCase, made: Training) -> float:
    """How far all gradients of its first step are from float64's."""
    exact = exact_gradients(replace(subject, kind="fp32"), made.device)
    statistics = copy.deepcopy(made.model.state_dict())  # which batch norms write at each pass
    with nothing_dropped(made.model):
        error = relative_error(steps.gradients(made.model, made, subject.amp, torch.float32), exact)
    made.model.load_state_dict(statistics)
    return error


@cache
def exact_gradients(subject: StepCase, device: torch.device) -> torch.Tensor:
    """In float64, of the weights and images that all contenders start from."""
    made = steps.training(subject, "torch", device)
    with nothing_dropped(made.model.double()):
        return steps.gradients(made.model, made, None, torch.float64)


@cache
def native_error(subject: StepCase, native: str, device: torch.device) -> float:
    """`error_of` PyTorch's own convolution, "torch" or "torch-channels-last"."""
    with multiplying(subject):
        return error_of(subject, steps.training(subject, native, device))


@contextlib.contextmanager
def nothing_dropped(model: nn.Module) -> Iterator[None]:
    """While open, SimpleViT keeps every branch: which are dropped depends on the type that is drawn in."""
    drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    for drop in drops:
        drop.eval()
    try:
        yield
    finally:
        for drop in drops:
            drop.train()
