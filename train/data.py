"""The images a model learns from, as one in-memory type, and the sources they come from.

Images are kept as uint8, square, at 1.125 times the side the network sees (36 for 32, 144 for 128): a training batch
is cropped from that at random, a validation batch from its centre.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from train import fashion_mini
from train.cli import UserError
from train.folder import list_folder, read_images

# Per channel, of ImageNet's pixels scaled to 0..1. Every image is normalised with these two, whatever its source.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FASHION_MINI = "fashion-mini"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Labelled images of one size."""

    images: Tensor
    """(N, 3, S, S) uint8."""
    labels: Tensor
    """(N,) int64, indices into `classes`."""
    classes: tuple[str, ...]
    name: str
    """What the user asked for with --data."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.labels)


def default_image_size(source: str) -> int:
    """The side the network sees unless --image-size says otherwise: 32 for fashion-mini, 128 for photographs."""
    return 32 if source == FASHION_MINI else 128


def stored_size(image_size: int) -> int:
    """The side at which images are kept for a network that sees `image_size` pixels."""
    return round(image_size * 1.125)


def load_data(
    source: str, image_size: int, *, limit_train: int | None, limit_val: int | None, console: Console
) -> tuple[Dataset, Dataset]:
    """(train, val) from fashion-mini or a folder of class folders; raises UserError naming what is wrong.

    A limit keeps that many images, as evenly over the classes as it goes.
    """
    if source == FASHION_MINI:
        return load_fashion_mini(image_size, limit_train=limit_train, limit_val=limit_val)
    train, val, notice = list_folder(Path(source))
    if notice:
        console.print(notice, soft_wrap=True, highlight=False)
    parts = []
    for title, files, limit in (("training", train, limit_train), ("validation", val, limit_val)):
        kept = spread(np.array(files.labels), limit)
        images = read_images(
            [files.paths[i] for i in kept], stored_size(image_size), title=f"reading {title} images", console=console
        )
        labels = torch.tensor(files.labels, dtype=torch.int64)[torch.from_numpy(kept)]
        parts.append(Dataset(images=images, labels=labels, classes=files.classes, name=source))
    return parts[0], parts[1]


def load_fashion_mini(
    image_size: int, *, limit_train: int | None = None, limit_val: int | None = None
) -> tuple[Dataset, Dataset]:
    """The embedded images: 28 px grey on black, framed to 36 px, so that any 32 px crop holds the whole garment."""
    arrays = fashion_mini.load_arrays()
    parts = []
    for part, limit in (("train", limit_train), ("val", limit_val)):
        labels = arrays[f"{part}_labels"].astype(np.int64)
        kept = spread(labels, limit)
        grey = torch.from_numpy(arrays[f"{part}_images"][kept])[:, None]  # (N, 1, 28, 28)
        framed = F.pad(grey, (4, 4, 4, 4))
        side = stored_size(image_size)
        if side != framed.shape[-1]:
            framed = F.interpolate(framed, (side, side), mode="bilinear", antialias=True, align_corners=False)
        parts.append(
            Dataset(
                images=framed.expand(-1, 3, -1, -1).contiguous(),
                labels=torch.from_numpy(labels[kept]),
                classes=fashion_mini.CLASSES,
                name=FASHION_MINI,
            )
        )
    return parts[0], parts[1]


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
