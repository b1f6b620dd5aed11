"""What a training takes: the memory in metrics.csv, summary.json and the closing table.

    with account:                      # around the training
        ...                            # the steps of an epoch
        account.mark(TRAINING)
        ...                            # its validation
        account.mark(VALIDATION)
        row |= account.end_epoch()

On a GPU the driver (NVML, the source of nvidia-smi) is asked every 10 ms, and PyTorch's allocator tells its own peaks;
on a CPU it is the resident set of the process. All figures are in MiB, of this process (rank 0 of several), and of this
part of the run: since it began, or was resumed, in this process. Nothing in here stops a training.

The mean is what compares with the course write-up's "GPU memory (MiB, average in nvidia-smi)".
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from bench.measure.host import open_host
from bench.measure.nvml import open_gpu
from bench.measure.sampling import REST, Device, Phase, Recorder, Usage

PERIOD = 0.01
"""Seconds from sample to sample, each some 80 µs of a core. On a CPU a shorter peak may go unseen."""

TRAINING, VALIDATION, SAVING = "training steps", "validation", "saving"
"""The phases of a training. SAVING is what lies between two epochs: tables, checkpoints, a line on the console."""

COLUMNS = ("memory_mean_mib", "memory_peak_mib", "allocated_peak_mib", "reserved_peak_mib")
"""Of metrics.csv: mean and peak of what `kind` says, and the peaks of PyTorch's allocator on a GPU."""

PROCESS = "mean GPU memory of the process (NVML)"
DEVICE = "mean GPU memory of the whole device (NVML)"
HOST = "mean resident set of the process (CPU)"
IN_SHORT = {PROCESS: "NVML, this process", DEVICE: "NVML, whole device", HOST: "resident set, CPU"}
"""What mean and peak are of, as "kind" of summary.json says it and as the closing table does.

DEVICE is for where NVML cannot tell processes apart, as in containers: it has other processes' memory in it.
"""

ALLOCATED = "peak of PyTorch's allocated GPU memory"
"""The kind where NVML tells nothing, as of all runs on a GPU before it was asked."""


class MemoryAccount:
    """Follows a training on `device` while it is open, as a context; opened again, it begins anew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorder = Recorder(period=PERIOD, open_device=device_asked(device))
        self.epoch: list[Phase] = []
        self.allocator_peaks: dict[str, float | None] = {}

    def __enter__(self) -> "MemoryAccount":
        self.epoch = []
        self.allocator_peaks = {"allocated_peak_mib": None, "reserved_peak_mib": None}
        if self.device.type == "cuda":
            # Or what an earlier training in this process left in the allocator's cache would count as this one's.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.recorder.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.recorder.__exit__(*exception)

    @property
    def unavailable(self) -> str | None:
        """Why there is neither mean nor peak, in one line."""
        return self.recorder.recording.unavailable

    @property
    def kind(self) -> str:
        """What mean and peak are of, or ALLOCATED; known from the first mark on."""
        overall = self.recorder.recording.overall
        if self.device.type != "cuda":
            return HOST
        if overall.process:
            return PROCESS
        return DEVICE if overall.used else ALLOCATED

    def mark(self, name: str) -> None:
        """Says that what was done since the mark before, or since the beginning, belongs to the phase `name`."""
        stretch = self.recorder.mark(name)
        if name != SAVING:
            self.epoch.append(stretch)

    def end_epoch(self) -> dict[str, float | None]:
        """The row of COLUMNS for the training steps and the validation marked since the last one; None is unknown.

        Of an epoch that was resumed, it has the part since then.
        """
        row = dict(zip(COLUMNS, (*self.figures(self.epoch).values(), None, None), strict=True))
        self.epoch = []
        if self.device.type == "cuda":
            row["allocated_peak_mib"] = mib(torch.cuda.max_memory_allocated(self.device))
            row["reserved_peak_mib"] = mib(torch.cuda.max_memory_reserved(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
            for name, earlier in self.allocator_peaks.items():
                self.allocator_peaks[name] = max(row[name], earlier or 0)
        return row

    def figures(self, phases: Sequence[Phase]) -> dict[str, float | None]:
        """{"mean_mib", "peak_mib"} of these phases together, in this order; None without a sample."""
        usages = self.usages(phases)
        if not usages:
            return {"mean_mib": None, "peak_mib": None}
        mean = sum(usage.samples * usage.mean for usage in usages) / sum(usage.samples for usage in usages)
        return {"mean_mib": mib(mean), "peak_mib": mib(max(usage.peak for usage in usages))}

    def usages(self, phases: Sequence[Phase]) -> list[Usage]:
        """Of what `kind` says, of those of the phases that have a sample of it."""
        usages = (phase.used if self.kind == DEVICE else phase.process for phase in phases)
        return [usage for usage in usages if usage]

    def summary(self) -> dict[str, Any]:
        """The entry "memory" of summary.json; None is unknown, as all is where no epoch was left to train.

        "mib" is the figure that "kind" names, for those who compare runs.
        """
        recording, kind = self.recorder.recording, self.kind
        phases = {name: phase for name, phase in recording.phases.items() if name != REST}
        figures = self.figures(list(phases.values()))
        failures = (f"{failure} ({count} times)" for failure, count in recording.failures.items())
        return {
            "kind": kind,
            "mib": self.allocator_peaks["allocated_peak_mib"] if kind == ALLOCATED else figures["mean_mib"],
            **figures,
            **self.allocator_peaks,
            "phases": {name: self.figures([phase]) for name, phase in phases.items()},
            "samples": sum(usage.samples for usage in self.usages(list(phases.values()))),
            "period_s": recording.period,
            "notes": [*filter(None, [recording.unavailable]), *recording.notes, *failures],
        }


def device_asked(device: torch.device) -> Callable[[], AbstractContextManager[Device]]:
    """Who tells the memory of a training on `device`, for `Recorder`."""
    if device.type != "cuda":
        return open_host
    return lambda: open_gpu(str(torch.cuda.get_device_properties(device).uuid))


def mib(size: float) -> float:
    """Bytes in MiB, to a tenth."""
    return round(size / 2**20, 1)


def describe(memory: dict[str, Any]) -> str:
    """The entry "memory" of a summary.json, of earlier versions too, for the closing table: one or two short lines."""
    if "mean_mib" not in memory:
        return f"{memory['mib']:,.0f} MiB, {memory['kind']}"
    lines = []
    if memory["mean_mib"] is not None:
        lines.append(
            f"{memory['mean_mib']:,.0f} MiB mean, {memory['peak_mib']:,.0f} peak ({IN_SHORT[memory['kind']]})"
        )
    if memory["allocated_peak_mib"] is not None:
        lines.append(
            f"allocator's peaks: {memory['allocated_peak_mib']:,.0f} MiB allocated, "
            f"{memory['reserved_peak_mib']:,.0f} reserved"
        )
    return "\n".join(lines) or "not known"
