"""A plain folder of images: PATH/train/<class>/* and PATH/val/<class>/*, or PATH/<class>/* split in two."""

import contextlib
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from train.cli import UserError, printable

PNM = (".pbm", ".pgm", ".pnm", ".ppm")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *PNM})
# What a file may hold, whatever it is called. Pillow knows more formats, and hands one of them to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
VAL_EVERY = 5
# What Pillow raises for bytes that are no image, depending on the format and on where they are wrong.
BROKEN_IMAGE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, MemoryError,
    Image.DecompressionBombError,
)
LONGEST = 16  # times its short side: of a longer image only the middle is scaled, or a line of pixels fills the memory

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without one of its own, Pillow logs to stderr


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """Image files with their labels, indices into `classes`.

    Paths are strings: a Path takes as long to make as its file takes to find, and there may be 100,000.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def list_folder(root: Path, *, need_train: bool = True) -> tuple[ImageFiles, ImageFiles, str]:
    """(train, val, a notice of how it was split or ""); raises UserError naming the folder that is wrong.

    Images come class after class, in name order. Unless they are needed, PATH/train and its images are left alone and
    may be absent beside a PATH/val.
    """
    if not root.is_dir():
        raise UserError(f"no data folder {str(root)!r}; --data takes fashion-mini, fashion-mnist or a folder of images")
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    if has_train != has_val and (need_train or not has_val):
        there, missing = ("train", "val") if has_train else ("val", "train")
        raise UserError(f"{root} has a {there} folder but no {missing} folder")
    if has_val:
        val = images_by_class(root / "val")
        train = images_by_class(root / "train") if need_train else {name: [] for name in val}
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


def is_split(root: Path) -> bool:
    """Whether list_folder takes every VAL_EVERYth image of a folder for validation, for want of a train and a val."""
    return not any((root / part).is_dir() for part in ("train", "val"))


def images_by_class(root: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both in name order; hidden files and files that are no images do not count."""
    classes = {}
    for folder in sorted(path for path in visible(root) if leads_to(path, Path.is_dir)):
        images = [p for p in visible(folder) if p.suffix.lower() in SUFFIXES and leads_to(p, Path.is_file)]
        if not images:
            raise UserError(f"class folder {folder} holds no images")
        name = printable(folder.name)
        if name in classes:  # one has written out what is an escape of the other's
            raise UserError(f"{root} holds two class folders that are shown as {name}")
        classes[name] = sorted(images)
    if not classes:
        raise UserError(f"{root} holds no class folders")
    return classes


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def leads_to(path: Path, is_kind: Callable[[Path], bool]) -> bool:
    """is_kind(path), links followed; raises UserError for one that leads nowhere, behind which images are missing."""
    if is_kind(path):
        return True
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link that leads nowhere")
    return False


def flatten(classes: dict[str, list[Path]]) -> ImageFiles:
    pairs = [(str(path), label) for label, paths in enumerate(classes.values()) for path in paths]
    return ImageFiles(
        paths=tuple(path for path, _ in pairs), labels=tuple(label for _, label in pairs), classes=tuple(classes)
    )


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Inside the block Pillow says nothing of metadata it skips and of images it calls large.

    For the main thread: Python's list of filters is one for all threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_square(path: str, side: int) -> np.ndarray:
    """(side, side, 3) uint8: short side scaled to `side`, centre square. Raises UserError naming a bad file."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            # A large JPEG is decoded at a half, quarter or eighth, as long as twice the wanted side is left to scale.
            file.draft(file.mode, (2 * side, 2 * side))
            image = to_rgb(ImageOps.exif_transpose(file))
        return centre_square(image, side)
    except BROKEN_IMAGE as error:
        raise UserError(f"cannot read image {path}: {str(error) or 'not enough memory'}") from error


def centre_square(image: Image.Image, side: int) -> np.ndarray:
    width, height = image.size
    short = min(width, height)
    if max(width, height) > LONGEST * short:
        left, top = (max(0, length - LONGEST * short) // 2 for length in (width, height))
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    scale = side / short
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; transparency is dropped, 16-bit grey keeps its high byte.

    Raises ValueError for grey whose range is not known: floating point, and whole numbers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose white is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError(f"its pixels are {grey.min()} to {grey.max()}, and 0 to 65535 can be read")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, a palette with transparency makes Pillow warn
    return image.convert("RGB")
