"""The report as plain types: what --json writes and the console shows. Sizes are bytes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from bench.conditions import conditions
from bench.measure.account import CATEGORIES, Account
from bench.measure.predict import ASSUMPTIONS, GpuKind, Prediction
from bench.memory.words import describe, difference, gap_to, peak_place, unfolding_modules
from train import writeup
from train.rehearsal import NUM_CLASSES, Step

PREDICTED = "predicted: accounted on meta tensors, then replayed through a model of PyTorch's allocator"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What is known of one convolution's step."""

    step: Step
    account: Account
    prediction: Prediction
    measured: dict[str, Any] | None
    """By bench.memory.measured, or None without a GPU."""
    largest_batch: dict[str, int] | None
    """{"surely", "perhaps"}: images a step on the GPU predicted for, or None where it was not asked for."""


def make_report(
    results: dict[str, Result], gpu: GpuKind, found: GpuKind | None, reason: str | None
) -> dict[str, Any]:
    """Of one model's `results` by convolution, predicted for `gpu`; `found` is the GPU at hand, `reason` why none is.

    Ratios and differences are to nn.Conv2d, or where that is not among them to the first.
    """
    step = next(iter(results.values())).step
    conv = "torch" if "torch" in results else next(iter(results))
    reference = results[conv]
    return {
        "model": step.model,
        "batch_size": step.batch_size,
        "image_size": step.image_size,
        "num_classes": NUM_CLASSES,
        "dtype": dtype_of(step),
        "recipe": "writeup",
        "label": PREDICTED,
        "gpu": dataclasses.asdict(gpu),
        "reference": conv,
        "convolutions": {name: entry(result, reference) for name, result in results.items()},
        "differences": [
            dataclasses.asdict(difference(name, result.account, conv, reference.account))
            for name, result in results.items()
            if name != conv
        ],
        "assumptions": {name: text for name, text in ASSUMPTIONS.items() if name != "cudnn" or "torch" in results},
        "measured_on": found.name if found else None,
        "not_measured_because": reason,
        "conditions": conditions(torch.device("cuda", 0) if found else torch.device("cpu")),
    }


def entry(result: Result, reference: Result) -> dict[str, Any]:
    """One convolution's part of the report."""
    peak = result.account.peak
    theirs = writeup_mib(result.step)
    unfolding, curve = unfolding_modules(result.account), list(result.account.curve())
    return {
        "peak": peak.nbytes,
        "at_peak": peak.by_category(),
        "peak_is_in": peak_place(result.account),
        "ratio": round(peak.nbytes / reference.account.peak.nbytes, 4),
        "phases": {
            name: {"peak": phase.peak.nbytes, "at_peak": phase.peak.by_category(), "end": phase.end.nbytes}
            for name, phase in result.account.phases.items()
        },
        "timeline": {category: [moment[category] for moment in curve] for category in CATEGORIES},
        "live_at_peak": [
            {
                "category": storage.category, "module": storage.module, "operator": storage.operator,
                "nbytes": storage.nbytes, "what": describe(storage, unfolding),
            }
            for storage in sorted(peak.live, key=lambda storage: -storage.nbytes)
        ],
        **{name: list(dataclasses.astuple(value)) for name, value in _ranges(result.prediction).items()},
        "largest_batch": result.largest_batch,
        "measured": result.measured,
        "writeup_nvidia_smi_mib": theirs,
        "gap_to_writeup": gap_to(theirs, result.prediction.reserved) if theirs else None,
    }


def _ranges(prediction: Prediction) -> dict[str, Any]:
    return {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}


def dtype_of(step: Step) -> str:
    return "float32" if step.amp == "off" else f"float32 with autocast to {step.amp}"


def writeup_mib(step: Step) -> int | None:
    """What nvidia-smi showed the write-up for this step on its Tesla T4, or None where it made another."""
    as_theirs = (step.batch_size, step.image_size, step.amp) == (writeup.BATCH_SIZE, writeup.IMAGE_SIZE, "off")
    # A fine-tuned network takes what a new one does.
    theirs = writeup.figures_for(step.model, step.conv, fine_tuned=True)
    return theirs.mib if as_theirs and theirs and theirs.conv == step.conv else None
