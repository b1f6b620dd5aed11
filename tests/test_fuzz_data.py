"""Folders of images as they are found: odd names, odd files, and bytes that are wrong anywhere."""

import contextlib
import io
import logging
import os
import shlex
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mutations import mutations
from PIL import EpsImagePlugin, Image
from rich.console import Console

from train import evaluate
from train.cli import UserError, printable, steers
from train.data import load_data
from train.folder import LONGEST, read_square, without_warnings

SIDE = 18
SECONDS = 60  # for one file; Pillow takes up to 178 million pixels, which is some seconds of work

ROWS, COLUMNS = np.mgrid[0:12, 0:9]
PIXELS = np.stack([COLUMNS * 25, ROWS * 20, (ROWS * COLUMNS * 7) % 256], axis=2).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)

TRAIN = ("simplenet", "--conv", "torch", "--device", "cpu", "--image-size", 16, "--epochs", 1, "--batch-size", 4)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


ANIMATED = dict(save_all=True, append_images=[PICTURE.rotate(90), PICTURE.rotate(180)])
FILES = {
    "png": encoded(PICTURE, "PNG"),
    "jpeg": encoded(PICTURE, "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "gif": encoded(PICTURE, "GIF"),
    "bmp": encoded(PICTURE, "BMP"),
    "tiff": encoded(PICTURE, "TIFF"),
    "tiff-lzw": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff-deflate": encoded(PICTURE, "TIFF", compression="tiff_adobe_deflate"),
    "webp": encoded(PICTURE, "WEBP"),
    "webp-lossless": encoded(PICTURE, "WEBP", lossless=True),
    "ppm": encoded(PICTURE, "PPM"),
    "jpeg-exif": encoded(PICTURE, "JPEG", exif=exif(6)),
    "png-exif": encoded(PICTURE, "PNG", exif=exif(6)),
    "png-16-bit": encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "png-palette": encoded(PICTURE.convert("P"), "PNG", transparency=3),
    "png-grey-alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "gif-animated": encoded(PICTURE, "GIF", **ANIMATED),
    "webp-animated": encoded(PICTURE, "WEBP", lossless=True, **ANIMATED),
    "apng": encoded(PICTURE, "PNG", **ANIMATED),
    "tiff-pages": encoded(PICTURE, "TIFF", **ANIMATED),
}


def png(width: int, height: int, *, bits: int = 8, data: bytes = bytes(100)) -> bytes:
    """A PNG of RGB pixels that claims a size and holds `data`."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.fixture
def square(tmp_path) -> Callable[[bytes], np.ndarray]:
    """square(bytes) is what read_square makes of a file of them."""
    path = tmp_path / "picture.jpg"

    def read(raw: bytes) -> np.ndarray:
        path.write_bytes(raw)
        return read_square(str(path), SIDE)

    return read


def shrunk(image: Image.Image) -> np.ndarray:
    """What read_square should make of an upright RGB image of 9 x 12 pixels."""
    return np.asarray(image.resize((SIDE, 24), Image.Resampling.BILINEAR).crop((0, 3, SIDE, 21)))


# ---------------------------------------------------------------- right pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_shows_the_picture_upright(form, orientation, square):
    turn = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # as a camera stores it
    stored = PICTURE if turn is None else PICTURE.transpose(turn)
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(square(encoded(stored, form, exif=exif(orientation), **options)), shrunk(PICTURE))


@pytest.mark.parametrize("name", ["gif-animated", "webp-animated", "apng", "tiff-pages"])
def test_of_several_pictures_in_a_file_the_first_counts(name, square):
    alone = {"gif-animated": "gif", "webp-animated": "webp-lossless", "apng": "png", "tiff-pages": "tiff"}[name]
    assert np.array_equal(square(FILES[name]), square(FILES[alone]))


@pytest.mark.parametrize("name", ["png", "bmp", "tiff", "tiff-lzw", "webp-lossless", "ppm", "apng", "tiff-pages"])
def test_lossless_files_give_their_pixels_whatever_they_are_called(name, square):
    assert np.array_equal(square(FILES[name]), shrunk(PICTURE))


@pytest.mark.parametrize("name", ["jpeg", "progressive", "webp", "cmyk", "gif", "png-palette"])
def test_lossy_files_come_close(name, square):
    assert np.abs(square(FILES[name]).astype(int) - shrunk(PICTURE)).mean() < 20


def test_sixteen_bits_a_colour_keep_their_high_bytes(square):
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in PIXELS)
    assert np.array_equal(square(png(9, 12, bits=16, data=rows)), shrunk(PICTURE))


def test_broken_exif_is_no_reason_to_refuse_or_to_turn_a_picture(square):
    whole = encoded(PICTURE, "JPEG", exif=exif(1))
    broken = whole.replace(b"Exif\0\0MM\0*", b"Exif\0\0??\0*")
    assert broken != whole
    assert np.array_equal(square(broken), square(FILES["jpeg"]))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 65000)])
def test_the_thinnest_pictures_are_read(size, square):
    assert (square(encoded(Image.new("RGB", size, (200, 100, 50)), "PNG")) == (200, 100, 50)).all()


def test_a_long_picture_shows_its_middle(square):
    tall = np.zeros((1000, 10, 3), np.uint8)
    tall[495:505] = 200
    assert (square(encoded(Image.fromarray(tall), "PNG"))[1:-1] == 200).all()


def test_of_a_long_picture_no_more_is_scaled_than_may_show(square, monkeypatch):
    """Scaled whole, a line of 80 million pixels asks for gigabytes."""
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *a: sizes.append(size) or resize(image, size, *a))
    square(encoded(Image.new("RGB", (1, 5000)), "PNG"))
    assert sizes == [(SIDE, LONGEST * SIDE)]


def test_a_photograph_with_a_second_picture_beside_it_is_a_jpeg(square):
    assert np.array_equal(square(encoded(PICTURE, "MPO", **ANIMATED)), square(FILES["jpeg"]))


# ---------------------------------------------------------------- broken bytes


@pytest.mark.parametrize("step", [pytest.param(29, id="sampled"), pytest.param(1, id="all", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused_or_whole(name, step, square):
    """Cut anywhere: half a picture never passes for one. Pages beyond the first may be missing, and closing marks."""
    raw = FILES[name]
    whole, refused = square(raw), 0
    with without_warnings():
        for length in range(0, len(raw), step):
            try:
                assert np.array_equal(square(raw[:length]), whole), length
            except UserError:
                refused += 1
    assert refused


@pytest.mark.parametrize("count", [pytest.param(15, id="few"), pytest.param(300, id="many", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_give_a_picture_or_one_error(name, count, square, recwarn):
    with without_warnings():
        for number, raw in enumerate(mutations(FILES[name], count, seed=f"{name} 1")):
            started = time.monotonic()
            with contextlib.suppress(UserError):
                pixels = square(raw)
                assert (pixels.shape, pixels.dtype) == ((SIDE, SIDE, 3), np.uint8), number
            assert time.monotonic() - started < SECONDS, number
    assert not recwarn.list


def test_pillow_logs_nothing_to_stderr():
    assert logging.getLogger("PIL").handlers  # without one, logging's own writes warnings there


# ---------------------------------------------------------------- odd files in a folder


def write(raw: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(raw)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(path))


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


BEYOND = encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF")
FLOATS = encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")


@pytest.fixture
def folder(make_images, tmp_path):
    return make_images(tmp_path / "d", {"cat": 4, "dog": 3})


@pytest.mark.parametrize(
    ("put", "words"),
    [
        pytest.param(write(b""), "cannot identify", id="no-bytes"),
        pytest.param(write(b"not a picture"), "cannot identify", id="text"),
        pytest.param(write(png(0, 5)), "cannot identify", id="no-pixels"),
        pytest.param(write(png(100_000, 100_000)), "exceeds limit", id="ten-billion-pixels"),
        pytest.param(write(png(10_000, 10_000)), "truncated", id="100-million-pixels"),
        pytest.param(write(FLOATS), "floating-point", id="floats"),
        pytest.param(write(BEYOND), "70000 to 70000", id="beyond-16-bits"),
        pytest.param(lambda path: path.symlink_to("nothing"), "link that leads nowhere", id="dangling-link"),
        pytest.param(lambda path: path.symlink_to(path), "link that leads nowhere", id="link-to-itself"),
    ],
)
def test_a_bad_file_is_named_in_one_line(put, words, folder, train_run, recwarn, tmp_path):
    put(folder / "cat/x.jpg")
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("train.run: error: ")
    assert str(folder / "cat/x.jpg") in err
    assert words in err
    assert not recwarn.list
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "put",
    [
        pytest.param(Path.mkdir, id="folder"),
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(link_to_pipe, id="link-to-a-pipe"),
        pytest.param(bind, id="socket"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="endless-device"),
        pytest.param(lambda path: path.symlink_to("/dev/null"), id="empty-device"),
    ],
)
def test_what_is_no_file_does_not_count_and_is_not_opened(put, folder, monkeypatch):
    monkeypatch.chdir(folder)
    put(folder / "cat/x.jpg")
    train, val = load_data(str(folder), 16, limit_train=None, limit_val=None, console=Console(quiet=True))
    assert len(train) + len(val) == 7


def test_postscript_named_jpg_is_not_handed_to_ghostscript(square, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {shlex.quote(str(tmp_path / 'started'))}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # as in a new process, it has not been looked for
    with pytest.raises(UserError, match="cannot identify"):
        square(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("target", ["nowhere", "emu"])
def test_a_class_behind_a_link_that_leads_nowhere_is_not_left_out(target, folder, train_run):
    (folder / "emu").symlink_to(target)
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err) == (2, f"train.run: error: {folder / 'emu'} is a link that leads nowhere\n")


def test_links_to_images_and_to_class_folders_are_followed(folder, tmp_path):
    (folder / "cat").rename(tmp_path / "elsewhere")
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "dog/link.jpg").symlink_to(tmp_path / "elsewhere/000.jpg")
    train, val = load_data(str(folder), 16, limit_train=None, limit_val=None, console=Console(quiet=True))
    assert len(train) + len(val) == 8
    assert train.classes == ("cat", "dog")


def test_a_file_that_may_not_be_read_is_named(folder, train_run):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "cat/001.jpg").chmod(0)
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "cat/001.jpg" in err


# ---------------------------------------------------------------- odd names

NAMES = (
    "two words", "it's \"quoted\"", "two\nlines", "-dash", "[bold]x[red]", "🐈🐈", "caf\udce9", "\x1b[31mred", "a\\b",
    "$(touch made)", "`touch made`", " before", "after ", "\u202eturned", "x" * 240, "%s{0}", "*?",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names_of_classes_and_files_are_read(name, folder, tmp_path):
    (folder / "cat").rename(folder / name)
    (folder / "dog/000.jpg").rename(folder / f"dog/{name}.jpg")
    train, val = load_data(str(folder), 16, limit_train=None, limit_val=None, console=Console(quiet=True))
    assert len(train) + len(val) == 7
    assert printable(name) in train.classes
    assert not any(steers(char) for part in train.classes for char in part)
    assert not list(tmp_path.rglob("made"))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_bad_file_of_an_odd_name_is_one_line_that_can_be_written(name, folder, train_run):
    (folder / f"cat/{name}.jpg").write_text("not a picture")
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"train.run: error: cannot read image {folder}/cat/")
    assert not any(map(steers, err[:-1]))


@pytest.mark.parametrize("name", ["\u3000wide", "می\u200cخواهم", "👩\u200d👧", "no\u00a0break"], ids=ascii)
def test_names_in_any_script_are_kept_as_they_are(name, folder):
    """Those of checkpoints made before there were escapes are compared with them."""
    (folder / "cat").rename(folder / name)
    train, _ = load_data(str(folder), 16, limit_train=None, limit_val=None, console=Console(quiet=True))
    assert name in train.classes


def test_two_classes_are_never_taken_for_one(folder, train_run):
    (folder / "cat").rename(folder / "a\nb")
    (folder / "dog").rename(folder / "a\\nb")
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "two class folders that are shown as a\\nb" in err


def test_classes_of_odd_names_train_and_are_judged(folder, train_run, run_main):
    (folder / "cat").rename(folder / "caf\udce9\n\x1b[31m")
    assert train_run(*TRAIN, "--data", "d", "--out", "run")[::2] == (0, "")
    code, out, err = run_main(evaluate.main, "run", "--device", "cpu")
    assert (code, err) == (0, "")
    assert r"caf\udce9\n\x1b[31m" in out
