"""The report's section on memory: where it goes, and why unfolding takes more."""

import contextlib
from typing import Any

from bench.measure.predict import MIB
from bench.reproduce.accuracy import NAMES, NO_SUCH_RUN, writeups
from bench.reproduce.page import table
from bench.reproduce.plan import CONVOLUTIONS, MEASURED, MEMORY, TIMELINE, run_name
from bench.reproduce.results import Missing, Results, cell

REASONS = 3
"""Of the differences between two convolutions, so many of the largest are told."""


def memory(results: Results) -> list[str]:
    """Section 4."""
    try:
        reports = {report["model"]: report for report in results.json(MEMORY, "memory.json")["reports"]}
        reason = ""
    except Missing as missing:
        reports, reason = {}, f"not available: {missing}"
    rows = []
    for name, shown in NAMES.items():
        for conv in CONVOLUTIONS:
            entry = reports[name]["convolutions"][conv] if reports else None
            theirs = writeups(name, conv)
            rows.append([
                shown, conv, mib(entry["peak"]) if entry else reason, between(entry["process"]) if entry else reason,
                measured(results, name, conv), f"{theirs.mib:,}" if theirs else NO_SUCH_RUN,
                trained(results, name, conv),
            ])  # fmt: skip
    return [
        "The write-up's step: batch 256, 128 px, float32, SGD with momentum. Live bytes at the peak, and the process "
        "in nvidia-smi on a Tesla T4, are **predicted**: accounted on meta tensors and replayed through a model of "
        "PyTorch's allocator, with the context as a range. **Measured** is what NVML said of that step on the GPU of "
        "this report. The write-up's are averages in nvidia-smi on its T4. The last column is what the trainings of "
        "this report took. All in MiB.",
        table(
            ("model", "convolution", "live, predicted", "process, T4, predicted", "NVML, measured", "write-up",
             "these trainings, measured"), rows, words=2,
        ),
        f"These trainings: {kinds(results)}; at their own batch size, image size and data.",
        *why(reports),
        results.figure(TIMELINE, "memory.png", "SimpleNet's live bytes over one step (predicted)"),
    ]  # fmt: skip


def measured(results: Results, model: str, conv: str) -> str:
    """NVML's figure for the write-up's step."""
    if results.scope.device != "cuda":
        return "not available: no GPU here"

    def figure() -> str:
        for report in results.json(MEASURED, "memory-gpu.json")["reports"]:
            if report["model"] == model:
                found = report["convolutions"][conv]["measured"] or {"error": report["not_measured_because"]}
                if found.get("nbytes"):
                    return mib(found["nbytes"])
                raise Missing(found.get("error") or found["source"])
        raise Missing("that model is not in it")

    return cell(figure)


def trained(results: Results, model: str, conv: str) -> str:
    """What the run's summary says, of `kinds`."""

    def figure() -> str:
        entry = results.run(run_name(model, conv)).summary["memory"]
        if entry["mib"] is None:
            raise Missing("no sample was taken")
        return f"{entry['mib']:,.0f}"

    return cell(figure)


def kinds(results: Results) -> str:
    """What the trainings' figures are of."""
    found = []
    for name in NAMES:
        for conv in CONVOLUTIONS:
            with contextlib.suppress(Missing):
                found.append(results.run(run_name(name, conv)).summary["memory"]["kind"])
    return " or ".join(dict.fromkeys(found)) or "not available: no training ended well"


def why(reports: dict[str, Any]) -> list[str]:
    """Where SimpleNet's convolutions differ at their peaks, the largest parts first."""
    if not reports:
        return []
    blocks = [
        "The write-up guesses why 3,113 became 4,881. SimpleNet's predicted peaks part by part, against nn.Conv2d's:"
    ]
    for difference in reports["simplenet"]["differences"]:
        items = sorted(difference["items"], key=lambda item: -abs(item[0]))[:REASONS]
        parts = "".join(f"\n- {size / MIB:+,.0f} MiB: {what}" for size, what in items)
        total = f"{difference['nbytes'] / MIB:+,.0f} MiB at the peak ({difference['where']})"
        blocks.append(f"{difference['conv']}, {total}; its largest parts:\n{parts}")
    for conv in CONVOLUTIONS:
        if told := reports["simplenet"]["convolutions"][conv]["gap_to_writeup"]:
            blocks.append(f"What is left to explain of the write-up's figure for {conv}: {told}.")
    return blocks


def mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.0f}"


def between(nbytes: list[int]) -> str:
    low, high = nbytes
    return mib(low) if low == high else f"{mib(low)}–{mib(high)}"
