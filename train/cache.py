"""Decoded images on disk: every image file is read once, into one memory-mapped file of uint8 (N, 3, S, S).

A cache file is three pieces, so that the images start on a page:

    images   N * 3 * S * S bytes
    table    N rows of (source, pixels): which state of which file was decoded, and the CRC-32 of what came of it
    footer   magic with the format's version, N, S

It is written under the name `*.part`, an image and then its row, and takes its own name when it is whole. A row is
therefore the flag that its image is done: a build that was killed is taken up where it was, and one that stopped at a
broken image goes on there once that file is mended. A file whose rows do not name the files as they are now, or whose
size is not what its footer says, is built anew.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from train.cli import UserError
from train.folder import read_square

ROW = np.dtype([("source", "<u8"), ("pixels", "<u4")])
FOOTER = struct.Struct("<8sQQ")
MAGIC = b"convlab2"  # another last character where read_square makes other pixels of the same file
IMAGES_A_TASK = 8  # few enough that Ctrl-C is answered at once, many enough that handing them out costs nothing


def default_folder() -> Path:
    """$XDG_CACHE_HOME/conv-lab, or ~/.cache/conv-lab; raises UserError where neither is known."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG specification: a relative one is to be ignored
        return Path(named, "conv-lab")
    try:
        return Path.home() / ".cache" / "conv-lab"
    except RuntimeError as error:
        raise UserError("no home folder to keep decoded images in; name a folder with --cache") from error


def decode_once(
    paths: Sequence[str], side: int, *, root: Path, part: str, folder: Path, console: Console
) -> tuple[Tensor, np.ndarray]:
    """The images at `paths` under `root` as read_square makes them, out of `folder` where they are already there.

    Returns the read-only (N, 3, side, side) uint8 and the (N,) uint32 CRC-32 of each image. `part` ("train",
    "val-100") tells apart the caches of one root. Raises UserError naming a file that cannot be read, or the folder
    where it cannot be written.
    """
    sources = np.array([source_key(path, str(root)) for path in paths], np.uint64)
    with keeping(folder, "decoded images"):
        path = folder / file_name(root, part, side)
        found = open_cache(path, sources, side)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(path, console):
                found = open_cache(path, sources, side)  # the process we waited for may have made it
                if found is None:
                    build(path, paths, sources, side, console)
                    found = open_cache(path, sources, side)
    return found


def source_key(path: str, root: str) -> int:
    """64 bits that differ when the file is another, or was written to."""
    state = os.stat(path)
    text = f"{path.removeprefix(root)}\0{state.st_size}\0{state.st_mtime_ns}"
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def file_name(root: Path, part: str, side: int) -> str:
    """One name for one use of a folder, so that what has become stale is written over and does not pile up."""
    absolute = root.absolute()
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]
    return f"{absolute.name[:40]}-{part}-{side}px-{digest}.images"


def open_cache(path: Path, sources: np.ndarray, side: int) -> tuple[Tensor, np.ndarray] | None:
    """The images and their checksums, or None where the file is not there, not whole, or of other image files."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        rows = read_rows(file.fileno(), side)
        if not np.array_equal(rows["source"], sources):
            return None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # PyTorch has no read-only tensors and says so. A writable private map would do too, but the kernel may refuse
        # one that is larger than the machine's memory.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        images = torch.frombuffer(mapped, dtype=torch.uint8, count=len(rows) * 3 * side * side)
    return images.view(-1, 3, side, side), rows["pixels"]


def read_rows(fd: int, side: int) -> np.ndarray:
    """(N,) ROW out of a cache file, done or not; none where it is no whole file of images of that side."""
    size = os.fstat(fd).st_size
    footer = os.pread(fd, FOOTER.size, max(0, size - FOOTER.size))
    if len(footer) == FOOTER.size:
        magic, count, stored_side = FOOTER.unpack(footer)
        if (magic, stored_side, size) == (MAGIC, side, cache_bytes(count, side)):
            return np.frombuffer(os.pread(fd, count * ROW.itemsize, count * 3 * side * side), ROW)
    return np.empty(0, ROW)


def cache_bytes(count: int, side: int) -> int:
    return count * (3 * side * side + ROW.itemsize) + FOOTER.size


def build(path: Path, paths: Sequence[str], sources: np.ndarray, side: int, console: Console) -> None:
    """Makes the cache file `path`, going on with its `.part` file if there is one."""
    part = path.with_name(f"{path.name}.part")
    fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            rows = prepare(fd, sources, side)
        except OSError:
            part.unlink()  # most likely the disk is full: leave none of it taken
            raise
        title = f"decoding images into {path.parent} ({cache_bytes(len(paths), side) / 1e9:.1f} GB)"
        tasks = [range(i, min(i + IMAGES_A_TASK, len(paths))) for i in range(0, len(paths), IMAGES_A_TASK)]
        # Threads: Pillow decodes and scales outside the interpreter's lock. On 128 px JPEGs processes were 7% faster
        # on two cores, but forking beside PyTorch's threads, or importing it again in each, costs more than that.
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            done = pool.map(lambda task: decode_into(fd, task, paths, sources, rows, side), tasks)
            for _ in track(done, title, len(tasks), console=console, transient=True, disable=not console.is_terminal):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(fd)  # or a power failure could leave a whole name on half a file
        os.replace(part, path)
    finally:
        os.close(fd)


def prepare(fd: int, sources: np.ndarray, side: int) -> np.ndarray:
    """The `.part` file at its full size with its table and footer; returns the rows, zero where nothing is done.

    Images lie at the same offset whatever their number is, so those before a file that was added or removed stay.
    All blocks are allocated here: a full disk is an error now and not after an hour.
    """
    old = read_rows(fd, side)
    count = len(sources)
    rows = np.zeros(count, ROW)
    common = min(count, len(old))
    same = old["source"][:common] == sources[:common]
    rows[:common][same] = old[:common][same]
    size = cache_bytes(count, side)
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)
    write_at(fd, rows.tobytes() + FOOTER.pack(MAGIC, count, side), count * 3 * side * side)
    return rows


def decode_into(
    fd: int, task: range, paths: Sequence[str], sources: np.ndarray, rows: np.ndarray, side: int
) -> None:
    """Brings the images of `task` and their rows into the file, but for those that are there already."""
    image_bytes = 3 * side * side
    table = len(paths) * image_bytes
    for i in task:
        offset = i * image_bytes
        # The checksum finds rows that reached the disk before a power failure when their images did not.
        if rows["source"][i] == sources[i] and rows["pixels"][i] == zlib.crc32(os.pread(fd, image_bytes, offset)):
            continue
        pixels = read_square(paths[i], side).transpose(2, 0, 1).tobytes()
        write_at(fd, pixels, offset)
        row = np.array((sources[i], zlib.crc32(pixels)), ROW)
        write_at(fd, row.tobytes(), table + i * ROW.itemsize)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """All of `data`; a disk that fills up may take a piece before it says so."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def one_at_a_time(path: Path, console: Console) -> Iterator[None]:
    """Of all processes that want to write `path`, one is in the block; the system lets go of a killed one's lock.

    The `.lock` file stays: removed, it would be another file for those that wait than for those that come.
    """
    with open(path.with_name(f"{path.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for another process to write {path}", soft_wrap=True, highlight=False)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def keeping(folder: Path, what: str) -> Iterator[None]:
    """A folder that cannot be written or read is told in one line, with the flag that names another."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot keep {what} in {folder}: {reason}; name another folder with --cache") from error
