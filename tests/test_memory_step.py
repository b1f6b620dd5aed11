"""Predicted is tracked: the training step on meta tensors against the real one, and that against resident memory."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

import models
from bench.measure.account import CATEGORIES, INPUT, OPTIMIZER, SAVED, TEMPORARY, WORKSPACE, Account, Change
from bench.measure.predict import GPUS
from bench.measure.tracker import Tracker
from kernels import runtime
from train.recipes import FOR_MODEL
from train.rehearsal import BACKWARD, CONVOLUTIONS, FORWARD, OPTIMIZER_STEP, Step, rehearse, track

MIB = 2**20
STEPS_OF_ADAMW = 1024
"""Bytes at most: AdamW counts each parameter's steps in a tensor of the CPU, which is no meta tensor."""


def step(model: str = "simplenet", conv: str = "triton", *, amp: str = "off", batch_size: int = 2) -> Step:
    return Step(model=model, conv=conv, batch_size=batch_size, image_size=32, amp=amp)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("model", list(models.MODELS))
def test_what_is_predicted_is_what_a_step_takes(model, conv, amp):
    """To the byte, by category and phase, which is more than 1% asks."""
    predicted, tracked = rehearse(step(model, conv, amp=amp), "cpu"), track(step(model, conv, amp=amp), "cpu")
    assert predicted.peak.nbytes == pytest.approx(tracked.peak.nbytes, abs=STEPS_OF_ADAMW)
    for category in CATEGORIES:
        slack = STEPS_OF_ADAMW if category == OPTIMIZER else 0
        assert predicted.peak.by_category()[category] == pytest.approx(
            tracked.peak.by_category()[category], abs=slack
        ), category
    assert list(predicted.phases) == list(tracked.phases) == [FORWARD, BACKWARD, OPTIMIZER_STEP]
    for name, phase in predicted.phases.items():
        assert phase.peak.nbytes == pytest.approx(tracked.phases[name].peak.nbytes, abs=STEPS_OF_ADAMW), name
        assert phase.end.nbytes == pytest.approx(tracked.phases[name].end.nbytes, abs=STEPS_OF_ADAMW), name


@pytest.mark.parametrize("model", list(models.MODELS))
def test_the_step_is_the_training_loops(model, make_trainer, monkeypatch):
    """Written once more, since the loop's sums of losses ask meta tensors for numbers; those are all that differs."""
    images = 8
    changes = FOR_MODEL.get(("writeup", model), {})
    trainer = make_trainer("writeup", model=model, image_size=32, batch_size=images, channels_last=False, **changes)
    for group in trainer.optimizer.param_groups:
        group["foreach"] = True
    trainer.model.train()
    monkeypatch.setattr("train.rehearsal.NUM_CLASSES", len(trainer.train.classes))
    tracker = Tracker("cpu")
    x, y = torch.rand(images, 3, 32, 32), torch.zeros(images, dtype=torch.long)
    tracker.watch(trainer.model, trainer.optimizer)
    tracker.label((x, y), INPUT)
    with tracker:
        for _ in range(2):
            tracker.reset_peak()
            trainer.train_step(x, y)
    ours = track(Step(model=model, conv="torch", batch_size=images, image_size=32), "cpu")
    assert ours.peak.nbytes == pytest.approx(tracker.account.peak.nbytes, rel=0.001)
    assert ours.peak.by_category() == pytest.approx(tracker.account.peak.by_category(), rel=0.01, abs=1024)
    made = [makers(account) for account in (ours, tracker.account)]
    assert made[0] - made[1] == Counter()
    left_out = made[1] - made[0]  # accuracies, and copies of them
    assert not [name for name in left_out if any(part in name for part in ("conv", "norm", "foreach", "mm", "relu"))]


