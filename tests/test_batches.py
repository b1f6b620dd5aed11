"""Batches: their order, what decides them, and how processes share them."""

import gc
import mmap
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from train import batches
from train.augment import Augmentation
from train.batches import (
    AUGMENTATION,
    LAYERS,
    Feeder,
    ahead,
    epoch_order,
    gather_rows,
    generator,
    steps_per_epoch,
    val_batches,
)
from train.cli import UserError
from train.data import Dataset

PLAIN = Augmentation(flip=False, colour=0.0, rotate=0.0, crop_area=None, crop_ratio=0.0)
WRITEUP = Augmentation(flip=True, colour=0.15, rotate=15.0, crop_area=0.25, crop_ratio=0.2)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def dataset(count=23, channels=3):
    images = torch.randint(256, (count, channels, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Dataset(images=images, labels=torch.arange(count), classes=tuple("abc"), name="test", fingerprint="")


def feeder(data=None, augmentation=WRITEUP, **changes):
    settings = dict(
        batch_size=6, image_size=8, device=CPU, memory_format=torch.contiguous_format, augmentation=augmentation, seed=0
    )
    return Feeder(data or dataset(), **(settings | changes))


def fed(feeder, epoch, start=0):
    """The batches of an epoch; copies, for the feeder writes the next over the last."""
    return [(x.clone(), y) for x, y in feeder.epoch(epoch, start=start)]


@pytest.mark.parametrize(("count", "size", "steps"), [(23, 6, 3), (24, 6, 4), (5, 6, 1)])
def test_only_full_batches_are_fed_and_a_small_set_is_one(count, size, steps):
    assert steps_per_epoch(count, size) == steps
    batches = fed(feeder(dataset(count), batch_size=size), 0)
    assert [len(y) for _, y in batches] == steps * [min(count, size)]


def test_an_epoch_shows_each_image_at_most_once_in_an_order_of_its_own():
    orders = [torch.cat([y for _, y in feeder().epoch(epoch)]).tolist() for epoch in (0, 1)]
    assert all(len(set(order)) == 18 for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(23, seed=0, epoch=0)[:18].tolist()


def test_pixels_are_those_of_the_labels_images():
    data = dataset()
    for x, y in feeder(data, PLAIN).epoch(0):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        for one, label in zip(x, y, strict=True):
            expected = (data.images[label, :, :8, :8] / 255 - mean) / std
            torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_seed_epoch_and_batch_decide_a_batch_and_nothing_else_does():
    whole = fed(feeder(), 2)
    torch.manual_seed(99)
    for start in (1, 2):
        for (x, y), (x_whole, y_whole) in zip(fed(feeder(), 2, start), whole[start:], strict=True):
            assert torch.equal(x, x_whole)
            assert torch.equal(y, y_whole)
    assert fed(feeder(), 2, start=3) == []
    other = next(feeder(seed=1).epoch(2))
    assert not torch.equal(other[1], whole[0][1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_what_one_would_see(world_size):
    alone = fed(feeder(), 1)
    shares = [fed(feeder(rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    for batch, (x, y) in enumerate(alone):
        for rank in range(world_size):
            assert torch.equal(shares[rank][batch][0], x[rank::world_size])
            assert torch.equal(shares[rank][batch][1], y[rank::world_size])


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="6 images does not split evenly over 4 processes"):
        feeder(world_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_validation_image_is_seen_once(world_size):
    seen = []
    for rank in range(world_size):
        parts = val_batches(
            dataset(), batch_size=4, image_size=8, device=CPU, memory_format=torch.contiguous_format,
            rank=rank, world_size=world_size,
        )
        seen += [label for _, y in parts for label in y.tolist()]
    assert sorted(seen) == list(range(23))
    if world_size == 1:
        assert seen == list(range(23))


def test_more_processes_than_validation_images_leave_some_without():
    shares = [
        list(val_batches(
            dataset(2), batch_size=4, image_size=8, device=CPU, memory_format=torch.contiguous_format,
            rank=rank, world_size=3,
        ))
        for rank in range(3)
    ]
    assert [len(share) for share in shares] == [1, 1, 0]


@pytest.mark.parametrize("augmentation", [PLAIN, WRITEUP])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batches_are_in_the_layout_asked_for_and_leave_the_images_alone(augmentation, memory_format):
    data = dataset(channels=1)
    before = data.images.clone()
    for x, _ in feeder(data, augmentation, memory_format=memory_format).epoch(0):
        assert x.shape == (6, 3, 8, 8)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=memory_format)
    assert torch.equal(data.images, before)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_rows_are_gathered_out_of_a_file_mapped_read_only(tmp_path):
    expected = dataset().images
    (tmp_path / "images").write_bytes(expected.numpy().tobytes())
    with open(tmp_path / "images", "rb") as file:
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    mapped = mapped.view(expected.shape)
    data = Dataset(images=mapped, labels=torch.arange(23), classes=("a",), name="", fingerprint="")
    chosen = torch.tensor([22, 0, 7, 7])
    images, labels = gather_rows(data, chosen, pin=False)
    assert torch.equal(images, expected[chosen])
    assert torch.equal(labels, chosen)
    images.zero_()
    assert torch.equal(mapped, expected)


def test_neighbouring_seeds_have_unrelated_streams():
    draws = [torch.rand(100, generator=generator(0, 0, batch)) for batch in range(20)]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.5
    of_batch_0 = [torch.rand(100, generator=generator(0, 0, 0, stream)) for stream in (AUGMENTATION, LAYERS)]
    order = torch.rand(100, generator=generator(0, 0))
    assert torch.corrcoef(torch.stack([*of_batch_0, order])).fill_diagonal_(0).abs().max() < 0.5


# ---------------------------------------------------------------- the thread that is one ahead


def gatherers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def test_the_next_batch_is_gathered_while_one_is_used():
    made = []

    def finish(number):
        assert made == list(range(number + 1))  # the next one's gathering has not begun
        return number

    results = ahead(lambda n: made.append(n) or (n,), finish, range(5))
    assert next(results) == 0
    for _ in range(200):
        if made == [0, 1]:
            break
        threading.Event().wait(0.01)
    assert made == [0, 1]  # one ahead, and not more
    assert list(results) == [1, 2, 3, 4]
    assert not gatherers()


def test_closing_the_batches_ends_the_thread():
    fed = feeder().epoch(0)
    next(fed)
    assert gatherers()
    fed.close()
    assert not gatherers()


def test_batches_that_nobody_holds_any_more_end_the_thread():
    fed = feeder().epoch(0)
    next(fed)
    assert gatherers()
    del fed
    gc.collect()
    assert not gatherers()


UNFINISHED = """
import signal, sys, time
from train.batches import ahead

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

def gather(n):
    time.sleep(0.2 * (n > 0))
    return (n,)

batches = ahead(gather, lambda n: n, range(1000))
next(batches)
print("fed", flush=True)
if sys.argv[1] == "wait":
    for _ in batches:
        pass
"""


def test_a_program_ends_with_batches_left():
    done = subprocess.run([sys.executable, "-c", UNFINISHED, "end"], cwd=ROOT, timeout=120, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"fed\n", b"")


def test_ctrl_c_ends_a_program_that_waits_for_a_batch():
    running = subprocess.Popen(
        [sys.executable, "-c", UNFINISHED, "wait"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert running.stdout.readline() == b"fed\n"
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)  # 200 s if it fed all that is left
        assert error.endswith(b"KeyboardInterrupt\n")
    finally:
        running.kill()
        running.wait()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_wanted(monkeypatch):
    def broken(*_, **__):
        raise OSError(5, "Input/output error", "/cache/file")

    monkeypatch.setattr(batches, "gather_rows", broken)
    with pytest.raises(OSError, match="Input/output error"):
        next(feeder().epoch(0))
    assert not gatherers()
