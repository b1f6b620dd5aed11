"""Fixtures that more than one test file uses."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
import reference
import torch
from PIL import Image
from rich.console import Console

import attacks.run.command
import train.run
from kernels import interpreter, ops, tiles
from kernels.runtime import Target
from train.data import load_data
from train.distributed import World
from train.loop import Trainer
from train.recipes import RECIPES

BY_HAND = {"soak": "make soak", "long": "pytest -m long"}
"""Markers of tests that run only when they are asked for, and by what."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where the tests marked on_device, the convolutions', make their tensors; cuda skips all others",
    )


def pytest_configure(config: pytest.Config) -> None:
    reference.DEVICE = torch.device(config.getoption("--device"))
    if reference.DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no GPU here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, command in BY_HAND.items():
        if marker not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(f"takes many minutes: {command}"))
    if reference.DEVICE.type == "cpu":
        return
    for item in items:
        cpu_only = item.get_closest_marker("cpu_only")
        if cpu_only is not None:
            item.add_marker(pytest.mark.skip(f"CPU only: {cpu_only.args[0]}"))
        elif item.get_closest_marker("on_device") is None:
            item.add_marker(pytest.mark.skip("not marked on_device: it makes its tensors on the CPU"))


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    """Under --device cuda PyTorch's factories make tensors there, and float32 is not rounded to TF32 unless asked."""
    if reference.DEVICE.type == "cpu":
        yield
        return
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    torch.set_default_device(reference.DEVICE)
    try:
        yield
    finally:
        torch.set_default_device(None)
        conv.fp32_precision = before


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images are never kept in the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make_images() -> Callable[..., Path]:
    """make_images(root, {"train/cat": 3, ...}) writes that many small distinct JPEGs into each folder."""

    def make(root: Path, counts: dict[str, int], size: tuple[int, int] = (24, 20)) -> Path:
        noise = np.random.default_rng(0)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{i:03}.jpg")
        return root

    return make


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """run_main(command.main, "--flag", 1) -> (exit code, stdout, stderr), run in this process inside tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[list[str]], None], *arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def train_run(run_main: Callable) -> Callable:
    """train_run("simplenet", "--epochs", "1") -> (exit code, stdout, stderr)."""
    return partial(run_main, train.run.main)


@pytest.fixture(scope="session")
def tiny_run() -> tuple[str, ...]:
    """Arguments of a training that takes a second: three epochs of four steps with PyTorch's convolution."""
    return (
        "simplenet", "--conv", "torch", "--device", "cpu",
        "--epochs", "3", "--batch-size", "16", "--limit-train", "64", "--limit-val", "20",
    )


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """make_trainer("quick", epochs=2) -> a Trainer of three steps an epoch; keywords replace the recipe's settings."""

    def make(recipe: str = "quick", **changes: object) -> Trainer:
        tiny = {
            "conv": "torch", "device": "cpu", "image_size": 32, "epochs": 1, "batch_size": 4, "limit_train": 12,
            "limit_val": 8, "eval_batch_size": 4,
        }
        settings = dataclasses.replace(RECIPES[recipe], **(tiny | changes))
        data = load_data(
            settings.data, settings.image_size, limit_train=settings.limit_train, limit_val=settings.limit_val,
            console=Console(quiet=True),
        )
        return Trainer(settings, *data, torch.device("cpu"), tmp_path, World())

    return make


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a SimpleNet that is right on about 60% of fashion-mini; trained once, in seconds, and only read."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.run.main([
        "simplenet", "--conv", "torch", "--device", "cpu", "--epochs", "6", "--limit-train", "320",
        "--limit-val", "40", "--out", str(folder),
    ])
    return folder


@pytest.fixture
def attack_run(run_main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """attack_run("sweep", "run", ...) -> (exit code, stdout, stderr): the attacking command on ten images."""
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: run_main(
        attacks.run.command.main, *arguments, "--device", "cpu", "--limit", 10, "--batch-size", 4
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launchers called, in order."""
    calls = []
    for name in ("forward", "input_grad", "weight_grad"):
        launcher = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _f=launcher, _n=name, **k: calls.append(_n) or _f(*a, **k))
    return calls


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(lowest, highest) address of each block that interpreted kernels load, masked elements included."""
    seen = []
    load = interpreter._load

    def record(pointers, *arguments):
        addresses = np.asarray(pointers.data)
        seen.append((int(addresses.min()), int(addresses.max())))
        return load(pointers, *arguments)

    monkeypatch.setattr(interpreter, "_load", record)
    return seen


@pytest.fixture
def gpu_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """gpu_tiles("sm_80") makes interpreted launches take the tiles, and the splits, of that GPU."""

    def use(arch: str) -> None:
        gpu = Target(arch, 8)
        candidates = tiles.candidates
        getattr(candidates, "cache_clear", int)()  # tests look at what it looks up
        monkeypatch.setattr(tiles, "candidates", lambda op, _, *a: candidates(op, gpu, *a))
        transposes = tiles.transposes_weights
        monkeypatch.setattr(tiles, "transposes_weights", lambda op, _, *a: transposes(op, gpu, *a))
        for name in ("depthwise_tile", "splits", "takes_windows", "packs_classes"):
            pick = getattr(tiles, name)
            monkeypatch.setattr(tiles, name, lambda _, *a, _pick=pick, **k: _pick(gpu, *a, **k))

    return use


@pytest.fixture(scope="session")
def server() -> faults.Server:
    """Forks commands that a fault is to reach."""
    return faults.warm_server()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two classes, for a cache to be built of."""
    return faults.make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def cached(server: faults.Server, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache of them as one build makes it, by its files' names."""
    folder = tmp_path_factory.mktemp("cached")
    faults.run_whole(server, *faults.decoding(photos), folder=folder, setup=faults.SLOW_DECODING)
    assert (folder / "log").stat().st_size == faults.PHOTOS
    return faults.cache_bytes(folder)