def makers(account: Account) -> Counter[str]:
    """What was taken in the step that counts, by operator."""
    entries = account.entries[account.start :]
    seen = {entry.storage for entry in account.entries[: account.start] if isinstance(entry, Change)}
    made = Counter()
    for entry in entries:
        if isinstance(entry, Change) and entry.storage not in seen:
            seen.add(entry.storage)
            made[entry.operator] += 1
    return made


@pytest.mark.parametrize("told", [False, True], ids=["not-told", "told"])
def test_a_buffer_added_inside_a_launcher_shows_up(told, monkeypatch):
    """64 MiB at every launch: tracked, and a difference from the prediction unless that was told."""

    def peaks() -> dict[str, Account]:
        return {"tracked": track(step(), "cpu"), "predicted": rehearse(step(), "cpu")}

    before = peaks()
    channels_last = runtime.channels_last

    def with_a_buffer(tensor: torch.Tensor, what: str) -> torch.Tensor:
        if told or not tensor.is_meta:
            buffer = runtime.empty((16, 2**20), "test", dtype=torch.float32, device=tensor.device)
            assert buffer.nbytes == 64 * MIB
        return channels_last(tensor, what)

    monkeypatch.setattr(runtime, "channels_last", with_a_buffer)
    after = peaks()
    assert after["tracked"].peak.nbytes > before["tracked"].peak.nbytes + 56 * MIB
    assert after["tracked"].peak.by_category()[WORKSPACE] >= 64 * MIB
    assert ("test",) in after["tracked"].peak.split("operator")
    if told:
        assert after["predicted"].peak.nbytes == after["tracked"].peak.nbytes
    else:
        assert after["predicted"].peak.nbytes == before["predicted"].peak.nbytes


def test_split_k_workspaces_are_predicted_for_a_gpu():
    """An H100 splits a weight gradient over many programs; the interpreter splits none."""

    def workspaces(role: str) -> int:
        account = rehearse(step(batch_size=32), role, multiprocessors=132)
        taken = [entry.nbytes for entry in account.entries if getattr(entry, "operator", "") == "split-K workspace"]
        return sum(taken)

    assert workspaces("cpu") == 0
    assert workspaces("sm_90") > 0


@pytest.mark.parametrize("model", ["simplenet", "resnet18"])
def test_no_layer_of_a_triton_model_converts(model):
    made = {getattr(entry, "operator", "") for entry in rehearse(step(model), "sm_75").entries}
    assert "conv_lab.weight_grad" in made
    assert not [name for name in made if "channels-last" in name]


# Bytes by hand, float32, batch 256, 128 px. SimpleNet's parameters, as often again for the momentum:
PARAMETERS = 365_028 * 4
# Kept by autograd when the last ReLU's gradient is made: every ReLU's result, and each pool's with its int64 indices.
RELUS = (64 * 64**2 + 2 * 64 * 32**2 + 256 * 32**2 + 2 * 128 * 16**2 + 512 * 16**2) * 256 * 4
POOLS = (64 * 32**2 + 256 * 16**2) * 256 * (4 + 8)
LAST = 512 * 16**2 * 256 * 4


def writeup_step(conv: str) -> Account:
    return rehearse(Step(model="simplenet", conv=conv, batch_size=256, image_size=128), "sm_75")


def test_peak_of_native_simplenet_by_hand():
    made = writeup_step("torch").peak.by_category()
    assert made["parameters"] == made["optimizer state"] == PARAMETERS
    assert made["gradients"] == (512 * 100 + 100) * 4  # the head's, so far
    assert made["saved for backward"] == pytest.approx(RELUS + POOLS, rel=0.001)
    assert made["input"] == 256 * 3 * 128**2 * 4 + 256 * 8
    # The gradient on both sides of the last ReLU.
    assert made["temporaries"] == pytest.approx(2 * LAST, rel=0.001)
    assert writeup_step("torch").peak.nbytes == sum(made.values())


