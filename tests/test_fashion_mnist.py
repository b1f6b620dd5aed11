"""Fashion-MNIST in full: its IDX files, where they are looked for, and a download that goes wrong."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from train import data, fashion_mnist, recipes
from train.cli import UserError
from train.fashion_mini import make

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _nowhere_but_here(tmp_path, monkeypatch):
    """No file of this machine, and no server but one of ours, is within reach."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_SOURCE", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])  # nothing listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


ARRAYS = {
    "train_images": np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8),
    "train_labels": np.arange(20, dtype=np.uint8) % 10,
    "val_images": np.random.default_rng(1).integers(0, 256, (10, 28, 28), dtype=np.uint8),
    "val_labels": np.arange(10, dtype=np.uint8)[::-1].copy(),
}


def write_files(folder: Path, *, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, stem in fashion_mnist.FILES.items():
        raw = idx(ARRAYS[name])
        if packed:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / stem).write_bytes(raw)
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Path]:
    """What a mirror in this process serves, with the checksums of what lies there."""
    folder = write_files(tmp_path / "server")
    resources = [
        (f"{stem}.gz", hashlib.md5((folder / f"{stem}.gz").read_bytes()).hexdigest())
        for stem in fashion_mnist.FILES.values()
    ]
    monkeypatch.setattr(fashion_mnist.FashionMNIST, "resources", resources)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as mirror:
        monkeypatch.setattr(fashion_mnist.FashionMNIST, "mirrors", [f"http://127.0.0.1:{mirror.server_port}/"])
        thread = threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder
        mirror.shutdown()
        thread.join()


def load(source, image_size=32, console=QUIET, **limits):
    limits = {"limit_train": None, "limit_val": None} | limits
    return data.load_data(str(source), image_size, console=console, **limits)


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_of_the_four_files_is_framed_like_fashion_mini(packed, tmp_path):
    train, val = load(write_files(tmp_path / "d", packed=packed))
    assert train.images.shape == (20, 1, 36, 36)
    assert val.images.shape == (10, 1, 36, 36)
    assert torch.equal(train.images[:, 0, 4:32, 4:32], torch.from_numpy(ARRAYS["train_images"]))
    assert train.images.sum() == ARRAYS["train_images"].sum(dtype=np.int64)  # the frame is black
    assert val.labels.tolist() == ARRAYS["val_labels"].tolist()
    assert train.classes[9] == "Ankle boot"
    assert data.default_image_size(str(tmp_path / "d")) == 32


def test_debians_folder_is_taken_first(tmp_path, capsys):
    write_files(tmp_path / "debian")
    train, _ = load(data.FASHION_MNIST, console=Console())
    assert len(train) == 20
    assert train.name == data.FASHION_MNIST
    assert capsys.readouterr().out == ""
    assert data.default_image_size(data.FASHION_MNIST) == 32


@pytest.mark.usefixtures("server")
def test_it_is_downloaded_once_into_the_cache(tmp_path, capsys):
    train, _ = load(data.FASHION_MNIST, console=Console(width=500))
    told = capsys.readouterr()
    assert told.out == f"downloading Fashion-MNIST (30 MB) into {tmp_path / 'cache/conv-lab/fashion-mnist'}\n"
    assert told.err == ""
    assert not (tmp_path / "cache/conv-lab/fashion-mnist.part").exists()
    again, _ = load(data.FASHION_MNIST, console=Console(width=500))
    assert capsys.readouterr().out == ""
    assert torch.equal(train.images, again.images)


def test_what_cannot_be_downloaded_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        load(data.FASHION_MNIST)
    assert str(tmp_path / "cache/conv-lab/fashion-mnist") in str(error.value)
    assert "dataset-fashion-mnist" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_download_that_broke_off_is_never_taken_for_the_whole(server):
    last = server / f"{fashion_mnist.FILES['val_labels']}.gz"
    whole = last.read_bytes()
    last.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="cannot download"):
        load(data.FASHION_MNIST)
    last.write_bytes(whole)
    train, val = load(data.FASHION_MNIST)
    assert (len(train), len(val)) == (20, 10)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot keep Fashion-MNIST in .*--cache"):
        load(data.FASHION_MNIST)


def broken(stem: str, raw: bytes | None):
    def harm(folder: Path) -> None:
        path = folder / f"{stem}.gz"
        path.unlink()
        if raw is not None:
            path.write_bytes(raw)

    return harm


@pytest.mark.parametrize(
    ("stem", "raw", "words"),
    [
        pytest.param("train-labels-idx1-ubyte", None, "has no train-labels", id="missing"),
        pytest.param("train-images-idx3-ubyte", b"text", "cannot read", id="not-gzip"),
        pytest.param(
            "train-images-idx3-ubyte", gzip.compress(idx(ARRAYS["train_images"]))[:-300], "cannot read", id="cut-gzip"
        ),
        pytest.param("train-images-idx3-ubyte", gzip.compress(b"text"), "not an IDX file", id="not-idx"),
        pytest.param("t10k-labels-idx1-ubyte", gzip.compress(b"\0\0\x08\3\0"), "not an IDX file", id="cut-header"),
        pytest.param(
            "train-images-idx3-ubyte", gzip.compress(idx(ARRAYS["train_images"])[:-1]), "is damaged", id="cut-idx"
        ),
        pytest.param(
            "train-images-idx3-ubyte", gzip.compress(idx(ARRAYS["train_images"][:, :, :27])), "(20, 28, 27)", id="side"
        ),
        pytest.param("t10k-labels-idx1-ubyte", gzip.compress(idx(np.zeros(9, np.uint8))), "9 labels", id="count"),
        pytest.param("t10k-labels-idx1-ubyte", gzip.compress(idx(np.full(10, 10, np.uint8))), "label 10", id="label"),
    ],
)
def test_a_broken_file_is_named(stem, raw, words, tmp_path):
    folder = write_files(tmp_path / "d")
    broken(stem, raw)(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert words in str(error.value)
    assert stem in str(error.value)


def test_the_real_files_hold_70000_images(monkeypatch):
    real = make.DEBIAN_SOURCE
    if not real.is_dir():
        pytest.skip(f"Debian's package dataset-fashion-mnist is not installed ({real})")
    monkeypatch.setattr(fashion_mnist, "DEBIAN_SOURCE", real)
    train, val = load(data.FASHION_MNIST)
    assert torch.bincount(train.labels).tolist() == [6000] * 10
    assert torch.bincount(val.labels).tolist() == [1000] * 10


def test_a_folder_of_its_files_has_the_recipe_of_its_name(tmp_path):
    folder = str(write_files(tmp_path / "idx"))
    for name in ("quick", "writeup", "modern"):
        assert recipes.make_recipe(name, "simplenet", folder) == recipes.make_recipe(name, "simplenet", "fashion-mnist")
    assert recipes.default_recipe(folder, "cuda") == "quick"
