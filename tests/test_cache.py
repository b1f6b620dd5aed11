"""The cache of decoded images: what is read again and what is not, whatever a build was cut short by."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from train import cache, folder
from train.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
SIDE = 16
COUNT = 40


@pytest.fixture
def photos(make_images, tmp_path):
    return make_images(tmp_path / "photos", {"cat": COUNT // 2, "dog": COUNT // 2})


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the images decoded in this process."""
    names = []

    def read_square(path, side):
        square = folder.read_square(path, side)
        names.append("/".join(Path(path).parts[-2:]))
        return square

    monkeypatch.setattr(cache, "read_square", read_square)
    return names


def files_of(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*.jpg"))


def decode(root: Path, *, side: int = SIDE, part: str = "train", console: Console | None = None):
    return cache.decode_once(
        files_of(root), side, root=root, part=part, folder=root.parent / "cache", console=console or Console(quiet=True)
    )


def expected(root: Path, side: int = SIDE) -> torch.Tensor:
    return torch.stack([torch.from_numpy(folder.read_square(path, side)).permute(2, 0, 1) for path in files_of(root)])


def cache_file(root: Path, pattern: str = "*.images") -> Path:
    (path,) = (root.parent / "cache").glob(pattern)
    return path


# A process that decodes the photos, appending each name to a log. It kills itself after some of them, waits for a file
# `gate` before the first, sleeps before each, where it is told to.
SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from rich.console import Console
from train import cache, folder

root, log, gate = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
kill_after, sleep = int(sys.argv[4]), float(sys.argv[5])
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
lock, count = threading.Lock(), 0

def read_square(path, side):
    global count
    with lock:
        if count == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        time.sleep(sleep)
        with open(log, "a") as file:
            file.write(f"{path}\\n")
    while not gate.exists():
        time.sleep(0.01)
    return folder.read_square(path, side)

cache.read_square = read_square
paths = sorted(str(path) for path in root.rglob("*.jpg"))
cache.decode_once(paths, 16, root=root, part="train", folder=root.parent / "cache", console=Console(width=500))
"""


def start(root: Path, *, kill_after: int = -1, sleep: float = 0, gate: Path = ROOT) -> subprocess.Popen:
    log = root.parent / "log"
    command = [sys.executable, "-c", SCRIPT, str(root), str(log), str(gate), str(kill_after), str(sleep)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def logged(root: Path) -> int:
    """How many images the processes decoded, or began to."""
    log = root.parent / "log"
    return len(log.read_text().split()) if log.exists() else 0


def await_images(root: Path, count: int, process: subprocess.Popen) -> None:
    while logged(root) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


# ---------------------------------------------------------------- built once


def test_images_are_decoded_once_and_come_back_the_same(photos, decoded):
    images, checksums = decode(photos)
    assert len(decoded) == COUNT
    assert torch.equal(images, expected(photos))
    again, checksums_again = decode(photos)
    assert len(decoded) == COUNT
    assert torch.equal(images, again)
    assert np.array_equal(checksums, checksums_again)
    assert [path.name for path in cache_file(photos).parent.glob("*.part")] == []


def test_images_are_mapped_and_not_read_into_memory(photos):
    images, _ = decode(photos)
    mapped = Path("/proc/self/maps").read_text()
    assert str(cache_file(photos)) in mapped
    assert images.dtype == torch.uint8
    assert images.is_contiguous()


def test_opening_warns_of_nothing(photos, recwarn):
    decode(photos)
    decode(photos)
    assert not recwarn.list


def test_each_side_part_and_folder_has_its_own_file(photos, decoded, tmp_path):
    shutil.copytree(photos, tmp_path / "photos2", copy_function=shutil.copy2)
    decode(photos)
    decode(photos, part="train-40")
    decode(photos, side=18)
    decode(tmp_path / "photos2")
    assert len(decoded) == 4 * COUNT
    assert len(list((tmp_path / "cache").glob("*.images"))) == 4


# ---------------------------------------------------------------- found wanting when opened


def rewrite(path: Path) -> None:
    """Another picture of the same length in bytes, as far as a timestamp tells."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace_one(root: Path) -> None:
    rewrite(root / "dog/003.jpg")


def add_one(root: Path) -> None:
    shutil.copy2(root / "dog/003.jpg", root / "dog/999.jpg")


def remove_one(root: Path) -> None:
    (root / "cat/003.jpg").unlink()


def rename_one(root: Path) -> None:
    (root / "cat/003.jpg").rename(root / "cat/003b.jpg")


def shorten(root: Path) -> None:
    os.truncate(cache_file(root), 1000)


def shorten_by_one(root: Path) -> None:
    os.truncate(cache_file(root), cache_file(root).stat().st_size - 1)


def empty(root: Path) -> None:
    os.truncate(cache_file(root), 0)


def lengthen(root: Path) -> None:
    with open(cache_file(root), "ab") as file:
        file.write(bytes(100))


def overwrite_footer(root: Path) -> None:
    path = cache_file(root)
    with open(path, "r+b") as file:
        file.seek(-cache.FOOTER.size, os.SEEK_END)
        file.write(b"convlab0")  # an earlier format


def overwrite_count(root: Path) -> None:
    with open(cache_file(root), "r+b") as file:
        file.seek(-cache.FOOTER.size, os.SEEK_END)
        file.write(cache.FOOTER.pack(cache.MAGIC, 2**60, SIDE))


def drop_a_row(root: Path) -> None:
    """What a build that was never finished looks like under the finished name."""
    path = cache_file(root)
    with open(path, "r+b") as file:
        file.seek(-cache.FOOTER.size - cache.ROW.itemsize, os.SEEK_END)
        file.write(bytes(cache.ROW.itemsize))


@pytest.mark.parametrize(
    "harm",
    [
        replace_one, add_one, remove_one, rename_one,
        shorten, shorten_by_one, empty, lengthen, overwrite_footer, overwrite_count, drop_a_row,
    ],
)  # fmt: skip
def test_a_stale_or_damaged_file_is_built_over(harm, photos, decoded):
    decode(photos)
    harm(photos)
    decoded.clear()
    images, _ = decode(photos)
    assert torch.equal(images, expected(photos))
    assert len(decoded) == len(files_of(photos))
    decode(photos)
    assert len(decoded) == len(files_of(photos))
    assert len(list((photos.parent / "cache").glob("*.images"))) == 1


def test_a_run_keeps_its_images_while_another_builds_them_over(photos):
    before = expected(photos)
    images, _ = decode(photos)
    Image.new("RGB", (24, 20)).save(photos / "cat/000.jpg")
    after, _ = decode(photos)
    assert torch.equal(images, before)
    assert not torch.equal(after, before)


# ---------------------------------------------------------------- cut short


def test_a_killed_build_is_taken_up_where_it_was(photos, tmp_path, decoded, capsys):
    process = start(photos, kill_after=25)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*.images"))
    assert logged(photos) == 25
    images, _ = decode(photos, console=Console(width=500))
    assert capsys.readouterr().out == ""  # the dead process holds no lock to wait for
    # An image that a thread had in hand when the process died was not yet done.
    assert COUNT - 25 <= len(decoded) <= COUNT - 25 + os.cpu_count()
    assert torch.equal(images, expected(photos))


def test_ctrl_c_is_answered_and_the_build_taken_up(photos, decoded):
    process = start(photos, sleep=0.1)
    await_images(photos, 5, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    begun = logged(photos)
    assert 5 <= begun < COUNT
    images, _ = decode(photos)
    assert len(decoded) == COUNT - begun
    assert torch.equal(images, expected(photos))


def test_pixels_lost_from_a_half_built_file_are_decoded_again(photos, decoded):
    """Rows may survive a power failure that their images did not."""
    decode(photos)
    path = cache_file(photos)
    part = path.rename(path.with_name(path.name + ".part"))
    with open(part, "r+b") as file:
        file.seek(7 * 3 * SIDE * SIDE)
        file.write(bytes(3 * SIDE * SIDE))
    decoded.clear()
    images, _ = decode(photos)
    assert decoded == ["cat/007.jpg"]
    assert torch.equal(images, expected(photos))


@pytest.mark.parametrize("mended", ["replaced", "removed"])
def test_a_broken_image_is_named_and_those_before_it_stay(mended, photos, decoded):
    broken = photos / "dog/010.jpg"
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    with pytest.raises(UserError, match=r"cannot read image .*dog/010\.jpg"):
        decode(photos)
    before = set(decoded)
    assert {f"cat/{i:03}.jpg" for i in range(20)} | {f"dog/{i:03}.jpg" for i in range(8)} <= before
    if mended == "replaced":
        broken.write_bytes(good)
    else:
        broken.unlink()
    decoded.clear()
    images, _ = decode(photos)
    assert torch.equal(images, expected(photos))
    assert not {name for name in decoded if name < "dog/010.jpg"} & before


# ---------------------------------------------------------------- shared


def test_of_two_processes_one_builds_and_the_other_waits_and_says_so(photos, tmp_path):
    builder = start(photos, gate=tmp_path / "gate")
    await_images(photos, 1, builder)
    other = start(photos)
    assert "waiting for another process" in other.stdout.readline()
    (tmp_path / "gate").touch()
    told = [process.communicate(timeout=120) for process in (builder, other)]
    assert [builder.returncode, other.returncode] == [0, 0], told
    assert told[0] == ("", "")
    assert logged(photos) == COUNT


# ---------------------------------------------------------------- folders


def test_the_default_folder_follows_the_xdg_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.default_folder() == tmp_path / ".cache/conv-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.default_folder() == tmp_path / ".cache/conv-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache.default_folder() == tmp_path / "elsewhere/conv-lab"


def test_a_folder_that_cannot_be_made_is_named_with_the_flag(photos):
    (photos.parent / "cache").write_text("a file in its place")
    with pytest.raises(UserError) as error:
        decode(photos)
    assert str(photos.parent / "cache") in str(error.value)
    assert "--cache" in str(error.value)


def test_a_full_disk_is_told_before_anything_is_decoded_and_leaves_nothing(photos, decoded, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot keep decoded images in .*cache: No space left on device; .*--cache"):
        decode(photos)
    assert not decoded
    assert not list((photos.parent / "cache").glob("*.part"))


def test_a_file_that_vanishes_is_not_blamed_on_the_cache(photos):
    paths = [*files_of(photos), str(photos / "cat/gone.jpg")]
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        cache.decode_once(
            paths, SIDE, root=photos, part="train", folder=photos.parent / "cache", console=Console(quiet=True)
        )


def test_a_file_removed_while_others_are_decoded_is_named(photos, monkeypatch):
    def read_square(path, side):
        (photos / "dog/019.jpg").unlink(missing_ok=True)
        return folder.read_square(path, side)

    monkeypatch.setattr(cache, "read_square", read_square)
    with pytest.raises(UserError, match=r"cannot read image .*dog/019\.jpg"):
        decode(photos)


# ---------------------------------------------------------------- decoding


def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same(tmp_path):
    ramp = np.linspace(0, 255, 640 * 480).reshape(480, 640).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp.T.copy().reshape(480, 640), 255 - ramp], axis=-1)).resize((1280, 960))
    image.save(tmp_path / "x.jpg", quality=95)
    image.save(tmp_path / "x.png")
    fraction, whole = (folder.read_square(str(tmp_path / name), 32).astype(int) for name in ("x.jpg", "x.png"))
    assert np.abs(fraction - whole).max() <= 4