def test_peak_of_unfold_simplenet_by_hand():
    """Where the second block's 3x3 weight gradient is made: folded product, fold's storage, unfolded matrix."""
    peak = writeup_step("unfold").peak
    matrix = 256 * (64 * 9) * 32**2 * 4
    dy = 256 * 64 * 32**2 * 4
    dw_of_each_image = 256 * 64 * (64 * 9) * 4
    assert peak.by_category()[TEMPORARY] == pytest.approx(3 * matrix + dy + dw_of_each_image, rel=0.001)
    made = peak.split("category", "operator")
    assert [made[TEMPORARY, name] for name in ("aten.im2col", "aten.col2im", "aten.clone")] == 3 * [matrix]


def test_the_convolution_alone_keeps_what_nn_conv2d_keeps():
    ours, theirs = (writeup_step(conv).peak.by_category() for conv in ("triton-unfused", "torch"))
    assert {**ours, WORKSPACE: 0} == theirs


def test_peak_of_fused_simplenet_by_hand():
    """Where the last convolution's weight gradient is made: each convolution has its input, the last its result."""
    peak = writeup_step("triton").peak
    made = peak.split("category", "operator")
    pooled = 256 * (64 * 32**2 + 256 * 16**2)  # elements
    results = 256 * (2 * 64 * 32**2 + (2 * 128 + 512) * 16**2)  # of the convolutions that no pool follows
    assert made[SAVED, "conv_lab.max_pool"] == pooled * (4 + 1)  # the result, and a byte's index
    assert made[SAVED, "conv_lab.forward"] == results * 4
    dy, dx = 256 * 512 * 16**2 * 4, 256 * 128 * 16**2 * 4
    assert made[TEMPORARY, "aten.avg_pool2d_backward"] == dy
    assert made[TEMPORARY, "conv_lab.input_grad"] == dx
    assert peak.nbytes == pytest.approx(256 * 3 * 128**2 * 4 + sum((pooled * 5, results * 4, dy, dx)), rel=0.02)


@pytest.mark.parametrize(
    ("model", "reference", "most", "gpu"),
    [
        ("simplenet", "torch", 0.50, "t4"),
        ("simplenet", "torch", 0.50, "a100-40gb"),
        ("simplenet", "torch", 0.50, "h100"),
        ("simplenet", "unfold", 0.35, "h100"),
        ("customnet", "torch", 0.85, "h100"),
        ("resnet18", "torch", 0.82, "h100"),
    ],
)
def test_fused_a_training_step_takes_so_much_less(model, reference, most, gpu):
    """Accounted bytes of 256 images of 128 px, with all workspaces and copies of that GPU's launches."""
    kind = GPUS[gpu]

    def peak(conv: str) -> int:
        made = Step(model=model, conv=conv, batch_size=256, image_size=128)
        return rehearse(made, kind.arch, multiprocessors=kind.multiprocessors).peak.nbytes

    assert peak("triton") <= most * peak(reference)


WITNESS = """
import gc, sys, torch
from bench.measure.tracker import Tracker
from train.rehearsal import Step, Training

def resident(which):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which))

torch.set_num_threads(1)
shape = dict(model="simplenet", conv="torch", image_size=64)
warm = Training(Step(batch_size=2, **shape), "cpu")  # what libraries set up once
for _ in range(2):
    warm.step()
del warm
gc.collect()
before, tracker = resident("VmRSS"), Tracker("cpu")
with tracker:
    training = Training(Step(batch_size=192, **shape), "cpu", tracker)
    open("/proc/self/clear_refs", "w").write("5")  # begins a new highest resident set
    for _ in range(2):
        training.step()
print(tracker.account.peak.nbytes, resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_tracked_is_what_a_fresh_process_comes_to_hold():
    """Resident memory is a witness where every large allocation is a mapping of its own, gone when it is freed."""
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, "-c", WITNESS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tracked, resident = map(int, run.stdout.split())
    assert tracked > 280 * MIB
    # What a library takes inside one operator and gives back is in the witness alone.
    assert 0.98 * tracked <= resident <= 1.06 * tracked + 4 * MIB
