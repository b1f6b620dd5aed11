"""Fashion-MNIST in full (Zalando Research, MIT licence): 60,000 training and 10,000 test images, 28 px, grey.

It is four IDX files, which Debian's package `dataset-fashion-mnist` brings and torchvision can download.
"""

import contextlib
import gzip
import io
import math
import os
import shutil
import socket
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
from rich.console import Console
from torchvision.datasets import FashionMNIST

from train.cache import keeping, one_at_a_time
from train.cli import UserError
from train.fashion_mini import CLASSES

DEBIAN_SOURCE = Path("/usr/share/datasets/fashion-mnist")
# The names of fashion_mini's arrays -> the files, which may also end with .gz.
FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "val_images": "t10k-images-idx3-ubyte",
    "val_labels": "t10k-labels-idx1-ubyte",
}
SIDE = 28
MOST_BYTES = 2**30  # of one array; the largest, of the training images, has 47 million
SECONDS_OF_SILENCE = 30  # of a server, before the download is given up


def find_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def holds_files(folder: Path) -> bool:
    """Whether any of the four is there: enough to know what `folder` is meant to be."""
    return any(find_file(folder, stem) for stem in FILES.values())


def is_whole(folder: Path) -> bool:
    return all(find_file(folder, stem) for stem in FILES.values())


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """train_images (N, 28, 28), train_labels (N,), val_images, val_labels; uint8. Raises UserError naming a file."""
    arrays = {}
    for name, stem in FILES.items():
        path = find_file(folder, stem)
        if path is None:
            raise UserError(f"{folder} has no {stem} (or {stem}.gz), one of the four files of Fashion-MNIST")
        arrays[name] = read_idx(path)
        fits = arrays[name].shape[1:] == (SIDE, SIDE) if name.endswith("images") else arrays[name].ndim == 1
        if not fits or not len(arrays[name]):
            raise UserError(f"{path} holds an array of {arrays[name].shape}, which Fashion-MNIST has not")
        if name.endswith("labels"):
            images = arrays[name.replace("labels", "images")]
            if len(images) != len(arrays[name]):
                raise UserError(f"{path} holds {len(arrays[name]):,} labels for {len(images):,} images")
            if arrays[name].max() >= len(CLASSES):
                raise UserError(f"{path} holds label {arrays[name].max()}; Fashion-MNIST has {len(CLASSES)} classes")
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file: two zero bytes, type 8, number of axes, big-endian sizes, data.

    No more is unpacked than its sizes ask for, and those may ask for MOST_BYTES.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic, axes = file.read(3), file.read(1)
            header = file.read(4 * ord(axes)) if axes else b""
            if magic != b"\0\0\x08" or not axes or len(header) < 4 * ord(axes):
                raise UserError(f"{path} is not an IDX file of unsigned bytes")
            sizes = tuple(int(size) for size in np.frombuffer(header, ">u4"))
            count = math.prod(sizes)
            if count > MOST_BYTES:
                raise UserError(f"{path} is damaged: it claims an array of {sizes}")
            raw = file.read(count + 1)  # one more, which also has gzip compare its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(raw) != count:
        found = f"{len(raw):,}" if len(raw) < count else f"more than {count:,}"
        raise UserError(f"{path} is damaged: {found} bytes for an array of {sizes}")
    return np.frombuffer(raw, np.uint8).reshape(sizes)


def locate(cache: Path, console: Console) -> Path:
    """A folder with the four files: Debian's, else one in `cache`, into which they are downloaded if need be."""
    folder = cache / "fashion-mnist"
    for place in (DEBIAN_SOURCE, folder):
        if is_whole(place):
            return place
    with keeping(cache, "Fashion-MNIST"):
        cache.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder, console):
            if not is_whole(folder):
                download(folder, console)
    return folder


def download(folder: Path, console: Console) -> None:
    """Fills `folder` with files whose checksums torchvision has compared; those it got before it failed stay."""
    part = folder.with_name("fashion-mnist.part")
    console.print(f"downloading Fashion-MNIST (30 MB) into {folder}", soft_wrap=True, highlight=False)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)  # torchvision sets none, and would wait for ever
    # torchvision draws its progress bar on any stderr.
    quiet = contextlib.nullcontext() if console.is_terminal else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            FashionMNIST(part, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())  # torchvision's takes several lines
        raise UserError(
            f"cannot download Fashion-MNIST into {part}: {reason}; install Debian's package dataset-fashion-mnist, "
            f"or give --data a folder that holds {', '.join(FILES.values())}"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    folder.mkdir(exist_ok=True)
    for stem in FILES.values():
        packed = part / "FashionMNIST" / "raw" / f"{stem}.gz"  # its checksum was compared; an unpacked one may be half
        if packed.exists():  # else moved by a process that was killed before the last of them
            os.replace(packed, folder / packed.name)
    shutil.rmtree(part)
