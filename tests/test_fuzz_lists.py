"""Lists and IDX files as they are found: paths that lead out of the folder, labels that are none, sizes that lie."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from mutations import mutations
from rich.console import Console

from train import fashion_mnist
from train.cli import UserError, printable, steers
from train.data import load_data
from train.miniplaces import list_miniplaces

TRAIN = ("simplenet", "--conv", "torch", "--device", "cpu", "--image-size", 16, "--epochs", 1, "--batch-size", 4)
LISTS = {
    "train.txt": "".join(f"train/a/{i:03}.jpg 0\ntrain/b/{i:03}.jpg 7\n" for i in range(4)),
    "val.txt": "".join(f"val/{i:03}.jpg {7 * (i % 2)}\n" for i in range(4)),
    "categories.txt": "/a/abbey 0\n/b/bridge 7\n",
}


@pytest.fixture
def places(make_images, tmp_path) -> Path:
    """Eight training and four validation images with their lists; beside the folder, two that are none of them."""
    root = tmp_path / "d"
    make_images(root / "images", {"train/a": 4, "train/b": 4, "val": 4})
    make_images(tmp_path, {"secret": 2})
    for name, text in LISTS.items():
        (root / name).write_text(text)
    return root


# ---------------------------------------------------------------- no way out


@pytest.mark.parametrize("list_name", ["train.txt", "val.txt"])
@pytest.mark.parametrize(
    "path",
    ["../../secret/000.jpg", "../secret/000.jpg", "train/../../../secret/000.jpg", "a/..", "../images/val/000.jpg"],
)
def test_a_path_that_climbs_is_refused_by_its_line(path, list_name, places, train_run):
    text = LISTS[list_name].splitlines()
    (places / list_name).write_text("\n".join([*text[:2], f"{path} 0", *text[2:]]))
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err) == (
        2, f"train.run: error: {places / list_name}:3: {path} may lead out of the data folder\n"
    )  # fmt: skip


def test_an_absolute_path_is_one_in_the_folder(places, tmp_path):
    """As Places365 lists its images, "/a/airfield/1.jpg"; a file that is really there is not reached."""
    outside = tmp_path / "secret/000.jpg"
    (places / "train.txt").write_text(LISTS["train.txt"].replace("train/a", "/train/a") + f"{outside} 0\n")
    train, _, notice = list_miniplaces(places)
    assert len(train.paths) == 8
    assert str(outside) not in train.paths
    assert f"missing are 1 of the 9 images in train.txt, the first is {outside}" in notice


@pytest.mark.parametrize("spelling", ["train/a//000.jpg", "train/./a/000.jpg", "./train/a/000.jpg", "/train/a/000.jpg"])
def test_a_file_listed_twice_is_found_out_however_it_is_spelt(spelling, places):
    (places / "train.txt").write_text(f"{LISTS['train.txt']}{spelling} 0\n")
    with pytest.raises(UserError) as error:
        list_miniplaces(places)
    assert str(error.value) == f"{places / 'train.txt'}:9: {spelling} is listed before, in line 1"


def test_links_in_the_folder_are_its_owners(places, tmp_path):
    """Images often lie on another disk."""
    (places / "images/train").rename(tmp_path / "disk")
    (places / "images/train").symlink_to(tmp_path / "disk")
    train, _, _ = list_miniplaces(places)
    assert len(train.paths) == 8


def test_names_of_classes_never_name_files(places, tmp_path, train_run):
    (places / "categories.txt").write_text("../../out 0\n/etc/out\x1b[31m 7\n")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert train_run(*TRAIN, "--data", "d", "--out", "run")[::2] == (0, "")
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - before
    assert {path.parts[0] for path in made} == {"run"}
    assert all(len(path.parts) <= 2 for path in made)


# ---------------------------------------------------------------- damaged lines


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("train/a/009.jpg", id="no-label"),
        pytest.param("9", id="no-path"),
        pytest.param("train/a/009.jpg -1", id="negative"),
        pytest.param("train/a/009.jpg 1e3", id="exponent"),
        pytest.param("train/a/009.jpg ٣", id="other-digits"),
        pytest.param("train/a/009.jpg ²", id="superscript"),
        pytest.param(f"train/a/009.jpg 1{30 * '0'}", id="10^30"),
        pytest.param(f"train/a/009.jpg {5000 * '9'}", id="5000-digits"),
    ],
)
def test_a_line_without_a_label_is_refused_by_its_number(line, places, train_run):
    (places / "train.txt").write_text(f"{line}\n{LISTS['train.txt']}")
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"train.run: error: {places / 'train.txt'}:1: not a path and a label")
    assert len(err) < 400


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("train/a/009.jpg\0 0", id="zero-byte"),
        pytest.param(f"{'x' * 100_000} 0", id="long-name"),
        pytest.param(f"{'x/' * 50_000} 0", id="long-path"),
        pytest.param("train/a/caf\udce9\x1b[31m.jpg\t0", id="no-text"),
    ],
)
def test_a_path_that_no_file_can_have_is_missing_and_can_be_shown(line, places):
    (places / "train.txt").write_bytes(os.fsencode(f"{line}\n{LISTS['train.txt']}"))
    _, _, notice = list_miniplaces(places)
    assert "missing are 1 of the 9 images in train.txt" in notice
    assert not any(map(steers, notice))


@pytest.mark.parametrize("name", ["train.txt", "val.txt"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_list_that_is_no_file_is_not_opened(name, make, places, train_run):
    (places / name).unlink()
    make(places / name)
    code, _, err = train_run(*TRAIN, "--data", "d", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert f"but no {name}" in err


TOKENS = (
    b"../", b"/..", b"..", b"/", b"//", b"./", b"\0", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\t", b" ", b"\xa0", b"\x85",
    b"-1", b"0", b"7", b"9" * 25, b"9" * 5000, "٣".encode(), b"\xff\xfe", b"\x1b[2J", b"secret/000.jpg", b"x" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("count", [pytest.param(80, id="few"), pytest.param(4000, id="many", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", LISTS)
def test_damaged_lists_are_refused_by_name_or_stay_in_the_folder(name, count, places):
    inside = os.path.realpath(places) + os.sep
    refused = 0
    for number, raw in enumerate(mutations(LISTS[name].encode(), count, seed=name, tokens=TOKENS)):
        (places / name).write_bytes(raw)
        try:
            parts = list_miniplaces(places)[:2]
        except UserError as error:
            refused += 1
            assert str(places) in str(error), number  # noqa: PT017
            continue
        for part in parts:
            assert all(os.path.realpath(path).startswith(inside) for path in part.paths), number
            assert set(part.labels) == set(range(len(part.classes))), number
            assert not any(steers(char) for name in part.classes for char in name), number
            assert part.classes == tuple(map(printable, part.classes)), number
    assert 0 < refused < count


# ---------------------------------------------------------------- IDX files

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "train_images": RANDOM.integers(0, 256, (10, 28, 28), dtype=np.uint8),
    "train_labels": np.arange(10, dtype=np.uint8),
    "val_images": RANDOM.integers(0, 256, (10, 28, 28), dtype=np.uint8),
    "val_labels": np.arange(10, dtype=np.uint8),
}


def idx(sizes: tuple[int, ...], data: bytes) -> bytes:
    return b"\0\0\x08" + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + data


@pytest.fixture
def garments(tmp_path) -> Path:
    for name, stem in fashion_mnist.FILES.items():
        (tmp_path / "g").mkdir(exist_ok=True)
        (tmp_path / "g" / stem).write_bytes(idx(ARRAYS[name].shape, ARRAYS[name].tobytes()))
    return tmp_path / "g"


def replace_images(folder: Path, raw: bytes, *, packed: bool) -> None:
    path = folder / fashion_mnist.FILES["train_images"]
    path.unlink()
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "length", "words"),
    [
        pytest.param((2**31, 28, 28), 10, "claims an array of (2147483648, 28, 28)", id="two-billion-images"),
        pytest.param((2**32 - 1,) * 3, 10, "claims an array", id="2^96-bytes"),
        pytest.param((2**32 - 1,) * 255, 10, "claims an array", id="255-axes"),
        pytest.param((1_000_000, 28, 28), 10, "is damaged: 10 bytes", id="a-million-images-without-bytes"),
        pytest.param((10, 28, 28), 50_000_000, "is damaged: more than 7,840 bytes", id="more-than-it-says"),
        pytest.param((0, 28, 28), 0, "holds an array of (0, 28, 28)", id="no-images"),
    ],
)
def test_sizes_that_lie_are_told_in_one_line(sizes, length, words, packed, garments, train_run):
    """50 million zeros are 50 kB packed: a bomb, of which no more is unpacked than what should be there."""
    replace_images(garments, idx(sizes, bytes(length)), packed=packed)
    code, _, err = train_run("simplenet", "--conv", "torch", "--device", "cpu", "--data", "g", "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert fashion_mnist.FILES["train_images"] in err


def test_no_more_is_unpacked_than_the_sizes_ask_for(garments, monkeypatch):
    replace_images(garments, idx((10, 28, 28), bytes(50_000_000)), packed=True)
    most = 0
    read = gzip.GzipFile.read

    def watched(file, size=-1):
        nonlocal most
        raw = read(file, size)
        most = max(most, len(raw))
        return raw

    monkeypatch.setattr(gzip.GzipFile, "read", watched)
    with pytest.raises(UserError, match="more than 7,840 bytes"):
        fashion_mnist.load_arrays(garments)
    assert most == 7841


@pytest.mark.parametrize("count", [pytest.param(40, id="few"), pytest.param(1500, id="many", marks=pytest.mark.soak)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", fashion_mnist.FILES)
def test_damaged_idx_files_are_refused_or_hold_pictures(name, packed, count, garments):
    path = garments / fashion_mnist.FILES[name]
    whole = path.read_bytes()
    raw = gzip.compress(whole, mtime=0) if packed else whole
    if packed:
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
    refused = 0
    for number, damaged in enumerate(mutations(raw, count, seed=f"{name} {packed}")):
        path.write_bytes(damaged)
        try:
            arrays = fashion_mnist.load_arrays(garments)
        except UserError as error:
            refused += 1
            assert str(garments) in str(error), number  # noqa: PT017
            continue
        assert len(arrays["train_images"]) == len(arrays["train_labels"]), number
        assert arrays["train_labels"].max() < 10, number
        if packed:  # gzip has a checksum
            assert arrays[name].tobytes() == ARRAYS[name].tobytes(), number
    assert refused


def test_lists_are_loaded_as_they_were(places):
    train, val = load_data(str(places), 16, limit_train=None, limit_val=None, console=Console(quiet=True))
    assert train.classes == ("abbey", "bridge")
    assert (len(train), len(val)) == (8, 4)
