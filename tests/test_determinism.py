"""The same bits: of a convolution, an attack, a batch, a training, whatever may differ around it."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import random, results
from rich.console import Console
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.pgd import pgd
from attacks.saliency import smooth_grad
from attacks.square import square
from kernels import Conv2d, conv2d, max_pool2d
from kernels.geometry import ConvGeometry
from train.augment import Augmentation
from train.batches import Feeder
from train.data import load_data

ROOT = Path(__file__).resolve().parent.parent

# (x, w, options), a kernel family each; eight images, so that several blocks of rows are multiplied.
CASES = {
    "padded": ((8, 16, 9, 9), (24, 16, 3, 3), dict(padding=1)),
    "strided-groups": ((8, 10, 9, 7), (6, 5, 3, 2), dict(padding=(2, 1), stride=(2, 3), groups=2)),
    "first-layer": ((8, 3, 19, 17), (8, 3, 7, 7), dict(padding=3, stride=2)),
    "depthwise": ((8, 6, 9, 9), (12, 1, 3, 3), dict(padding=1, groups=6)),
}


def operands(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict]:
    """(x, w, b, dy) and the options."""
    x_shape, w_shape, options = CASES[name]
    shapes = x_shape, w_shape, w_shape[:1], ConvGeometry.of(x_shape, w_shape, **options).y_shape
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)], options


def outcome(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    tensors, options = operands(name, dtype)
    return results(partial(conv2d, relu=True), *tensors, **options)


def digest(tensors: tuple[Tensor, ...]) -> str:
    """Of values in the order of their places, whatever the layout; tells -0 from 0."""
    return hashlib.sha256(b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(2) has PyTorch compute with two threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_has_the_same_bits_at_each_call_and_with_any_number_of_threads(name, threads):
    threads(1)
    expected = digest(outcome(name))
    for count in (1, 2):
        threads(count)
        assert digest(outcome(name)) == expected


@pytest.mark.parametrize("name", CASES)
def test_nor_does_it_depend_on_the_layout_or_the_alignment_of_its_operands(name):
    tensors, options = operands(name)

    def moved(tensor: Tensor) -> Tensor:
        """The same values, one element further from where memory is aligned."""
        return torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    def last(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 1]

    expected = digest(results(conv2d, *tensors, **options))
    for change in (moved, last, strided):
        assert digest(results(conv2d, *map(change, tensors), **options)) == expected, change.__name__


@pytest.mark.parametrize("name", CASES)
def test_an_image_has_the_same_bits_whatever_else_is_in_its_batch_and_wherever_it_is(name):
    """In a batch of the same size: another size may be cut into blocks otherwise, and then sums differ in rounding."""
    (x, w, b, dy), options = operands(name)
    y, dx, _, _ = results(conv2d, x, w, b, dy, **options)
    others, other_dy = random(*x.shape, dtype=x.dtype, seed=8), random(*dy.shape, dtype=x.dtype, seed=9)
    for image, place in ((7, 7), (5, 2)):
        others[place], other_dy[place] = x[image], dy[image]
        there = results(conv2d, others, w, b, other_dy, **options)
        assert torch.equal(there[0][place], y[image])
        assert torch.equal(there[1][place], dx[image])


def test_threads_that_convolve_at_once_have_the_bits_of_one_that_does_alone():
    expected = {name: digest(outcome(name)) for name in CASES}
    start, wrong = threading.Barrier(len(CASES)), []

    def work(name: str) -> None:
        start.wait(timeout=60)
        wrong.extend(name for _ in range(2) if digest(outcome(name)) != expected[name])

    workers = [threading.Thread(target=work, args=(name,)) for name in CASES]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def print_outcomes() -> None:
    for name in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            sys.stdout.write(digest(outcome(name, dtype)) + "\n")


@pytest.mark.slow
def test_processes_with_different_numbers_of_threads_have_the_same_bits():
    told = []
    for count in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", "import test_determinism; test_determinism.print_outcomes()"],
            env={**os.environ, "OMP_NUM_THREADS": count, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        told.append(done.stdout.splitlines())
    assert told[0] == told[1]
    assert len(set(told[0])) == 2 * len(CASES)


class Small(nn.Module):
    """Our convolution, pool and ReLU, and a dropout, which no attack may draw for."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.head = Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(max_pool2d(self.conv(x), 4, relu=True).mean((2, 3))))


ATTACKS = {
    "pgd": lambda *a: pgd(*a[:2], "untargeted", a[2], num_steps=1, random_start=True, restarts=2),
    "apgd": lambda *a: apgd(*a, num_steps=2).adversarial,
    "square": lambda *a: square(*a, num_queries=4).adversarial,
    "smooth_grad": lambda *a: smooth_grad(*a, samples=2),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_draws_by_its_seed_alone(attack):
    """PyTorch's own generator has no part in it, nor in the images."""
    torch.manual_seed(0)
    model, x, y = Small(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    expected = ATTACKS[attack](model, x, y)
    torch.manual_seed(1)
    assert torch.equal(ATTACKS[attack](model, x, y), expected)


def test_batches_have_the_same_bits_with_any_number_of_threads(threads):
    data, _ = load_data("fashion-mini", 32, limit_train=60, limit_val=10, console=Console(quiet=True))
    augmentation = Augmentation(flip=True, colour=0.2, rotate=10.0, crop_area=0.5, crop_ratio=0.2)
    feeder = Feeder(
        data, batch_size=20, image_size=32, device=torch.device("cpu"), memory_format=torch.channels_last,
        augmentation=augmentation, seed=3,
    )

    def fed(count: int) -> list[str]:
        threads(count)
        torch.manual_seed(count)
        return [digest(batch) for epoch in (0, 1) for batch in feeder.epoch(epoch)]

    first = fed(1)
    assert len(set(first)) == 6
    assert fed(1) == fed(2) == first


def kept(folder: Path) -> tuple[str, str]:
    """The weights and the optimiser's state of last.pt, and the losses."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    states = saved["optimizer"]["state"].values()
    tensors = (*saved["model"].values(), *(value for state in states for value in state.values()))
    return digest(tensors), (folder / "steps.csv").read_text()


RUN = (
    "simplenet", "--device", "cpu", "--recipe", "modern", "--epochs", 2, "--batch-size", 8, "--limit-train", 24,
    "--limit-val", 10,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("conv", "counts"), [("triton", (1, 1, 2)), ("torch", (1, 1)), ("torch", (2, 2))])
def test_the_same_command_trains_to_the_same_bits(conv, counts, threads, train_run, tmp_path):
    """PyTorch's own convolution adds up a weight gradient otherwise on more threads; the kernels' training uses one."""
    runs = []
    for number, count in enumerate(counts):
        threads(count)
        torch.manual_seed(number)
        assert train_run(*RUN, "--conv", conv, "--out", f"run{number}")[0] == 0
        assert torch.get_num_threads() == count
        runs.append(kept(tmp_path / f"run{number}"))
    assert all(run == runs[0] for run in runs)


@pytest.mark.soak
@pytest.mark.parametrize("model", ["customnet", "simplevit"])
@pytest.mark.parametrize("flags", [(), ("--adversarial",), ("--amp", "bf16")], ids=["plain", "adversarial", "bf16"])
def test_so_do_the_models_that_draw_and_normalise(model, flags, train_run, tmp_path):
    for number in (0, 1):
        torch.manual_seed(number)
        assert train_run(model, *RUN[1:], *flags, "--conv", "torch", "--out", f"run{number}")[0] == 0
    assert kept(tmp_path / "run0") == kept(tmp_path / "run1")
