"""GPU memory over a run, as nvidia-smi would show it: mean and peak for each phase, by NVML.

    recorder = Recorder(str(torch.cuda.get_device_properties(0).uuid), period=0.01)
    with recorder:                             # or @recorder above a function
        model = build().cuda()
        recorder.mark("model built")           # what was done since the mark before, or since the beginning
        for x, y in batches:
            loss = criterion(model(x), y)
            recorder.mark("forward")
            ...
    recorder.recording.phases["forward"].used.peak

It never stops the program it watches: where NVML is missing or fails on the way, the recording says so, and phases
have their times alone.

Marks are moments of the host. PyTorch takes memory when the host queues a kernel, so memory needs no synchronising;
times of phases do.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from bench.measure.nvml import Gpu, GpuConditions, GpuMemory, NvmlUnavailable, open_gpu

T = TypeVar("T")

REST = "rest"
"""The phase from the last mark to the end."""

CURVE_POINTS = 10_000
"""The curve is thinned to half of its points whenever it has more: a day at 10 ms would be 9 million."""

PATIENCE = 5.0
"""Seconds that the sampling thread's last call to NVML may take, which hangs where a driver does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """One figure over a stretch of time, in bytes."""

    samples: int
    mean: float
    """Over the samples, whatever time lies between them."""
    peak: int
    """The highest sample; what came and went between two samples is not seen."""
    peak_at: float
    """Seconds from the recording's beginning to the first sample of that height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """All stretches of one name together; times are seconds from the recording's beginning."""

    stretches: int
    """How often it was marked."""
    begin: float
    """Of its first stretch."""
    end: float
    """Of its last one."""
    seconds: float
    """In all its stretches together."""
    used: Usage | None
    """Of the device, all processes together; None without a sample."""
    process: Usage | None
    """Of this process; None where no sample could tell, as before it first touches the GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """What was seen. `dataclasses.asdict` makes it JSON."""

    unavailable: str | None
    """Why there are no figures at all, in one line."""
    started: str
    """Date and time, ISO 8601."""
    period: float | None
    """Seconds from sample to sample at least; None where only marks took samples."""
    overall: Phase
    phases: dict[str, Phase]
    """In the order of their first marks; REST is last."""
    first: GpuMemory | None
    """At the beginning."""
    before: GpuConditions | None
    after: GpuConditions | None
    curve: tuple[tuple[float, int, int | None], ...]
    """Seconds, bytes used, bytes of this process; evenly thinned, so that `Usage.peak` may be higher."""
    notes: dict[str, int]
    """Each note of GpuMemory that samples had: how many had it."""
    failures: dict[str, int]
    """Each way in which NVML failed after the beginning: how often."""


@dataclass(slots=True)
class _Sum:
    """A Usage in the making."""

    samples: int = 0
    total: int = 0
    peak: int = -1
    peak_at: float = 0.0

    def add(self, other: "_Sum") -> None:
        if other.peak > self.peak:
            self.peak, self.peak_at = other.peak, other.peak_at
        self.samples += other.samples
        self.total += other.total

    def usage(self) -> Usage | None:
        if self.samples == 0:
            return None
        mean = self.total / self.samples
        return Usage(samples=self.samples, mean=mean, peak=self.peak, peak_at=self.peak_at)


@dataclass(slots=True)
class _Stretch:
    """A Phase in the making."""

    begin: float = 0.0
    end: float = 0.0
    seconds: float = 0.0
    stretches: int = 0
    used: _Sum = field(default_factory=_Sum)
    process: _Sum = field(default_factory=_Sum)

    def add(self, other: "_Stretch") -> None:
        self.end = other.end
        self.seconds += other.seconds
        self.stretches += 1
        self.used.add(other.used)
        self.process.add(other.process)

    def phase(self) -> Phase:
        return Phase(
            stretches=self.stretches, begin=self.begin, end=self.end, seconds=self.seconds,
            used=self.used.usage(), process=self.process.usage(),
        )  # fmt: skip


class Recorder(contextlib.ContextDecorator):
    """Follows one GPU's memory while it is open, as a context or around a decorated function; see the module.

    `uuid` is as for `gpu_memory`. Every mark takes a sample; with a period (seconds) a thread takes more between them.
    Each opening begins a new recording. Raises ValueError for a period that is not above 0.
    """

    def __init__(self, uuid: str | None = None, *, period: float | None = 0.01) -> None:
        if period is not None and not period > 0:
            raise ValueError(f"period must be above 0 seconds or None, not {period}")
        self.uuid = uuid
        self.period = period
        self._run: _Run | None = None
        self._open = False

    def __enter__(self) -> "Recorder":
        """Raises RuntimeError if it is open already, as where a decorated function calls itself."""
        if self._open:
            raise RuntimeError("this Recorder is recording already")
        self._run = _Run(self.uuid, self.period)
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self._run.close()

    def mark(self, name: str) -> None:
        """Says that what was done since the mark before, or since the beginning, is called `name`.

        A name that comes again adds to its phase. Raises RuntimeError if the recorder is not open.
        """
        if not self._open:
            raise RuntimeError(f'mark("{name}") while nothing is being recorded')
        self._run.mark(name)

    @property
    def recording(self) -> Recording:
        """What was seen; while the recorder is open, up to the last mark. Raises RuntimeError before it was opened."""
        if self._run is None:
            raise RuntimeError("nothing has been recorded yet")
        return self._run.recording()


class _Run:
    """One recording in the making, with NVML open and the sampling thread, both until `close`."""

    def __init__(self, uuid: str | None, period: float | None) -> None:
        self.period = period
        self.started = datetime.now().astimezone().isoformat(timespec="milliseconds")
        self.zero = time.monotonic()
        self.current, self.overall = _Stretch(), _Stretch()
        self.phases: dict[str, _Stretch] = {}
        self.curve: list[tuple[float, int, int | None]] = []
        self.taken, self.stride = 0, 1
        self.notes: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.gpu: Gpu | None = None
        self.unavailable: str | None = None
        self.session = contextlib.ExitStack()
        try:
            self.gpu = self.session.enter_context(open_gpu(uuid))
        except NvmlUnavailable as reason:
            self.unavailable = str(reason)
        self.before, self.after = self.conditions(), None
        self.first = self.sample()
        self.thread = threading.Thread(target=self.follow, name="nvml-sampling", daemon=True)
        if self.gpu is not None and period is not None:
            self.try_to(self.thread.start)

    def follow(self) -> None:
        """The sampling thread."""
        while not self.stop.wait(self.period):
            self.sample()

    def mark(self, name: str) -> None:
        self.sample()
        self.end_stretch(name)

    def close(self) -> None:
        self.stop.set()
        if self.thread.ident is not None:
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            # Another call would hang too, and NVML must not be closed under this one.
            self.failures["NVML did not return from a call"] += 1
        else:
            self.sample()
            self.after = self.conditions()
            self.session.close()
        self.end_stretch(REST)

    def conditions(self) -> GpuConditions | None:
        return self.try_to(self.gpu.conditions) if self.gpu else None

    def sample(self) -> GpuMemory | None:
        """Asks for the memory and adds it to the stretch of now."""
        at = self.now()
        memory = self.try_to(self.gpu.memory) if self.gpu else None
        if memory is None:
            return None
        with self.lock:
            self.current.used.add(_Sum(1, memory.used, memory.used, at))
            if memory.process is not None:
                self.current.process.add(_Sum(1, memory.process, memory.process, at))
            self.notes.update(memory.notes)
            if self.taken % self.stride == 0:
                self.curve.append((at, memory.used, memory.process))
            self.taken += 1
            if len(self.curve) > CURVE_POINTS:
                del self.curve[1::2]
                self.stride *= 2
        return memory

    def end_stretch(self, name: str) -> None:
        with self.lock:
            ended = self.current
            ended.end = self.now()
            ended.seconds = ended.end - ended.begin
            self.current = _Stretch(begin=ended.end)
            self.overall.add(ended)
            self.phases.setdefault(name, _Stretch(begin=ended.begin)).add(ended)

    def try_to(self, question: Callable[[], T]) -> T | None:
        """The answer, or None and a failure told: whatever goes wrong in here is no reason to stop the user's work."""
        try:
            return question()
        except Exception as error:  # noqa: BLE001
            with self.lock:
                self.failures[str(error) or type(error).__name__] += 1
            return None

    def now(self) -> float:
        return time.monotonic() - self.zero

    def recording(self) -> Recording:
        with self.lock:
            return Recording(
                unavailable=self.unavailable,
                started=self.started,
                period=self.period,
                overall=self.overall.phase(),
                phases={name: stretch.phase() for name, stretch in self.phases.items()},
                first=self.first,
                before=self.before,
                after=self.after,
                curve=tuple(self.curve),
                notes=dict(self.notes),
                failures=dict(self.failures),
            )
