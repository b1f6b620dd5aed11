"""A plain folder of images: PATH/train/<class>/* and PATH/val/<class>/*, or PATH/<class>/* split in two."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from train.cli import UserError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VAL_EVERY = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """Image files with their labels, class after class, in name order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def list_folder(root: Path) -> tuple[ImageFiles, ImageFiles, str]:
    """(train, val, a notice of how it was split or ""); raises UserError naming the folder that is wrong."""
    if not root.is_dir():
        raise UserError(f"no data folder {str(root)!r}; --data takes fashion-mini or a folder of class folders")
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    if has_train != has_val:
        there, missing = ("train", "val") if has_train else ("val", "train")
        raise UserError(f"{root} has a {there} folder but no {missing} folder")
    if has_train:
        train, val = images_by_class(root / "train"), images_by_class(root / "val")
        if train.keys() != val.keys():
            odd = sorted(train.keys() ^ val.keys())[0]
            raise UserError(f"class {odd!r} is in only one of {root / 'train'} and {root / 'val'}")
        return flatten(train), flatten(val), ""
    classes = images_by_class(root)
    for name, paths in classes.items():
        if len(paths) < 2:
            raise UserError(f"class folder {root / name} holds one image; a split needs two or more")
    # The first is always among them, so that every class has a validation image however small it is.
    val = {name: paths[::VAL_EVERY] for name, paths in classes.items()}
    train = {name: [p for i, p in enumerate(paths) if i % VAL_EVERY] for name, paths in classes.items()}
    notice = f"{root} has no train and val folders: every {VAL_EVERY}th image of each class, by name, is for validation"
    return flatten(train), flatten(val), notice


def images_by_class(root: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both in name order; hidden files and files that are no images do not count."""
    classes = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        visible = [p for p in folder.iterdir() if not p.name.startswith(".")]
        images = [p for p in visible if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not images:
            raise UserError(f"class folder {folder} holds no images")
        classes[folder.name] = sorted(images)
    if not classes:
        raise UserError(f"{root} holds no class folders")
    return classes


def flatten(classes: dict[str, list[Path]]) -> ImageFiles:
    pairs = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    return ImageFiles(
        paths=tuple(path for path, _ in pairs), labels=tuple(label for _, label in pairs), classes=tuple(classes)
    )


def read_images(paths: Sequence[Path], side: int, *, title: str, console: Console) -> Tensor:
    """(N, 3, side, side) uint8: short side scaled to `side`, centre square. Raises UserError naming a bad file."""
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    # Pillow decodes and scales outside the interpreter's lock, so threads use every core.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        squares = pool.map(lambda path: read_square(path, side), paths)
        quiet = not console.is_terminal
        shown = track(squares, title, total=len(paths), console=console, transient=True, disable=quiet)
        for i, square in enumerate(shown):
            images[i] = torch.from_numpy(square).permute(2, 0, 1)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def read_square(path: Path, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    try:
        with Image.open(path) as file:
            image = to_rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; transparency is dropped, 16-bit grey keeps its high byte."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, a palette with transparency makes Pillow warn
    return image.convert("RGB")
