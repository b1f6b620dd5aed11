"""What a command attacks: a checkpoint's model and the images it is attacked on, in the space its sizes live in."""

import argparse
import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import models
from attacks.ball import Bounds
from train import shortage
from train.batches import val_batches
from train.checkpoint import checkpoint_file, load_model, require_same_model, settings_of
from train.cli import UserError, number, path
from train.data import Dataset, load_val, source, spread
from train.devices import OutOfMemory, needing_memory, pick_device, telling_of_memory
from train.distributed import World
from train.files import make_folder
from train.loop import layout
from train.recipes import Settings
from train.rehearsal import Attack, step_of
from train.report import backend_of, describe_backend, device_name, git_commit, versions

BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model and the validation images to attack it on."""

    file: Path
    sha256: str
    """Of the file."""
    epoch: int
    """After which the model was kept."""
    trained: Settings
    """What it was trained with."""
    settings: Settings
    """The same, with what was typed in place of it."""
    model: nn.Module
    """In eval mode on `device`."""
    data: Dataset
    device: torch.device
    batch_size: int
    world: World

    @property
    def backend(self) -> str:
        """"compiled", "interpreter" or "native"."""
        return backend_of(self.settings.conv, self.device)

    @property
    def batch_count(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Normalised images (B, 3, S, S) and labels (B,), all of them in order."""
        return val_batches(
            self.data, batch_size=self.batch_size, image_size=self.settings.image_size, device=self.device,
            memory_format=layout(self.settings),
        )

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` of the images, evenly over the classes, and their labels; all where there are fewer."""
        chosen = torch.from_numpy(spread(self.data.labels.numpy(), count))
        few = replace(self, data=replace(self.data, images=self.data.images[chosen], labels=self.data.labels[chosen]))
        parts = list(few.batches())
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def computed_by(self, conv: str) -> "Subject":
        """The same weights through another convolution. RuntimeError where it cannot run on the device."""
        settings = replace(self.settings, conv=conv)
        backend_of(conv, self.device)
        model = models.build(settings.model, conv, len(self.data.classes), settings.image_size, fuse=settings.fuse)
        model.load_state_dict(self.model.state_dict())
        model = model.to(self.device, memory_format=layout(settings)).eval()
        return replace(self, settings=settings, model=model)

    def conditions(self) -> dict[str, Any]:
        """Everything that a figure needs beside it, for JSON."""
        return {
            "checkpoint": str(self.file), "checkpoint_sha256": self.sha256, "epoch": self.epoch,
            "model": self.settings.model, "conv": self.settings.conv, "backend": self.backend,
            "device": device_name(self.device), "processes": self.world.size, "data": self.settings.data,
            "data_fingerprint": self.data.fingerprint, "images": len(self.data), "classes": len(self.data.classes),
            "image_size": self.settings.image_size, "batch_size": self.batch_size,
            "precision": "float32, convolutions in TF32" if uses_tf32(self.device) else "float32",
            "versions": versions(), "commit": git_commit(),
        }


def uses_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions are computed in TF32, by PyTorch's switch, which our kernels follow too."""
    return device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"


def describe(report: dict[str, Any]) -> str:
    """What a report's conditions say of the images, the model and where it was computed, in a sentence or two."""
    images = f"{report['images']:,} image{'s' if report['images'] > 1 else ''}"
    return (
        f"{images} of {report['classes']} classes, {report['image_size']} px, {report['data']}; "
        f"{report['model']}, {report['checkpoint']}, epoch {report['epoch']}; "
        f"{describe_backend(report['backend'], report['device'])}, {report['precision']}."
    )


class InPixels(nn.Module):
    """A model of pixels 0 ... 1 out of one of normalised images, so that sizes, lengths and bounds are of pixels."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K)."""
        return self.model((pixels - self.mean) / self.std)


@dataclass(frozen=True, slots=True)
class Space:
    """Where an attack's sizes live: in the normalised images that the network sees, or in pixels 0 ... 1."""

    name: str
    """"normalized" or "pixel"."""
    mean: Tensor
    """(3, 1, 1), as is std: of the normalisation."""
    std: Tensor
    clamp: bool
    """Whether pixels are kept within 0 ... 1."""

    @property
    def range(self) -> float:
        """From the least valid pixel to the greatest, of the channel where that is farthest."""
        return 1.0 if self.name == "pixel" else 1 / self.std.min().item()

    @property
    def bounds(self) -> Bounds | None:
        if not self.clamp:
            return None
        return (0.0, 1.0) if self.name == "pixel" else (-self.mean / self.std, (1 - self.mean) / self.std)

    def model(self, model: nn.Module) -> nn.Module:
        """As a model of images of this space."""
        return InPixels(model, self.mean, self.std) if self.name == "pixel" else model

    def enter(self, x: Tensor) -> Tensor:
        """Normalised images -> images of this space."""
        return x * self.std + self.mean if self.name == "pixel" else x

    def pixels(self, x: Tensor) -> Tensor:
        """Images of this space -> pixels, 0 ... 1 but for those that an attack has moved beyond."""
        return x if self.name == "pixel" else x * self.std + self.mean

    def describe(self) -> str:
        where = "in pixels of 0 to 1" if self.name == "pixel" else "in normalised space"
        return f"sizes {where}, pixels {'kept within their range' if self.clamp else 'not clamped'}"


def make_space(subject: Subject, name: str = "normalized", *, clamp: bool = False) -> Space:
    mean, std = (
        torch.tensor(moment, device=subject.device).view(3, 1, 1) for moment in (subject.data.mean, subject.data.std)
    )
    return Space(name, mean, std, clamp)


# ---------------------------------------------------------------- the options that all attacks share


def add_options(parser: argparse.ArgumentParser, *, files: str) -> None:
    """CHECKPOINT... and what decides the images, the convolution and the place; `files` says what --out gets."""
    add = parser.add_argument
    whole = number(int, above=0)
    add("checkpoints", type=path, nargs="+", metavar="CHECKPOINT",
        help="a .pt file of a run, or the run folder (its best.pt)")
    add("--data", type=source, metavar="fashion-mini|fashion-mnist|PATH",
        help="images of the same classes (default: the checkpoint's own)")
    add("--conv", choices=list(models.CONVOLUTIONS), help="which convolution computes it (default: as it was trained)")
    add("--limit", type=whole, metavar="N", help="use only N validation images, evenly over the classes")
    add("--batch-size", type=whole, default=BATCH_SIZE, metavar="N", help=f"images a batch ({BATCH_SIZE})")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: auto, the GPU if any)")
    add("--out", type=path, metavar="DIR",
        help=f"for {files}, in place of earlier ones (default: beside the checkpoint; of several checkpoints each gets "
        "a folder in DIR)")


def load_subject(checkpoint: Path, arguments: argparse.Namespace, console: Console, world: World) -> Subject:
    """Raises UserError for a checkpoint or images that are missing, damaged or do not fit each other."""
    device = world.device(pick_device(arguments.device).type)
    file = checkpoint_file(checkpoint)
    with needing_memory(f"the weights of {file} on {device_name(device)}"):
        model, saved = load_model(file, conv=arguments.conv, device=device)
    typed = {name: value for name in ("data", "conv") if (value := getattr(arguments, name)) is not None}
    settings = settings_of(file, saved, **typed, limit_val=arguments.limit)
    try:
        backend_of(settings.conv, device)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    data = load_val(
        settings.data, settings.image_size, limit=settings.limit_val, console=console,
        cache=Path(settings.cache) if settings.cache else None,
    )
    require_same_model(file, saved, settings.model, data.classes)
    return Subject(
        file=file, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), epoch=saved["epoch"],
        trained=settings_of(file, saved), settings=settings, model=model.to(memory_format=layout(settings)), data=data,
        device=device, batch_size=arguments.batch_size, world=world,
    )


def each_subject(
    arguments: argparse.Namespace, console: Console, world: World, work: Callable[[Subject, Path], dict[str, Any]],
    *, check: Callable[[Subject], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """work(subject, its folder for files) of each checkpoint, in turn.

    Mistakes in any, for `check` to raise UserError for, are told before the first.
    """
    folders = make_folders(arguments.checkpoints, arguments.out)
    for checkpoint in arguments.checkpoints:
        check(load_subject(checkpoint, arguments, console, world))
    reports = []
    for checkpoint, folder in zip(arguments.checkpoints, folders, strict=True):
        make_folder(folder)
        # Again, for of many models only one is kept in memory; what there is to tell has been told.
        subject = load_subject(checkpoint, arguments, Console(quiet=True), world)
        try:
            with telling_of_memory("attack"):
                reports.append(work(subject, folder))
        except OutOfMemory as error:
            settings = replace(subject.settings, amp="off")  # attacks take gradients in full precision
            step = step_of(settings, -(-min(subject.batch_size, len(subject.data)) // world.size))
            raise UserError(
                shortage.describe(
                    step, subject.device, settings, flag="--batch-size", work=Attack, processes=world.size
                )
                + "; or take fewer images for checks and pictures"
            ) from error
    return reports


def size(text: str) -> float:
    """An argparse type: a number above 0, or a fraction as 8/255."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ArithmeticError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    return number(float, above=0)(repr(value))


def make_folders(checkpoints: Sequence[Path], out: Path | None) -> list[Path]:
    """Where the files of each checkpoint go. UserError where two would share a folder."""
    files = [checkpoint_file(checkpoint) for checkpoint in checkpoints]
    if out is None:
        folders = [file.parent for file in files]
    elif len(files) == 1:
        folders = [out]
    else:
        named = [checkpoint.name if checkpoint.is_dir() else checkpoint.stem for checkpoint in checkpoints]
        if len(set(named)) < len(named):  # last.pt of several runs
            named = [f"{file.parent.name}-{file.stem}" for file in files]
        folders = [out / name for name in named]
    if len(set(folders)) < len(folders):
        raise UserError("two of the checkpoints would write the same files; attack them one by one with --out")
    return folders
