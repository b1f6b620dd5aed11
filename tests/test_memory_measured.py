"""What the memory command measures of a real step, on a GPU of paper."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from bench.measure import at_hand
from bench.measure.nvml import GpuMemory, NvmlUnavailable
from bench.measure.predict import MIB
from bench.memory import measured
from train.rehearsal import Step, rehearse


class FakeTraining:
    """Of the real one, what `measure_here` asks."""

    def __init__(self, step: Step, device: torch.device):
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


@pytest.fixture
def paper_gpu(monkeypatch) -> dict:
    """A GPU of paper, with a capability and NVML's answers that tests may change."""
    gpu = {"capability": (9, 0), "driver": [GpuMemory(
        name="Paper GPU", uuid="GPU-0", total=1000 * MIB, used=10 * MIB, process=None, reserved=20 * MIB,
    ), GpuMemory(name="Paper GPU", uuid="GPU-0", total=1000 * MIB, used=510 * MIB, process=400 * MIB)]}  # fmt: skip

    def properties(_device: object) -> SimpleNamespace:
        major, minor = gpu["capability"]
        return SimpleNamespace(
            name="Paper GPU", uuid="0", major=major, minor=minor, multi_processor_count=7, total_memory=980 * MIB
        )

    def ask(_uuid: str | None = None) -> GpuMemory:
        if not gpu["driver"]:
            raise NvmlUnavailable("no NVML: not here")
        return gpu["driver"].pop(0) if len(gpu["driver"]) > 1 else gpu["driver"][0]

    for name, answer in (
        ("is_available", True), ("reset_peak_memory_stats", None), ("synchronize", None), ("empty_cache", None),
        ("max_memory_allocated", 200 * MIB), ("max_memory_reserved", 300 * MIB),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(at_hand, "gpu_memory", ask)
    monkeypatch.setattr(measured, "gpu_state", lambda device: {})
    monkeypatch.setattr(measured, "Training", FakeTraining)
    monkeypatch.setattr(measured, "track", lambda step, device: rehearse(step, "cpu"))
    return gpu


STEP = Step(model="simplenet", conv="torch", batch_size=8, image_size=32)


def test_what_is_measured_is_the_process_the_allocator_and_what_lies_between(paper_gpu):
    found = measured.measure_here(STEP)
    assert found["source"] == "NVML, this process"
    assert (found["nbytes"], found["outside_allocator"]) == (400 * MIB, 100 * MIB)
    assert (found["allocated_peak"], found["reserved_peak"]) == (200 * MIB, 300 * MIB)
    assert found["tracked_peak"] == rehearse(STEP, "cpu").peak.nbytes


def test_where_processes_are_hidden_the_devices_growth_is_measured(paper_gpu):
    paper_gpu["driver"][1] = dataclasses.replace(paper_gpu["driver"][1], process=None)
    found = measured.measure_here(STEP)
    assert found["source"] == "NVML, growth of the device's use"
    assert found["nbytes"] == 500 * MIB


def test_without_nvml_the_allocators_figures_are_measured(paper_gpu):
    paper_gpu["driver"] = []
    found = measured.measure_here(STEP)
    assert found["source"] == "PyTorch alone, without NVML"
    assert (found["nbytes"], found["outside_allocator"], found["reserved_peak"]) == (None, None, 300 * MIB)
    assert at_hand.find_gpu().total == 980


def test_what_was_measured_stays_where_the_tracked_step_does_not_fit(paper_gpu, monkeypatch):
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(measured, "track", out_of_memory)
    found = measured.measure_here(STEP)
    assert (found["nbytes"], found["tracked_peak"]) == (400 * MIB, None)
    monkeypatch.setattr(FakeTraining, "step", out_of_memory)
    assert measured.measure_here(STEP) == {"error": "out of memory"}


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((9, 0), "sm_90"), ((8, 7), "sm_86"), ((7, 0), "sm_75"), ((12, 1), "sm_120"), ((10, 3), "sm_100")],
)
def test_a_gpu_that_is_not_known_is_predicted_as_the_newest_older_one(paper_gpu, capability, arch):
    paper_gpu["capability"] = capability
    found = at_hand.find_gpu()
    assert (found.arch, found.multiprocessors, found.total, found.kept) == (arch, 7, 1000, 20)
    assert rehearse(STEP, found.arch, multiprocessors=found.multiprocessors).peak.nbytes > 0


def test_a_gpu_that_pytorch_cannot_use_is_none(paper_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(at_hand.NoGpu, match="NVML shows Paper GPU, but this PyTorch cannot use it"):
        at_hand.find_gpu()
