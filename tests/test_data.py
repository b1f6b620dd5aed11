"""Data: the embedded images, folders of images, and what a broken source is told."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from train import data, fashion_mini
from train.cli import UserError
from train.fashion_mini import make

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(source, image_size=16, limit_train=None, limit_val=None, cache=None):
    return data.load_data(
        str(source), image_size, limit_train=limit_train, limit_val=limit_val, console=QUIET, cache=cache
    )


# ---------------------------------------------------------------- fashion-mini


def test_embedded_file_is_what_its_script_makes():
    if not make.DEBIAN_SOURCE.is_dir():
        pytest.skip(f"Debian's package dataset-fashion-mnist is not installed ({make.DEBIAN_SOURCE})")
    made, embedded = make.make_arrays(make.DEBIAN_SOURCE), fashion_mini.load_arrays()
    assert made.keys() == embedded.keys()
    for name, array in made.items():
        assert np.array_equal(array, embedded[name]), name


def test_embedded_file_holds_300_and_100_images_of_each_class():
    arrays = fashion_mini.load_arrays()
    assert arrays["train_images"].shape == (3000, 28, 28)
    assert arrays["val_images"].shape == (1000, 28, 28)
    assert np.bincount(arrays["train_labels"]).tolist() == [300] * 10
    assert np.bincount(arrays["val_labels"]).tolist() == [100] * 10


def test_embedded_file_is_compact_and_has_its_licence_beside_it():
    folder = Path(fashion_mini.__file__).parent
    assert (folder / "fashion-mini.npz").stat().st_size < 2e6
    assert "Zalando SE" in (folder / "LICENSE").read_text()


def test_fashion_mini_shows_each_garment_whole_in_any_crop():
    train, val = load(data.FASHION_MINI, 32)
    assert train.images.shape == (3000, 1, 36, 36)
    assert train.images.dtype == torch.uint8
    assert val.images.shape == (1000, 1, 36, 36)
    assert train.classes[train.labels[0]] == "T-shirt/top"
    original = torch.from_numpy(fashion_mini.load_arrays()["train_images"])
    assert torch.equal(train.images[:, 0, 4:32, 4:32], original)
    assert not train.images[:, :, :4].any()
    assert not train.images[:, :, :, 32:].any()


def test_fashion_mini_comes_in_other_sizes():
    train, _val = load(data.FASHION_MINI, 64, limit_train=20, limit_val=10)
    assert train.images.shape == (20, 1, 72, 72)
    small, _ = load(data.FASHION_MINI, 32, limit_train=20)
    halved = torch.nn.functional.avg_pool2d(train.images.float(), 2)
    assert (halved - small.images.float()).abs().mean() < 8  # of 255: the same pictures


@pytest.mark.parametrize("limit", [1, 10, 25, 3000, 5000])
def test_a_limit_is_spread_evenly_over_the_classes(limit):
    train, _ = load(data.FASHION_MINI, 32, limit_train=limit)
    counts = torch.bincount(train.labels, minlength=10)
    assert len(train) == min(limit, 3000)
    assert counts.max() - counts.min() <= 1


# ---------------------------------------------------------------- folders


def test_folder_with_train_and_val(make_images, tmp_path):
    root = make_images(tmp_path / "d", {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 2})
    train, val = load(root)
    assert train.classes == val.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert val.labels.tolist() == [0, 1, 1]
    assert train.images.shape == (5, 3, 18, 18)


def test_folder_without_train_and_val_is_split_the_same_way_each_time(make_images, tmp_path, capsys):
    root = make_images(tmp_path / "d", {"cat": 10, "dog": 2})
    train, val = data.load_data(str(root), 16, limit_train=None, limit_val=None, console=Console(width=500))
    notice = capsys.readouterr().out
    assert notice.count("\n") == 1
    assert "every 5th image of each class" in notice
    assert train.labels.tolist() == [0] * 8 + [1]
    assert val.labels.tolist() == [0, 0, 1]
    again, _ = load(root)
    assert torch.equal(again.images, train.images)


def test_images_keep_their_proportions_and_lose_their_ends(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200  # the middle third of a wide image is all that the centre square shows
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "x.png")
    train, _ = load(tmp_path, 16)
    assert (train.images[0, :, :, 2:-2] == 200).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P-transparent", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path, recwarn):
    grey = Image.fromarray(np.full((20, 20), 255, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 65535, np.uint16))
    elif mode == "P-transparent":
        image = grey.convert("P")
        image.info["transparency"] = bytes([0, 128])
    else:
        image = grey.convert("RGB").convert(mode)
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / part).mkdir(parents=True)
        image.save(tmp_path / part / ("x.tif" if mode == "CMYK" else "x.png"))
    train, _ = load(tmp_path)
    assert (train.images == 255).all()
    assert not recwarn.list


def test_hidden_files_and_files_that_are_no_images_do_not_count(make_images, tmp_path):
    root = make_images(tmp_path / "d", {"cat": 5, "dog": 5, ".cache": 3})
    (root / "cat" / ".000.jpg").write_text("not a picture")
    (root / "cat" / "notes.txt").write_text("not a picture")
    train, val = load(root)
    assert train.classes == ("cat", "dog")
    assert len(train) + len(val) == 10


def break_nothing(root: Path) -> None:
    """For layouts that are wrong by themselves."""


def truncate(root: Path) -> None:
    path = root / "train/cat/001.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def write_text(root: Path) -> None:
    (root / "train/cat/001.jpg").write_text("not a picture")


FULL = {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1}


@pytest.mark.parametrize(
    ("counts", "harm", "words"),
    [
        pytest.param({}, break_nothing, ["holds no class folders"], id="no-classes"),
        pytest.param({"cat": 2, "dog": 0}, break_nothing, ["dog", "holds no images"], id="empty-class"),
        pytest.param({"cat": 2, "dog": 1}, break_nothing, ["dog", "one image"], id="nothing-to-split"),
        pytest.param({"train/cat": 2}, break_nothing, ["train folder but no val folder"], id="no-val"),
        pytest.param({"val/cat": 2}, break_nothing, ["val folder but no train folder"], id="no-train"),
        pytest.param(FULL | {"val/emu": 1}, break_nothing, ["'emu'", "only one of"], id="classes-differ"),
        pytest.param(FULL, truncate, ["cannot read image", "train/cat/001.jpg"], id="truncated-jpeg"),
        pytest.param(FULL, write_text, ["cannot read image", "train/cat/001.jpg"], id="text-named-jpg"),
    ],
)
def test_broken_folders_are_named(counts, harm, words, make_images, tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    make_images(root, counts)
    harm(root)
    with pytest.raises(UserError) as error:
        load(root)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(root) in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no data folder .*nowhere"):
        load(tmp_path / "nowhere")


# ---------------------------------------------------------------- fingerprints and caches


def test_fingerprints_tell_images_labels_and_classes_apart(make_images, tmp_path):
    root = make_images(tmp_path / "d", FULL)
    (train, val), fewer = load(root), load(root, limit_train=3)[0]
    assert len({train.fingerprint, val.fingerprint, fewer.fingerprint}) == 3
    assert load(root)[0].fingerprint == train.fingerprint
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / "eft")
    renamed, _ = load(root)
    (root / "train/cat/000.jpg").rename(root / "train/eft/aaa.jpg")
    moved, _ = load(root)
    Image.new("RGB", (24, 20)).save(root / "train/eft/001.jpg")
    exchanged, _ = load(root)
    assert len({data.fingerprint for data in (train, renamed, moved, exchanged)}) == 4


def test_a_copy_elsewhere_has_the_same_fingerprint(make_images, tmp_path):
    root = make_images(tmp_path / "d", FULL)
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert load(root)[0].fingerprint == load(copy)[0].fingerprint


def test_fashion_minis_fingerprint_follows_size_and_limit():
    sizes = [load(data.FASHION_MINI, size)[0].fingerprint for size in (32, 64, 32)]
    assert sizes[0] == sizes[2] != sizes[1]
    assert load(data.FASHION_MINI, 32, limit_train=2999)[0].fingerprint != sizes[0]


def test_decoded_images_lie_in_the_named_folder_or_the_users_cache(make_images, tmp_path):
    root = make_images(tmp_path / "d", FULL)
    load(root)
    assert len(list((tmp_path / "cache/conv-lab").glob("*.images"))) == 2
    load(root, cache=tmp_path / "named")
    assert len(list((tmp_path / "named").glob("*.images"))) == 2
    load(root, cache=tmp_path / "named", limit_train=100)  # no fewer than there are: the same file
    assert len(list((tmp_path / "named").glob("*.images"))) == 2
    load(root, cache=tmp_path / "named", limit_train=2)
    assert len(list((tmp_path / "named").glob("*.images"))) == 3


def test_real_photographs_load():
    root = Path(__file__).resolve().parents[2] / "shared/miniplaces10/images/train/a"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}")
    train, _val = load(root, 64, limit_train=30, limit_val=9)
    assert train.classes == ("amphitheater", "aquarium", "auditorium")
    assert train.images.shape == (30, 3, 72, 72)
    assert train.images.float().std() > 30
