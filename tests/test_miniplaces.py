"""MiniPlaces by path: its lists, its labels, the files a copy lacks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from train import data
from train.cli import UserError
from train.folder import read_square

REAL = Path(__file__).resolve().parents[2] / "shared/miniplaces10"

TRAIN = {"a/abbey": 0, "c/church/outdoor": 32, "v/valley": 97}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def places(tmp_path) -> Path:
    """Three classes of four training and two validation images, in the lists' mixed order."""
    root = tmp_path / "places"
    noise = np.random.default_rng(0)
    lists = {"train": [], "val": []}
    for i in range(4):
        for folder, label in TRAIN.items():
            lists["train"].append((f"train/{folder}/{i:08}.jpg", label))
    for i, label in enumerate([97, 0, 32, 32, 97, 0]):
        lists["val"].append((f"val/{i:08}.jpg", label))
    for part, lines in lists.items():
        for name, _ in lines:
            path = root / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        (root / f"{part}.txt").write_text("".join(f"{name} {label}\n" for name, label in lines))
    (root / "categories.txt").write_text("/a/abbey 0\n/a/airport 1\n/c/church/outdoor 32\n/v/valley 97\n")
    return root


def load(root, console=None, limit_train=None, limit_val=None):
    console = console or Console(quiet=True)
    return data.load_data(str(root), 16, limit_train=limit_train, limit_val=limit_val, console=console)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_labels_are_made_contiguous_and_keep_their_names(places):
    train, val = load(places)
    assert train.classes == val.classes == ("abbey", "church/outdoor", "valley")
    assert train.labels.tolist() == [0, 1, 2] * 4
    assert val.labels.tolist() == [2, 0, 1, 1, 2, 0]
    fourth = torch.from_numpy(read_square(str(places / "images/train/a/abbey/00000001.jpg"), 18)).permute(2, 0, 1)
    assert torch.equal(train.images[3], fourth)


def test_without_categories_names_come_from_the_train_folders(places):
    (places / "categories.txt").unlink()
    train, _ = load(places)
    assert train.classes == ("abbey", "church/outdoor", "valley")


def test_names_that_would_be_the_same_stay_apart(places):
    edit(places / "categories.txt", "/v/valley", "/a/abbey")
    train, _ = load(places)
    assert train.classes == ("a/abbey (0)", "church/outdoor", "a/abbey (97)")


def test_a_flat_list_names_classes_by_label(tmp_path, make_images):
    make_images(tmp_path / "d", {"train": 4, "val": 2})
    (tmp_path / "d/train.txt").write_text("".join(f"train/{i:03}.jpg {5 * (i % 2)}\n" for i in range(4)))
    (tmp_path / "d/val.txt").write_text("val/000.jpg 5\nval/001.jpg 0\n")
    train, val = load(tmp_path / "d")
    assert train.classes == ("class (0)", "class (5)")
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert val.labels.tolist() == [1, 0]


def test_images_may_lie_beside_the_lists(places):
    expected, _ = load(places)
    for part in ("train", "val"):
        (places / "images" / part).rename(places / part)
    (places / "images").rmdir()
    train, _ = load(places)
    assert torch.equal(train.images, expected.images)


def test_a_limit_is_spread_over_the_classes(places):
    train, val = load(places, limit_train=6, limit_val=3)
    assert train.labels.tolist() == [0, 1, 2] * 2
    assert sorted(val.labels.tolist()) == [0, 1, 2]


def test_windows_line_ends_and_blank_lines_are_no_matter(places):
    path = places / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    train, _ = load(places)
    assert len(train) == 12


def test_missing_files_are_counted_in_one_line(places, capsys):
    (places / "images/train/c/church/outdoor/00000002.jpg").unlink()
    (places / "images/train/a/abbey/00000003.jpg").unlink()
    (places / "images/val/00000001.jpg").unlink()
    train, val = load(places, Console(width=500))
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "2 of the 12 images in train.txt and 1 of the 6 images in val.txt" in told
    assert "train/c/church/outdoor/00000002.jpg" in told
    assert (len(train), len(val)) == (10, 5)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 1, 2]


def test_a_whole_copy_says_nothing(places, capsys):
    load(places, Console(width=500))
    assert capsys.readouterr().out == ""


def lose_class(root: Path) -> None:
    shutil.rmtree(root / "images/train/c/church/outdoor")


def lose_val_of_class(root: Path) -> None:
    for i in (2, 3):
        (root / f"images/val/{i:08}.jpg").unlink()


def list_no_val_of_class(root: Path) -> None:
    edit(root / "val.txt", " 32\n", " 97\n")


def lose_everything(root: Path) -> None:
    shutil.rmtree(root / "images")


def lose_val_list(root: Path) -> None:
    (root / "val.txt").unlink()


def write(name: str, old: str, new: str):
    return lambda root: edit(root / name, old, new)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        pytest.param(lose_class, ["'church/outdoor' (label 32)", "no training images", "lists 4"], id="lost"),
        pytest.param(lose_val_of_class, ["'church/outdoor'", "no validation images", "lists 2"], id="lost-in-val"),
        pytest.param(list_no_val_of_class, ["'church/outdoor'", "no validation", "lists 0"], id="not-in-val"),
        pytest.param(lose_everything, ["none of the 12 images", "train.txt"], id="no-images"),
        pytest.param(lose_val_list, ["has train.txt but no val.txt"], id="no-val-list"),
        pytest.param(write("val.txt", "0.jpg 97", "0.jpg 98"), ["val.txt:1:", "label 98"], id="label-only-in-val"),
        pytest.param(write("train.txt", "2.jpg 97", "2.jpg"), ["train.txt:9:", "2.jpg'"], id="no-label"),
        pytest.param(write("train.txt", "2.jpg 97", "2.jpg 9.7"), ["train.txt:9:", "2.jpg 9.7'"], id="fraction"),
        pytest.param(write("train.txt", "2.jpg 97", "2.jpg -1"), ["train.txt:9:"], id="negative-label"),
        pytest.param(write("train.txt", "valley/00000002", "valley/00000001"), ["txt:9:", "line 6"], id="twice"),
        pytest.param(write("categories.txt", "y 97", "y"), ["categories.txt:4:"], id="category-without-label"),
        pytest.param(write("categories.txt", "y 97", "y 32"), ["categories.txt:4:", "label 32"], id="named-twice"),
    ],
)
def test_what_is_wrong_is_named(harm, words, places):
    harm(places)
    with pytest.raises(UserError) as error:
        load(places)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(places) in str(error.value)


@pytest.mark.parametrize("content", ["", "\n\n", "\0\1\xff 3"])
def test_lists_that_are_none_are_refused(content, places):
    (places / "train.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.txt"):
        load(places)


def test_the_real_piece_loads():
    if not REAL.is_dir():
        pytest.skip(f"no MiniPlaces in {REAL}")
    train, val = load(REAL, limit_train=30, limit_val=20)
    assert train.classes == (
        "amphitheater", "aquarium", "auditorium", "church/outdoor", "corridor",
        "desert/sand", "highway", "playground", "skyscraper", "valley",
    )  # fmt: skip
    assert torch.bincount(train.labels).tolist() == [3] * 10
    assert torch.bincount(val.labels).tolist() == [2] * 10
    assert train.images.shape == (30, 3, 18, 18)
    assert train.images.float().std() > 30
