"""Memory that runs out: a GPU of so many bytes, simulated on CPU tensors by refusing what would be too much."""

import math
import re
from collections.abc import Callable

import pytest
import torch

import attacks.run.command
import models
import train.evaluate
import train.run
from attacks.pgd import pgd
from bench.measure.at_hand import NoGpu
from bench.measure.predict import GPUS, MIB, Range
from bench.measure.tracker import Tracker
from train import memory, session, shortage
from train.distributed import World
from train.rehearsal import Step


class SmallGpu(Tracker):
    """Raises what CUDA raises where live tensors would take more than `limit` bytes."""

    def __init__(self, limit: int):
        super().__init__("cpu")
        self.limit = limit

    def _see(self, *arguments):
        record = super()._see(*arguments)
        if self.now > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nand more lines")
        return record


@pytest.fixture
def on_a_gpu_of(run_main, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """on_a_gpu_of(megabytes, main, *arguments): run_main of a command that computes on so small a GPU."""
    describe = shortage.describe
    monkeypatch.setattr(shortage, "find_gpu", lambda device: GPUS["t4"])

    def run(megabytes: int, main: Callable, *arguments: object) -> tuple[int, str, str]:
        gpu = SmallGpu(megabytes * MIB)

        def described(step: Step, _cpu: torch.device, *rest: object, **options: object) -> str:
            gpu.limit = math.inf  # meta tensors take none of it
            return describe(step, torch.device("cuda"), *rest, **options)

        monkeypatch.setattr(shortage, "describe", described)
        monkeypatch.setattr(shortage, "room", lambda device: Range(megabytes * MIB, megabytes * MIB))
        with gpu:
            return run_main(main, *arguments)

    return run


TRAINING = (
    "simplenet", "--conv", "torch", "--device", "cpu", "--epochs", "1", "--limit-train", "640", "--limit-val", "640",
)


def suggested(err: str, flag: str) -> int:
    return int(re.search(rf"; {flag} (\d+) is predicted to fit", err)[1])


@pytest.mark.parametrize(
    ("flag", "images", "usual"),
    [
        pytest.param("--batch-size", 512, (), id="training-steps"),
        pytest.param("--eval-batch-size", 640, ("--batch-size", 16), id="validation", marks=pytest.mark.slow),
    ],
)
def test_a_training_names_its_images_the_prediction_and_what_fits(
    flag, images, usual, on_a_gpu_of, tmp_path, request
):
    """What is suggested fits, and is not much less than what failed: of 300 MiB and more these GPUs have 100."""
    arguments = (train.run.main, *TRAINING, *usual)
    code, _, err = on_a_gpu_of(100, *arguments, flag, images, "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    phase = request.node.callspec.id.replace("-", " ")
    assert err.startswith(f"train.run: error: {phase}: not enough GPU memory for {images} images of 32 px at once; ")
    assert re.search(r"predicted are [\d,]+-[\d,]+ MiB, free 100 MiB; ", err)
    assert re.search(r"run/last.pt holds step \d+$", err)
    torch.load(tmp_path / "run/last.pt", weights_only=True)

    fitting = suggested(err, flag)
    assert images // 8 < fitting < images
    assert on_a_gpu_of(100, *arguments, flag, fitting, "--out", "smaller")[0] == 0


def test_a_validation_that_ran_out_is_gone_on_with_on_fewer_images(on_a_gpu_of):
    """Nothing of it depends on how many are validated at once."""
    code, _, err = on_a_gpu_of(
        100, train.run.main, *TRAINING, "--batch-size", 16, "--eval-batch-size", 640, "--out", "run"
    )
    assert code == 2
    fitting = suggested(err, "--eval-batch-size")
    code, out, _ = on_a_gpu_of(100, train.run.main, "--resume", "run", "--eval-batch-size", fitting)
    assert (code, "going on after step" in out) == (0, True)


@pytest.mark.parametrize(
    "refusal", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")], ids=repr
)
def test_weights_that_do_not_fit_are_one_line(refusal, trained_folder, run_main, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise refusal

    monkeypatch.setattr(models.SimpleNet, "to", refuse)
    for main, arguments in (
        (train.run.main, TRAINING),
        (train.evaluate.main, (trained_folder,)),
        (attacks.run.command.main, ("pgd", trained_folder)),
    ):
        code, _, err = run_main(main, *arguments, "--device", "cpu")
        assert (code, err.count("\n")) == (2, 1)
        assert "error: not enough memory for the weights of " in err


def test_another_error_is_not_taken_for_it(train_run, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(models.SimpleNet, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train_run(*TRAINING, "--out", "run")


def test_of_several_processes_each_validates_its_share_and_the_steps_images_are_of_all(make_trainer):
    trainer = make_trainer(batch_size=6, eval_batch_size=256)
    trainer.world = World(rank=0, size=2)
    assert len(trainer.val) == 8
    for phase, images in ((memory.VALIDATION, 4), (memory.TRAINING, 6)):
        assert f"not enough memory for {images} images of 32 px at once" in session.describe_shortage(trainer, phase)


def test_an_evaluation_does_too(train_run, on_a_gpu_of):
    assert train_run(*TRAINING, "--out", "run")[0] == 0
    usual = (64, train.evaluate.main, "run", "--device", "cpu", "--batch-size")
    code, _, err = on_a_gpu_of(*usual, 640)
    assert (code, err.count("\n")) == (2, 1)
    assert "not enough GPU memory for 640 images of 32 px at once; predicted are " in err
    assert on_a_gpu_of(*usual, suggested(err, "--batch-size"))[0] == 0


def test_an_attack_does_too(trained_folder, on_a_gpu_of):
    """What is predicted is one gradient: an attack that keeps its own copies of the images fits with it."""
    code, _, err = on_a_gpu_of(64, attacks.run.command.main, "pgd", trained_folder, "--device", "cpu", "--out", "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "not enough GPU memory for 256 images of 32 px at once; predicted are " in err
    assert err.endswith("; or take fewer images for checks and pictures\n")
    x = torch.rand(suggested(err, "--batch-size"), 3, 32, 32)
    model = models.build("simplenet", "torch", num_classes=10, image_size=32).eval()
    with SmallGpu(64 * MIB):
        pgd(model, x, num_steps=2)
    with pytest.raises(torch.OutOfMemoryError), SmallGpu(64 * MIB):
        pgd(model, x.repeat(4, 1, 1, 1), num_steps=2)


STEP = Step(model="simplenet", conv="torch", batch_size=256, image_size=32)


def test_what_would_fit_was_taken_by_others(monkeypatch):
    monkeypatch.setattr(shortage, "find_gpu", lambda device: GPUS["t4"])
    monkeypatch.setattr(shortage, "room", lambda device: Range(2**33, 2**33))
    told = shortage.describe(STEP, torch.device("cuda"), flag="--batch-size")
    assert "other processes may have taken it for a moment; try again, or take a smaller --batch-size" in told


def test_the_room_is_what_is_free_and_what_pytorch_holds_already(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 * MIB, 1000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200 * MIB)
    assert shortage.room(torch.device("cuda")) == Range(500 * MIB, 500 * MIB)


def test_where_no_batch_fits_the_images_are_too_large(monkeypatch):
    monkeypatch.setattr(shortage, "find_gpu", lambda device: GPUS["t4"])
    monkeypatch.setattr(shortage, "room", lambda device: Range(MIB, MIB))
    told = shortage.describe(STEP, torch.device("cuda"), flag="--batch-size", processes=2)
    assert told.startswith("not enough GPU memory for 512 images of 32 px at once; predicted are ")
    assert told.endswith("free 1 MiB, which is too little for 4: take a smaller --image-size")


def test_where_nothing_can_be_predicted_the_reason_is_told(monkeypatch):
    def no_gpu(_device):
        raise NoGpu("no NVML: not here")

    monkeypatch.setattr(shortage, "find_gpu", no_gpu)
    told = shortage.describe(STEP, torch.device("cuda"), flag="--batch-size")
    assert told.endswith("at once; nothing is predicted (no NVML: not here): take a smaller --batch-size")


def test_the_machines_own_memory_runs_out_in_one_line(train_run, monkeypatch):
    """By the allocator's real refusal, of a tensor that is larger than any machine."""
    forward = models.SimpleNet.forward
    refused = lambda self, x: torch.empty(2**60) if x.device.type == "cpu" else forward(self, x)  # noqa: E731
    monkeypatch.setattr(models.SimpleNet, "forward", refused)
    code, _, err = train_run(*TRAINING, "--batch-size", 16, "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(r"training steps: not enough memory for 16 images of 32 px at once; predicted are \d+ MiB: ", err)
