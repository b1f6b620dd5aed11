"""The training step whose memory is accounted for: as train.loop makes it, on real or on meta tensors.

What lies around the step is left out: the next batch, validation, a moving average of the weights. PyTorch's own
convolution is given contiguous tensors, as in the write-up (train.run --no-channels-last).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

import models
from bench.measure.account import INPUT, Account
from bench.measure.meta import StandIn, in_the_role_of
from bench.measure.tracker import Tracker
from train.loop import AMP_DTYPES
from train.optim import make_optimizer
from train.recipes import make_recipe

FORWARD, BACKWARD, OPTIMIZER_STEP = "forward", "backward", "optimizer step"
NUM_CLASSES = 100
UNFUSED = "-unfused"
"""Behind "triton": its convolution alone, with PyTorch's ReLU, max-pool and batch norm."""
CONVOLUTIONS = (*models.LABS, f"triton{UNFUSED}")
STEPS = 3
"""After so many memory is steady: the optimiser's state comes with the first, the allocator settles in the second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One training step to account for."""

    model: str
    """One of models.MODELS."""
    conv: str
    """One of CONVOLUTIONS or models.VARIANTS."""
    batch_size: int
    """Images a step."""
    image_size: int
    """Side of the images in pixels."""
    amp: str = "off"
    """One of train.loop.AMP_DTYPES."""


class Training:
    """The model on `device`, its optimiser by the write-up's recipe, and one batch; `step` trains on it once more.

    `tracker`, if any, is told what everything is; open it around the steps. On meta tensors `role` is what they stand
    for: "cpu", or a GPU's architecture. `on_phase` is called with the name of each phase of a step when it is over.

    Raises ValueError for a model that does not take such images, or one alone, and for a variant that cannot be used.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device | str,
        tracker: Tracker | None = None,
        *,
        role: str | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.role, self.amp = role, AMP_DTYPES[step.amp]
        self.listeners = [tracker.mark] if tracker is not None else []
        self.listeners += [on_phase] if on_phase is not None else []
        conv = step.conv.removesuffix(UNFUSED)
        layout = models.memory_format(conv)
        with self.device:
            model = models.build(step.model, conv, NUM_CLASSES, step.image_size, fuse=conv == step.conv)
            self.model = model.to(memory_format=layout)
            self.x = torch.rand(step.batch_size, 3, step.image_size, step.image_size).contiguous(memory_format=layout)
            self.y = torch.zeros(step.batch_size, dtype=torch.long)
        settings = make_recipe("writeup", step.model, "any", weights="none")
        self.clip = settings.clip
        self.optimizer = make_optimizer(self.model, settings)
        for group in self.optimizer.param_groups:
            group["foreach"] = True  # what a GPU takes by itself; elsewhere it would be another step
        if tracker is not None:
            tracker.watch(self.model, self.optimizer)
            tracker.label((self.x, self.y), INPUT)

    def step(self) -> None:
        """In the order of train.loop.Trainer.train_step; the scaled loss of fp16 is left out, which is one number."""
        with self._precision():
            logits = self.model(self.x)
            loss = cross_entropy(logits.float(), self.y)
        self._end(FORWARD)
        self.optimizer.zero_grad()
        loss.backward()
        self._end(BACKWARD)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self._end(OPTIMIZER_STEP)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.device.type == "meta":
            return StandIn(self.role, amp=self.amp)
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def _end(self, phase: str) -> None:
        for listener in self.listeners:
            listener(phase)


def track(step: Step, device: torch.device | str, *, steps: int = 2) -> Account:
    """The account of really training on `device`; the last of `steps` counts, by which the optimiser has its state."""
    return _account(Tracker(device), steps, lambda tracker: Training(step, device, tracker))


def rehearse(step: Step, role: str, *, multiprocessors: int | None = None, steps: int = 2) -> Account:
    """The same on meta tensors in the role of the CPU ("cpu") or of a GPU ("sm_75"), with so many multiprocessors."""
    with in_the_role_of(role, multiprocessors):
        return _account(Tracker("meta"), steps, lambda tracker: Training(step, "meta", tracker, role=role))


def _account(tracker: Tracker, steps: int, make: Callable[[Tracker], Training]) -> Account:
    """From an empty process on, so that it holds the order in which everything was taken."""
    with tracker:
        training = make(tracker)
        for _ in range(steps):
            tracker.reset_peak()
            training.step()
    return tracker.account
