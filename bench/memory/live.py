"""--live: the real step on the device at hand, over and over, while its memory is followed on the console."""

import contextlib
import dataclasses

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.measure.account import CATEGORIES
from bench.measure.sampling import Phase, Recorder, Usage
from bench.measure.tracker import Tracker
from bench.memory.colours import COLOURS
from bench.memory.console import mib
from train import shortage
from train.cli import UserError
from train.devices import OutOfMemory, telling_of_memory
from train.memory import DEVICE, HOST, IN_SHORT, PROCESS, device_asked
from train.rehearsal import BACKWARD, FORWARD, OPTIMIZER_STEP, Step, Training
from train.report import device_name

PHASES = (FORWARD, BACKWARD, OPTIMIZER_STEP)


def follow(console: Console, step: Step, steps: int, device: torch.device) -> dict:
    """Makes so many steps and shows them; returns what was seen, in bytes. Raises UserError where they do not fit."""
    tracker = Tracker(device)
    recorder = Recorder(open_device=device_asked(device))
    view = View(step, steps, device, tracker, recorder)
    try:
        with recorder, telling_of_memory("--live"):
            make_steps(console, view)
    except OutOfMemory as error:
        told = shortage.describe(step, device, flag="--batch-size")
        raise UserError(f"{told}; or leave out --live") from error
    console.print(view.closing())
    return view.as_dict()


def make_steps(console: Console, view: "View") -> None:
    tracker, recorder = view.tracker, view.recorder
    training = Training(view.step, view.device, tracker, on_phase=view.phase_ended)
    recorder.mark("set-up")
    live = Live(view, console=console, refresh_per_second=8, transient=True)
    with live if console.is_terminal else contextlib.nullcontext(), tracker:
        for _ in range(view.steps):
            tracker.reset_peak(forget=True)
            training.step()
            view.step_ended()
            if not console.is_terminal:
                console.print(view.line())


class View:
    """What the console shows while it runs; rich asks for it again and again, from a thread of its own."""

    def __init__(self, step: Step, steps: int, device: torch.device, tracker: Tracker, recorder: Recorder) -> None:
        self.step, self.steps, self.device = step, steps, device
        self.tracker, self.recorder = tracker, recorder
        self.done = 0
        self.phase = FORWARD
        self.peak = 0
        self.peaks: dict[str, int] = {}
        self.at_peak = dict.fromkeys(CATEGORIES, 0)

    def phase_ended(self, phase: str) -> None:
        self.recorder.mark(phase)
        self.phase = PHASES[(PHASES.index(phase) + 1) % len(PHASES)]

    def step_ended(self) -> None:
        self.done += 1
        account = self.tracker.account
        for name, phase in account.phases.items():
            self.peaks[name] = max(self.peaks.get(name, 0), phase.peak.nbytes)
        if account.peak.nbytes >= self.peak:
            self.peak, self.at_peak = account.peak.nbytes, account.peak.by_category()

    @property
    def source(self) -> str:
        """What the witness beside the tracker measures."""
        if self.device.type != "cuda":
            return IN_SHORT[HOST]
        return IN_SHORT[PROCESS if self.recorder.recording.overall.process else DEVICE]

    def usage(self, phase: Phase) -> Usage | None:
        """Of what `source` says; never one for the other."""
        return phase.used if self.source == IN_SHORT[DEVICE] else phase.process

    def title(self) -> str:
        step = self.step
        what = f"{step.model}, {step.conv} convolution, batch {step.batch_size}, {step.image_size} px"
        return f"{what}, on {device_name(self.device)}"

    def line(self) -> str:
        usage = self.usage(self.recorder.recording.overall)
        witness = f"; {self.source} {mib(usage.peak)} peak so far" if usage else ""
        return f"step {self.done}/{self.steps}: tracked {mib(self.peak)} MiB at the peak{witness}"

    def __rich__(self) -> Group:
        now, highest = dict(self.tracker.by_category), max(self.peak, self.tracker.now, 1)
        step = min(self.done + 1, self.steps)
        lines = [Text(self.title(), style="bold"), Text(f"step {step}/{self.steps}, {self.phase}")]
        for category in CATEGORIES:
            line = Text(f"{category:19}")
            line.append("█" * round(40 * now[category] / highest), style=COLOURS[category])
            line.append(f" {mib(now[category])}")
            lines.append(line)
        lines.append(Text(f"tracked now {mib(self.tracker.now)}, peak {mib(max(self.peak, self.tracker.now))} MiB"))
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
            lines.append(Text(f"allocator: {mib(allocated)} allocated, {mib(reserved)} reserved"))
        if usage := self.usage(self.recorder.recording.overall):
            lines.append(Text(f"{self.source}: mean {mib(usage.mean)}, peak {mib(usage.peak)} MiB"))
        return Group(*lines)

    def closing(self) -> Group:
        """The table at the end."""
        recording = self.recorder.recording
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("MiB")
        for name in ("tracked peak", f"{self.source}: mean", "peak", "samples"):
            table.add_column(name, justify="right")
        for name, phase in [*recording.phases.items(), ("all", recording.overall)]:
            usage = self.usage(phase)
            tracked = self.peak if name == "all" else self.peaks.get(name)
            seen = (mib(usage.mean), mib(usage.peak), f"{usage.samples:,}") if usage else ("-", "-", "-")
            table.add_row(name, mib(tracked) if tracked else "-", *seen)
        made = ", ".join(f"{category} {mib(size)}" for category, size in self.at_peak.items() if size)
        lines = [Text(f"{self.title()}; {self.steps} steps", style="bold"), table, Text(f"tracked at the peak: {made}")]
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            lines.append(Text(f"allocator's peaks: {mib(torch.cuda.max_memory_allocated(self.device))} MiB allocated, "
                              f"{mib(reserved)} reserved"))
        if recording.unavailable:
            lines.append(Text(f"not measured: {recording.unavailable}"))
        lines += [Text(f"note: {note} ({count:,} samples)") for note, count in recording.notes.items()]
        lines += [Text(f"failed {count:,} times: {failure}") for failure, count in recording.failures.items()]
        return Group(*lines)

    def as_dict(self) -> dict:
        """For --json."""
        recording = self.recorder.recording
        return {
            "label": f"tracked on {device_name(self.device)}",
            "witness": self.source,
            "steps": self.steps,
            "peak": self.peak,
            "at_peak": self.at_peak,
            "phases": self.peaks,
            "recording": dataclasses.asdict(recording),
        }
