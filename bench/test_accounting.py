"""What accounting for memory costs: a training step under the tracker, and steps while memory is sampled.

Targets: at most twice the untracked time on a CPU; under 1% of a training for a sample each 10 ms.
"""

import contextlib

import torch

from bench.measure.sampling import Recorder
from bench.measure.tracker import Tracker
from bench.rows import MODEL, SIZES
from train.memory import device_asked
from train.rehearsal import Step, Training

SECTION = "accounting for memory, a SimpleNet training step"
SAMPLED_STEPS = 10
IMAGES = SIZES | {"cpu": (32, 32)}
"""(images, pixels) a step: with fewer images on a CPU, what an operator costs to see would be most of its time."""


def training(conv: str, device: torch.device, tracker: Tracker | None = None) -> Training:
    images, pixels = IMAGES[device.type]
    return Training(Step(model=MODEL, conv=conv, batch_size=images, image_size=pixels), device, tracker)


def test_tracking(conv, device, side_by_side):
    tracker = Tracker(device)
    plain, tracked = training(conv, device), training(conv, device, tracker)

    def track() -> None:
        with tracker:
            tracker.reset_peak(forget=True)
            tracked.step()

    facts = {"conv": conv, "x_shape": tuple(plain.x.shape)}
    side_by_side(SECTION, "one step", {"tracked": track, "untracked": plain.step}, **facts)


def test_sampling(device, side_by_side):
    """A sample each 10 ms, of the driver's figures or of the resident set."""
    steps = training("torch", device)
    recorder = Recorder(period=0.01, open_device=device_asked(device))

    def run(around: contextlib.AbstractContextManager) -> None:
        with around:
            for _ in range(SAMPLED_STEPS):
                steps.step()

    calls = {"sampled": lambda: run(recorder), "not sampled": lambda: run(contextlib.nullcontext())}
    what = f"{SAMPLED_STEPS} steps, a sample each 10 ms"
    side_by_side(SECTION, what, calls, conv="torch", x_shape=tuple(steps.x.shape))
