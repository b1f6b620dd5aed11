"""Memory over a run: mean and peak for each phase, of a GPU as nvidia-smi would show it, or of another device.

    recorder = Recorder(str(torch.cuda.get_device_properties(0).uuid), period=0.01)
    with recorder:                             # or @recorder above a function
        model = build().cuda()
        recorder.mark("model built")           # what was done since the mark before, or since the beginning
        for x, y in batches:
            loss = criterion(model(x), y)
            recorder.mark("forward")
            ...
    recorder.recording.phases["forward"].used.peak

Who is asked is exchangeable: a GPU through NVML unless `open_device` says otherwise, as `host.open_host` does.

It never stops the program it watches: where the device is missing or fails on the way, the recording says so, and
phases have their times alone.

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
from functools import partial
from typing import Protocol, TypeVar

from bench.measure.nvml import GpuConditions, open_gpu

T = TypeVar("T")

REST = "rest"
"""The phase from the last mark to the end."""

CURVE_POINTS = 10_000
"""The curve is thinned to half of its points whenever it has more: a day at 10 ms would be 9 million."""

PATIENCE = 5.0
"""Seconds that the sampling thread's last question may take, which hangs where a driver does."""


class Memory(Protocol):
    """What a device says of one moment, in bytes; a frozen dataclass, as GpuMemory or HostMemory."""

    @property
    def used(self) -> int: ...
    @property
    def process(self) -> int | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


class Device(Protocol):
    """Who is asked. Whatever its methods raise is counted among `Recording.failures`."""

    def memory(self) -> Memory: ...
    def conditions(self) -> GpuConditions | None: ...


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
    first: Memory | None
    """At the beginning."""
    before: GpuConditions | None
    after: GpuConditions | None
    curve: tuple[tuple[float, int, int | None], ...]
    """Seconds, bytes used, bytes of this process; evenly thinned, so that `Usage.peak` may be higher."""
    notes: dict[str, int]
    """Each note of `Memory` that samples had: how many had it."""
    failures: dict[str, int]
    """Each way in which the device failed after the beginning: how often."""


@dataclass(slots=True)
class _Sum:
    """A Usage in the making."""

    samples: int = 0
    total: int = 0
    peak: int = -1
    peak_at: float = 0.0

    def sample(self, size: int, at: float) -> None:
        if size > self.peak:
            self.peak, self.peak_at = size, at
        self.samples += 1
        self.total += size

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
        self.stretches += other.stretches
        self.used.add(other.used)
        self.process.add(other.process)

    def phase(self) -> Phase:
        return Phase(
            stretches=self.stretches, begin=self.begin, end=self.end, seconds=self.seconds,
            used=self.used.usage(), process=self.process.usage(),
        )  # fmt: skip


class Recorder(contextlib.ContextDecorator):
    """Follows one device's memory while it is open, as a context or around a decorated function; see the module.

    `uuid` is as for `gpu_memory`; `open_device` gives another device than that GPU, for as long as its context lasts.
    Every mark takes a sample; with a period (seconds) a thread takes more between them. Each opening begins a new
    recording. Raises ValueError for a period that is not above 0, and for both a uuid and an open_device.
    """

    def __init__(
        self, uuid: str | None = None, *, period: float | None = 0.01,
        open_device: Callable[[], contextlib.AbstractContextManager[Device]] | None = None,
    ) -> None:
        if period is not None and not period > 0:
            raise ValueError(f"period must be above 0 seconds or None, not {period}")
        if uuid is not None and open_device is not None:
            raise ValueError(f"uuid {uuid} names a GPU and open_device another source: give one of them")
        self.open_device = open_device or partial(open_gpu, uuid)
        self.period = period
        self._run: _Run | None = None
        self._open = False

    def __enter__(self) -> "Recorder":
        """Raises RuntimeError if it is open already, as where a decorated function calls itself."""
        if self._open:
            raise RuntimeError("this Recorder is recording already")
        self._run = _Run(self.open_device, self.period)
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self._run.close()

    def mark(self, name: str) -> Phase:
        """Says that what was done since the mark before, or since the beginning, is called `name`.

        A name that comes again adds to its phase; what is returned is of the stretch that ends here alone. Raises
        RuntimeError if the recorder is not open.
        """
        if not self._open:
            raise RuntimeError(f'mark("{name}") while nothing is being recorded')
        return self._run.mark(name)

    @property
    def recording(self) -> Recording:
        """What was seen; while the recorder is open, up to the last mark. Raises RuntimeError before it was opened."""
        if self._run is None:
            raise RuntimeError("nothing has been recorded yet")
        return self._run.recording()


class _Run:
    """One recording in the making, with the device open and the sampling thread, both until `close`."""

    def __init__(
        self, open_device: Callable[[], contextlib.AbstractContextManager[Device]], period: float | None
    ) -> None:
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
        self.running = threading.Lock()  # held until `close`; cheaper to wait for than an Event, which is Python's
        self.running.acquire()
        self.device: Device | None = None
        self.unavailable: str | None = None
        self.session = contextlib.ExitStack()
        try:
            self.device = self.session.enter_context(open_device())
        except Exception as error:  # noqa: BLE001
            self.unavailable = reason(error)
        self.before, self.after = self.conditions(), None
        self.first = self.sample()
        self.thread = threading.Thread(target=self.follow, name="memory-sampling", daemon=True)
        if self.device is not None and period is not None:
            self.try_to(self.thread.start)

    def follow(self) -> None:
        """The sampling thread."""
        while not self.running.acquire(timeout=self.period):
            self.sample()

    def mark(self, name: str) -> Phase:
        self.sample()
        return self.end_stretch(name)

    def close(self) -> None:
        self.running.release()
        if self.thread.ident is not None:
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            # Another call would hang too, and the device must not be closed under this one.
            self.failures["the device did not return from a call"] += 1
        else:
            self.sample()
            self.after = self.conditions()
            self.try_to(self.session.close)
        self.end_stretch(REST)

    def conditions(self) -> GpuConditions | None:
        return self.try_to(self.device.conditions) if self.device else None

    def sample(self) -> Memory | None:
        """Asks for the memory and adds it to the stretch of now."""
        at = self.now()
        memory = self.try_to(self.device.memory) if self.device else None
        if memory is None:
            return None
        with self.lock:
            self.current.used.sample(memory.used, at)
            if memory.process is not None:
                self.current.process.sample(memory.process, at)
            for note in memory.notes:
                self.notes[note] += 1
            if self.taken % self.stride == 0:
                self.curve.append((at, memory.used, memory.process))
            self.taken += 1
            if len(self.curve) > CURVE_POINTS:
                del self.curve[1::2]
                self.stride *= 2
        return memory

    def end_stretch(self, name: str) -> Phase:
        """The stretch that ends, by itself."""
        with self.lock:
            ended = self.current
            ended.end = self.now()
            ended.seconds = ended.end - ended.begin
            ended.stretches = 1
            self.current = _Stretch(begin=ended.end)
            self.overall.add(ended)
            self.phases.setdefault(name, _Stretch(begin=ended.begin)).add(ended)
        return ended.phase()

    def try_to(self, question: Callable[[], T]) -> T | None:
        """The answer, or None and a failure told: whatever goes wrong in here is no reason to stop the user's work."""
        try:
            return question()
        except Exception as error:  # noqa: BLE001
            with self.lock:
                self.failures[reason(error)] += 1
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


def reason(error: Exception) -> str:
    """In one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
