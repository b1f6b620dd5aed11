"""The machine's memory and the resident set, as the kernel tells them, and followed over a run."""

import contextlib
import dataclasses
import json
import mmap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.measure.host import open_host
from bench.measure.sampling import Recorder

MIB = 2**20
BUFFER = 200 * MIB


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


@contextlib.contextmanager
def buffer() -> Iterator[None]:
    """BUFFER bytes, touched, of a mapping of their own: an allocator may hand out what an earlier test has left."""
    with mmap.mmap(-1, BUFFER) as memory:
        for page in range(0, BUFFER, mmap.PAGESIZE):
            memory[page] = 1
        yield


def test_the_resident_set_is_the_kernels():
    with open_host() as host:
        memory = host.memory()
    assert memory.process == pytest.approx(status("VmRSS"), abs=8 * MIB)
    assert memory.process < memory.used < memory.total
    assert memory.notes == ()


def test_each_question_is_answered_anew():
    with open_host() as host:
        before = host.memory()
        with buffer():
            during = host.memory()
        after = host.memory()
    assert during.process - before.process == pytest.approx(BUFFER, rel=0.05)
    assert after.process - before.process < BUFFER / 20


def test_the_recorder_follows_it_phase_by_phase():
    with Recorder(open_device=open_host, period=0.001) as recorder:
        before = recorder.mark("before")
        with buffer():
            time.sleep(0.02)
            during = recorder.mark("during")
        recorder.mark("freed")
        recorder.mark("after")
    recording = recorder.recording
    assert (recording.unavailable, recording.failures, recording.before, recording.after) == (None, {}, None, None)
    assert recording.phases["before"] == before
    assert recording.phases["during"] == during
    assert during.process.peak - before.process.peak == pytest.approx(BUFFER, rel=0.05)
    assert during.process.samples >= 3
    assert before.process.peak < during.process.mean <= during.process.peak
    assert recording.phases["after"].process.peak < during.process.peak - 0.9 * BUFFER
    assert recording.overall.process.peak == during.process.peak
    json.dumps(dataclasses.asdict(recording))


def test_what_comes_and_goes_between_two_marks_is_seen():
    with Recorder(open_device=open_host, period=0.001) as recorder:
        first = recorder.recording.first
        with buffer():
            time.sleep(0.05)
        gone = recorder.mark("all")
    assert gone.process.peak - first.process == pytest.approx(BUFFER, rel=0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-sampling"]
