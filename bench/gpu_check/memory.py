"""The memory of real training steps on the GPU at hand, each in a process of its own, beside what is predicted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import models
from bench.measure.at_hand import find_gpu
from bench.measure.predict import GpuKind, predict
from bench.memory import measured
from bench.rows import SIZES
from train.rehearsal import CONVOLUTIONS, STEPS, Step, rehearse

QUICK_MODELS = ("simplenet", "resnet18")
REFERENCE = "torch"
FIGURES = {"live": "tracked_peak", "allocated": "allocated_peak", "reserved": "reserved_peak", "nvml": "nbytes"}
"""What a row names them: by the tracker, PyTorch's allocator (twice) and NVML; what `measured.measure` does."""
PREDICTED = {"allocated": "allocated", "reserved": "reserved", "nvml": "process"}
"""Those of FIGURES that are predicted as a range: a field of `Prediction`."""


def steps_of(*, quick: bool) -> list[Step]:
    """Every model with every convolution at the write-up's batch, unfold's and two models left out by `quick`."""
    batch, size = SIZES["cuda"]
    return [
        Step(model=name, conv=conv, batch_size=batch, image_size=size)
        for name in (QUICK_MODELS if quick else models.MODELS)
        for conv in CONVOLUTIONS
        if conv != "unfold" or not quick
    ]


def measure_all(note: Callable[[dict], None], *, quick: bool) -> str | None:
    """A row for each step, as it is measured. The reason why something is wrong, or None."""
    gpu, steps, wrong = find_gpu(), steps_of(quick=quick), []
    references: dict[str, dict[str, int | None]] = {}
    for step in steps:
        told, found = predicted(step, gpu), measured.measure(step)
        row = dataclasses.asdict(step) | {"gpu": gpu.name, "predicted": told}
        if "error" in found:
            wrong.append(f"{step.model} {step.conv}: {found['error']}")
            note(row | {"error": found["error"]})
            continue
        figures = {name: found[field] for name, field in FIGURES.items()}
        if step.conv == REFERENCE:
            references[step.model] = figures
        note(row | {
            "memory": figures, "ratio": ratios(figures, references.get(step.model, {})),
            "as_predicted": as_predicted(figures, told), "source": found["source"],
            "outside_allocator": found["outside_allocator"],
        })  # fmt: skip
    return f"{len(wrong)} steps not measured, the first: {wrong[0]}" if wrong else None


def predicted(step: Step, gpu: GpuKind) -> dict[str, Any]:
    """Bytes by the names of FIGURES: a number for what is live, [from, to] for the others."""
    account = rehearse(step, gpu.arch, multiprocessors=gpu.multiprocessors, steps=STEPS)
    prediction = predict(account, gpu)
    ranges = {name: list(dataclasses.astuple(getattr(prediction, field))) for name, field in PREDICTED.items()}
    return {"live": account.peak.nbytes} | ranges


def ratios(figures: dict[str, int | None], reference: dict[str, int | None]) -> dict[str, float | None]:
    """To the reference's; None for what is not known of either."""
    return {
        name: round(figure / reference[name], 4) if figure is not None and reference.get(name) else None
        for name, figure in figures.items()
    }


def as_predicted(figures: dict[str, int | None], told: dict[str, Any]) -> dict[str, bool]:
    """Of each figure that is known: whether it lies where it was predicted, to the byte or within the range."""
    return {
        name: figure == told[name] if name == "live" else told[name][0] <= figure <= told[name][1]
        for name, figure in figures.items()
        if figure is not None
    }
