"""The images a model learns from, as one type, and the sources they come from.

Images are kept as uint8, square, at 1.125 times the side the network sees (36 for 32, 144 for 128): a training batch
is cropped from that at random, a validation batch from its centre.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from train import fashion_mini, fashion_mnist
from train.cache import decode_once, default_folder
from train.cli import UserError, path
from train.folder import list_folder, without_warnings
from train.miniplaces import is_miniplaces, list_miniplaces

# Per channel, of ImageNet's pixels scaled to 0..1. Every image is normalised with these two, whatever its source.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FASHION_MINI, FASHION_MNIST = NAMED = ("fashion-mini", "fashion-mnist")  # sources that are no paths


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Labelled images of one size."""

    images: Tensor
    """(N, 3, S, S) uint8, or (N, 1, S, S) where they are grey; read-only where they lie in a file."""
    labels: Tensor
    """(N,) int64, indices into `classes`."""
    classes: tuple[str, ...]
    name: str
    """What the user asked for with --data."""
    fingerprint: str
    """Of images, labels and classes."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.labels)


def source(text: str) -> str:
    """An argparse type: one of NAMED, or the absolute path of a folder, which holds from any other too."""
    return text if text in NAMED else str(path(text).absolute())


def shows_garments(source: str) -> bool:
    """Whether a source is Fashion-MNIST, by name or as a folder of its files, and not photographs."""
    return source in NAMED or fashion_mnist.holds_files(Path(source))


def default_image_size(source: str) -> int:
    """The side the network sees unless --image-size says otherwise: 32 for garments, 128 for photographs."""
    return 32 if shows_garments(source) else 128


def stored_size(image_size: int) -> int:
    """The side at which images are kept for a network that sees `image_size` pixels."""
    return round(image_size * 1.125)


def load_data(
    source: str,
    image_size: int,
    *,
    limit_train: int | None,
    limit_val: int | None,
    console: Console,
    cache: Path | None = None,
) -> tuple[Dataset, Dataset]:
    """(train, val) from fashion-mini, fashion-mnist or a folder: MiniPlaces, IDX files or class folders.

    A limit keeps that many images, as evenly over the classes as it goes. Images of a folder are decoded once and
    kept in `cache` (train.cache's default_folder() unless given). Raises UserError naming what is wrong.
    """
    train, val = load_parts(source, image_size, {"train": limit_train, "val": limit_val}, console, cache)
    return train, val


def load_val(
    source: str, image_size: int, *, limit: int | None, console: Console, cache: Path | None = None
) -> Dataset:
    """`load_data`'s validation images alone; of a folder that has a part for them, no other is looked at."""
    (val,) = load_parts(source, image_size, {"val": limit}, console, cache)
    return val


def load_parts(
    source: str, image_size: int, limits: dict[str, int | None], console: Console, cache: Path | None
) -> list[Dataset]:
    """The parts that `limits` names, in its order."""
    if source == FASHION_MINI:
        return frame_arrays(fashion_mini.load_arrays(), source, image_size, limits)
    cache = cache or default_folder()
    root = Path(source)
    if source == FASHION_MNIST:
        root = fashion_mnist.locate(cache, console)
    if fashion_mnist.holds_files(root):
        return frame_arrays(fashion_mnist.load_arrays(root), source, image_size, limits)
    if is_miniplaces(root):
        train, val, notice = list_miniplaces(root)
    else:
        train, val, notice = list_folder(root, need_train="train" in limits)
    if notice:
        console.print(notice, soft_wrap=True, highlight=False)
    parts = []
    for part in limits:
        files = {"train": train, "val": val}[part]
        kept = spread(np.array(files.labels), limits[part])
        with without_warnings():
            images, checksums = decode_once(
                [files.paths[i] for i in kept],
                stored_size(image_size),
                root=root,
                part=part if len(kept) == len(files.labels) else f"{part}-{len(kept)}",
                folder=cache,
                console=console,
            )
        labels = np.array(files.labels, np.int64)[kept]
        parts.append(
            Dataset(
                images=images,
                labels=torch.from_numpy(labels),
                classes=files.classes,
                name=source,
                fingerprint=fingerprint(checksums, labels, files.classes),
            )
        )
    return parts


def frame_arrays(
    arrays: dict[str, np.ndarray], source: str, image_size: int, limits: dict[str, int | None]
) -> list[Dataset]:
    """Fashion-MNIST's 28 px, grey on black, framed to 36 px, so that any 32 px crop holds the whole garment."""
    parts = []
    for part, limit in limits.items():
        labels = arrays[f"{part}_labels"].astype(np.int64)
        kept = spread(labels, limit)
        grey = torch.from_numpy(arrays[f"{part}_images"][kept])[:, None]  # (N, 1, 28, 28)
        framed = F.pad(grey, (4, 4, 4, 4))
        side = stored_size(image_size)
        if side != framed.shape[-1]:
            framed = F.interpolate(framed, (side, side), mode="bilinear", antialias=True, align_corners=False)
        parts.append(
            Dataset(
                images=framed,
                labels=torch.from_numpy(labels[kept]),
                classes=fashion_mini.CLASSES,
                name=source,
                fingerprint=fingerprint(framed.numpy(), labels[kept], fashion_mini.CLASSES),
            )
        )
    return parts


def fingerprint(pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> str:
    """The same for the same pictures, labels and names, wherever they lie; `pixels` may be their checksums.

    Those of decoded images are of when they were decoded: what is written into a cache's file later goes unnoticed.
    """
    digest = hashlib.sha256(json.dumps(classes).encode())
    for array in (labels, pixels):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def spread(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of `limit` images in their order: the first of each class, then the second of each, and so on."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # an image's place within its class
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        rank[mine] = np.arange(len(mine))
    return np.sort(np.argsort(rank, kind="stable")[:limit])


def require_classes(data: Dataset) -> None:
    """Raises UserError unless there are two classes to tell apart."""
    if len(data.classes) < 2:
        raise UserError(f"{data.name} holds one class, {data.classes[0]!r}; training needs two or more")
