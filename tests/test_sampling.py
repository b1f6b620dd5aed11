"""The recorder of memory over a run, through the real pynvml, against a small NVML library of our own."""

import contextlib
import dataclasses
import json
import os
import threading
import time

import pynvml
import pytest
from fake_nvml import FIRST, SECOND, fake_fixture, libraries_fixture  # noqa: F401

from bench.measure import nvml, sampling
from bench.measure.nvml import gpu_conditions
from bench.measure.sampling import REST, Recorder, Recording

MIB = 2**20
ME = os.getpid()


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "memory-sampling"]


def test_phases_are_what_was_done_before_their_marks(fake):
    fake.list_processes(dict(pid=ME, used=MIB))
    with Recorder(period=None) as recorder:  # a sample of 5 MiB, which belongs to the first phase
        assert sampling_threads() == []
        for name, used in (("model built", 7), ("forward", 11), ("backward", 15), ("forward", 13), ("backward", 9)):
            fake.set("0.used", used * MIB)
            fake.set("0.compute.0.used", (used - 4) * MIB)
            recorder.mark(name)
    recording = recorder.recording
    assert list(recording.phases) == ["model built", "forward", "backward", REST]
    assert {
        name: (phase.stretches, phase.used.samples, phase.used.mean / MIB, phase.used.peak / MIB)
        for name, phase in recording.phases.items()
    } == {"model built": (1, 2, 6, 7), "forward": (2, 2, 12, 13), "backward": (2, 2, 12, 15), REST: (1, 1, 9, 9)}
    assert (recording.overall.used.samples, recording.overall.used.peak) == (7, 15 * MIB)
    assert recording.overall.used.mean == pytest.approx((5 + 7 + 11 + 15 + 13 + 9 + 9) * MIB / 7)
    assert (recording.overall.process.peak, recording.phases["model built"].process.mean) == (11 * MIB, 2 * MIB)
    assert recording.first.used == 5 * MIB
    assert recording.before == recording.after == gpu_conditions()
    assert [used // MIB for _, used, _ in recording.curve] == [5, 7, 11, 15, 13, 9, 9]
    assert (recording.unavailable, recording.failures, recording.notes) == (None, {}, {})


def test_times_of_phases_add_up(fake):
    with Recorder(period=None) as recorder:
        time.sleep(0.02)
        recorder.mark("slow")
        recorder.mark("quick")
        fake.set("0.used", 8 * MIB)
        recorder.mark("slow")
    phases, overall = recorder.recording.phases, recorder.recording.overall
    assert phases["slow"].begin == 0
    assert phases["slow"].begin < phases["quick"].begin < phases["quick"].end < phases["slow"].end <= phases[REST].begin
    assert phases["slow"].seconds >= 0.02
    assert phases["quick"].seconds == pytest.approx(phases["quick"].end - phases["quick"].begin)
    assert sum(phase.seconds for phase in phases.values()) == pytest.approx(overall.seconds)
    assert overall.end == pytest.approx(overall.seconds)
    assert phases["quick"].end < overall.used.peak_at == phases["slow"].used.peak_at < phases["slow"].end


def test_the_thread_sees_what_comes_and_goes_between_marks(fake):
    recorder = Recorder(period=0.001)
    with recorder:
        fake.await_samples()
        (thread,) = sampling_threads()
        assert thread.daemon
        fake.set("0.used", 15 * MIB)
        fake.await_samples()
        fake.set("0.used", 6 * MIB)
        fake.await_samples()
        recorder.mark("forward")
        fake.await_samples()
    forward = recorder.recording.phases["forward"].used
    assert forward.peak == 15 * MIB
    assert forward.samples >= 10
    assert 5 * MIB < forward.mean < 15 * MIB
    assert recorder.recording.phases[REST].used.peak == 6 * MIB
    assert sampling_threads() == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_the_programs_own_errors_pass_and_the_recording_stays(fake, error):
    recorder = Recorder(period=0.001)

    @recorder
    def program():
        recorder.mark("model built")
        fake.await_samples()
        raise error

    with pytest.raises(error):
        program()
    assert sampling_threads() == []
    assert recorder.recording.phases[REST].used.samples >= 4


def test_a_gpu_that_is_lost_on_the_way_is_told_and_stops_nobody(fake):
    with Recorder(period=0.001) as recorder:
        recorder.mark("before")
        fake.fail("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetPowerUsage", code=pynvml.NVML_ERROR_GPU_IS_LOST)
        fake.await_samples()
        recorder.mark("during")
        fake.fail("nvmlDeviceGetMemoryInfo_v2", code=pynvml.NVML_SUCCESS)
        fake.await_samples()
        recorder.mark("back again")
    recording = recorder.recording
    assert list(recording.failures) == ["GPU is lost"]
    assert recording.failures["GPU is lost"] >= 5
    assert recording.phases["before"].used.peak == 5 * MIB
    assert recording.phases["back again"].used.samples >= 4
    assert (recording.before.power_w, recording.after) == (61.5, None)


@pytest.mark.parametrize("period", [None, 0.001])
def test_errors_that_nobody_thought_of_stop_nobody_either(fake, monkeypatch, period):
    with Recorder(period=period) as recorder:
        monkeypatch.setattr(nvml.Gpu, "memory", lambda self: {}["new field"])
        time.sleep(0.02)
        recorder.mark("forward")
    assert list(recorder.recording.failures) == ["'new field'"]
    assert recorder.recording.phases["forward"].seconds >= 0.02


def test_what_samples_lacked_is_told(fake):
    """A driver that stops telling reserved memory, and a process that touches the GPU only after a while."""
    with Recorder(period=None) as recorder:
        recorder.mark("a")
        fake.list_processes(dict(pid=ME, used=0))
        recorder.mark("b")
        fake.fail("nvmlDeviceGetMemoryInfo_v2")
        recorder.mark("c")
    recording = recorder.recording
    assert (recording.phases["a"].process, recording.phases["b"].process.samples) == (None, 1)
    assert (recording.overall.used.samples, recording.overall.process.samples) == (5, 3)
    assert recording.notes.pop(nvml.RESERVED_IS_USED) == 2
    ((note, count),) = recording.notes.items()
    assert note.startswith(f"NVML lists no process {ME}")
    assert count == 2


def test_without_nvml_phases_have_their_times_alone(fake):
    fake.fail("nvmlInitWithFlags", code=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with Recorder(period=0.001) as recorder:
        assert sampling_threads() == []
        time.sleep(0.01)
        recorder.mark("forward")
    recording = recorder.recording
    assert recording.unavailable == "no NVML: Driver Not Loaded"
    assert recording.phases["forward"].seconds >= 0.01
    assert (recording.phases["forward"].used, recording.overall.used, recording.first) == (None, None, None)
    assert (recording.curve, recording.failures) == ((), {})


def test_a_driver_that_hangs_does_not_keep_the_program(fake, monkeypatch):
    monkeypatch.setattr(sampling, "PATIENCE", 0.05)
    with Recorder(period=0.001) as recorder:
        fake.set("delay_ms:nvmlDeviceGetMemoryInfo_v2", 500)
        fake.await_samples(1)
    assert recorder._run.thread.is_alive()
    assert recorder.recording.failures == {"the device did not return from a call": 1}
    assert fake.get("open") == 1  # closing it under the call could crash
    recorder._run.thread.join()
    pynvml.nvmlShutdown()


def test_a_decorated_function_is_recorded_anew_each_time(fake):
    recorder = Recorder(period=None)

    @recorder
    def train(epochs: int) -> Recording:
        """Trains."""
        for _ in range(epochs):
            recorder.mark("epoch")
        return recorder.recording

    seen = train(3)
    assert (train.__doc__, seen.phases["epoch"].stretches, seen.overall.used.samples) == ("Trains.", 3, 4)
    assert recorder.recording.phases[REST].stretches == 1
    train(2)
    assert recorder.recording.phases["epoch"].stretches == 2


def test_recorders_may_overlap_on_different_gpus(fake):
    with Recorder(FIRST, period=0.001) as first, Recorder(SECOND, period=0.001) as second:
        fake.await_samples(10)
    assert first.recording.overall.used.peak == 5 * MIB
    assert second.recording.overall.used.peak == 10 * MIB


def test_a_long_curve_is_thinned_evenly(fake, monkeypatch):
    monkeypatch.setattr(sampling, "CURVE_POINTS", 8)
    with Recorder(period=None) as recorder:
        for i in range(1, 50):
            fake.set("0.used", i)
            recorder.mark("step")
    used = [used for _, used, _ in recorder.recording.curve]
    assert used == [5 * MIB, 8, 16, 24, 32, 40, 48]
    assert recorder.recording.phases["step"].used.samples == 50


def test_a_mark_returns_its_own_stretch_alone(fake):
    with Recorder(period=None) as recorder:
        recorder.mark("forward")
        fake.set("0.used", 15 * MIB)
        recorder.mark("backward")
        fake.set("0.used", 7 * MIB)
        stretch = recorder.mark("forward")
    forward = recorder.recording.phases["forward"]
    assert (stretch.stretches, stretch.used.samples, stretch.used.peak) == (1, 1, 7 * MIB)
    assert (forward.stretches, forward.used.samples, forward.used.peak) == (2, 3, 7 * MIB)
    assert stretch.end == forward.end
    assert 0 < stretch.begin < stretch.end


def test_another_device_is_opened_and_closed_in_its_place(fake):
    """With nothing asked of NVML."""
    opened = []

    class Other:
        def memory(self):
            return nvml.GpuMemory(name="other", uuid="", total=9, used=len(opened), process=None, notes=("n",))

        def conditions(self):
            return None

    @contextlib.contextmanager
    def open_device():
        opened.append("open")
        yield Other()
        opened.append("closed")

    recorder = Recorder(open_device=open_device, period=None)
    for times in (1, 2):
        with recorder:
            recorder.mark("a")
        assert opened == ["open", "closed"] * times
        assert recorder.recording.overall.used.peak == 2 * times - 1
        assert recorder.recording.notes == {"n": 3}
    assert fake.get("calls:nvmlDeviceGetMemoryInfo_v2") == 0


@pytest.mark.parametrize("period", [None, 0.001])
def test_a_device_that_cannot_be_opened_or_closed_stops_nobody(period):
    @contextlib.contextmanager
    def fails_at(moment):
        if moment == "opening":
            raise OSError("no such device\nand more lines")
        yield nvml.Gpu.__new__(nvml.Gpu)
        raise OSError("no way out")

    with Recorder(open_device=lambda: fails_at("opening"), period=period) as recorder:
        recorder.mark("a")
    assert recorder.recording.unavailable == "no such device"
    assert recorder.recording.phases["a"].used is None
    with Recorder(open_device=lambda: fails_at("closing"), period=period) as recorder:
        recorder.mark("a")
    assert recorder.recording.unavailable is None
    assert recorder.recording.failures["no way out"] == 1


def test_a_recording_is_plain_data(fake):
    with Recorder() as recorder:
        recorder.mark("forward")
    stored = json.loads(json.dumps(dataclasses.asdict(recorder.recording)))
    assert stored["phases"]["forward"]["used"]["peak"] == 5 * MIB
    assert stored["period"] == 0.01


def test_misuse_is_refused(fake):
    for period in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="period must be above 0"):
            Recorder(period=period)
    with pytest.raises(ValueError, match=f"{FIRST} names a GPU and open_device"):
        Recorder(FIRST, open_device=contextlib.nullcontext)
    recorder = Recorder(period=None)
    with pytest.raises(RuntimeError, match="nothing has been recorded"):
        _ = recorder.recording
    with recorder, pytest.raises(RuntimeError, match="recording already"), recorder:
        pass
    with pytest.raises(RuntimeError, match='mark\\("late"\\)'):
        recorder.mark("late")
