"""The step whose memory is accounted for, on real or on meta tensors: as train.loop makes it, or without training.

What lies around the step is left out: the next batch, validation, a moving average of the weights. Unless a run's
settings are given, it is the write-up's: PyTorch's own convolution has contiguous tensors (--no-channels-last).
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
from train.loop import AMP_DTYPES, layout
from train.optim import make_optimizer
from train.recipes import Settings, make_recipe

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


def step_of(settings: Settings, batch_size: int) -> Step:
    """The step of a run with these settings on so many images."""
    unfused = settings.conv == "triton" and not settings.fuse
    return Step(
        model=settings.model, conv=f"{settings.conv}{UNFUSED}" if unfused else settings.conv, batch_size=batch_size,
        image_size=settings.image_size, amp=settings.amp,
    )


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
        settings: Settings | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.role, self.amp = role, AMP_DTYPES[step.amp]
        self.listeners = [tracker.mark] if tracker is not None else []
        self.listeners += [on_phase] if on_phase is not None else []
        conv = step.conv.removesuffix(UNFUSED)
        memory_format = layout(settings) if settings else models.memory_format(conv)
        with self.device:
            model = models.build(step.model, conv, NUM_CLASSES, step.image_size, fuse=conv == step.conv)
            self.model = model.to(memory_format=memory_format)
            x = torch.rand(step.batch_size, 3, step.image_size, step.image_size)
            self.x = x.contiguous(memory_format=memory_format)
            self.y = torch.zeros(step.batch_size, dtype=torch.long)
        settings = settings or make_recipe("writeup", step.model, "any", weights="none")
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


class Validation(Training):
    """Logits of the batch in evaluation mode, and nothing kept for a gradient."""

    @torch.no_grad()
    def step(self) -> None:
        self.model.eval()
        with self._precision():
            self.model(self.x).float()
        self._end(FORWARD)


class Attack(Training):
    """The gradient by the batch of the frozen model in evaluation mode, as each step of an attack takes it."""

    def step(self) -> None:
        self.model.eval().requires_grad_(False)
        x = self.x.detach().requires_grad_()
        with self._precision():
            loss = cross_entropy(self.model(x).float(), self.y)
        self._end(FORWARD)
        torch.autograd.grad(loss, x)
        self._end(BACKWARD)


def track(step: Step, device: torch.device | str, *, steps: int = 2) -> Account:
    """The account of really training on `device`; the last of `steps` counts, by which the optimiser has its state."""
    return _account(Tracker(device), steps, lambda tracker: Training(step, device, tracker))


def rehearse(
    step: Step,
    role: str,
    *,
    multiprocessors: int | None = None,
    steps: int = 2,
    settings: Settings | None = None,
    work: type[Training] = Training,
) -> Account:
    """The same on meta tensors in the role of the CPU ("cpu") or of a GPU ("sm_75"), with so many multiprocessors.

    `settings` are those of a run, whose optimiser and memory format it then has; `work` is what the step does.
    """
    with in_the_role_of(role, multiprocessors):
        return _account(
            Tracker("meta"), steps, lambda tracker: work(step, "meta", tracker, role=role, settings=settings)
        )


def _account(tracker: Tracker, steps: int, make: Callable[[Tracker], Training]) -> Account:
    """From an empty process on, so that it holds the order in which everything was taken."""
    with tracker:
        training = make(tracker)
        for _ in range(steps):
            tracker.reset_peak()
            training.step()
    return tracker.account
