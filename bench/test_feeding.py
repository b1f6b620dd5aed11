"""Feeding: images/s of the cached, batched path beside a pipeline that works image by image, and the wait for data.

Both make the write-up's training batches of 128 px, on the CPU with one thread: `cached` as train.run does, from
decoded images; `per_image` as the workers of a DataLoader do, from JPEG files; `per_image_decoded` the same without
the decoding. `training_step` has two threads, as a small machine would, and fewer images. GPUs augment on the
device, where none of these figures says anything.
"""

import math
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchvision.transforms import v2

import models
from bench.rows import relative_error
from train.batches import Feeder, val_batches
from train.data import IMAGENET_MEAN, IMAGENET_STD, load_data, stored_size
from train.loop import augmentation
from train.recipes import RECIPES

IMAGES, PIXELS, BATCH = 256, 128, 64
STEP_IMAGES, STEP_BATCH = 64, 16
ROUNDS, STEP_ROUNDS = 5, 3
SETTINGS = RECIPES["writeup"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs of 128 x 128 pixels, two classes; smoothed noise, about as large as MiniPlaces' files."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for i in range(IMAGES + IMAGES // 4):
        small = noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((128, 128), Image.Resampling.BICUBIC)
        folder = root / ("train" if i < IMAGES else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:04}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def load(photos, tmp_path_factory):
    """load(images) -> (train, val), decoded once."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda images: load_data(
        str(photos), PIXELS, limit_train=images, limit_val=None, console=Console(quiet=True), cache=cache
    )


def feeder(train, batch_size: int) -> Feeder:
    return Feeder(
        train, batch_size=batch_size, image_size=PIXELS, device=CPU, memory_format=torch.channels_last,
        augmentation=augmentation(SETTINGS), seed=0,
    )


class Inscribed(v2.Transform):
    """Rotation by a random angle, then the square inscribed in the rotated image."""

    def make_params(self, flat_inputs):
        return {"angle": float(torch.empty(()).uniform_(-SETTINGS.rotate, SETTINGS.rotate))}

    def transform(self, image, params):
        angle = math.radians(params["angle"])
        side = int(image.width / (abs(math.cos(angle)) + abs(math.sin(angle))))
        rotated = v2.functional.rotate(image, params["angle"], v2.InterpolationMode.BILINEAR)
        return v2.functional.center_crop(rotated, [side, side])


class ScaleChannels(v2.Transform):
    """Each channel times a factor of its own."""

    def transform(self, image, params):
        factors = 1 + SETTINGS.colour * (2 * torch.rand(3) - 1)
        tables = np.rint(np.outer(factors.double(), np.arange(256))).clip(max=255).astype(np.uint8)  # one a channel
        return image.point(tables.ravel().tolist())


PER_IMAGE = v2.Compose([
    v2.Resize(stored_size(PIXELS)),
    v2.RandomHorizontalFlip(),
    ScaleChannels(),
    Inscribed(),
    v2.RandomResizedCrop(
        PIXELS, (SETTINGS.crop_area, 1), (1 - SETTINGS.crop_ratio, 1 + SETTINGS.crop_ratio), antialias=True
    ),
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
])


@pytest.fixture
def fed(benchmark, device, where, feeding):
    """fed(name, call) times the making of an epoch's batches, and keeps images/s for the summary."""

    if device != CPU:
        pytest.skip("compares one CPU core with one CPU core; run it with --bench-device cpu")

    def run(name, call, *, images=IMAGES, batch_size=BATCH, rounds=ROUNDS, threads_used=1):
        threads = torch.get_num_threads()
        torch.set_num_threads(threads_used)
        try:
            benchmark.group = "feeding"
            benchmark.extra_info.update(
                where, torch_threads=threads_used, images=images, batch_size=batch_size, image_size=PIXELS,
                dtype="float32", conv="torch", backend="native", x_shape=(batch_size, 3, PIXELS, PIXELS), n=rounds,
            )
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        finally:
            torch.set_num_threads(threads)
        if benchmark.enabled:
            feeding[name] = images / benchmark.stats.stats.median

    return run


def test_cached(fed, load, photos):
    data = load(IMAGES)
    check_pictures(data, photos)
    fed("cached", lambda: sum(len(y) for _, y in feeder(data[0], BATCH).epoch(0)))


def test_per_image(fed, photos):
    paths = sorted(photos.glob("train/*/*.jpg"))

    def epoch():
        for start in range(0, IMAGES, BATCH):
            torch.stack([PER_IMAGE(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]])

    fed("per_image", epoch)


def test_per_image_decoded(fed, photos):
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("train/*/*.jpg"))]

    def epoch():
        for start in range(0, IMAGES, BATCH):
            torch.stack([PER_IMAGE(image) for image in images[start : start + BATCH]])

    fed("per_image_decoded", epoch)


def check_pictures(data, photos) -> None:
    """Without augmentation both paths give the same pixels, to rounding: what is compared does the same work."""
    plain = v2.Compose([
        v2.Resize(stored_size(PIXELS)), v2.CenterCrop(PIXELS), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])
    paths = sorted(photos.glob("val/*/*.jpg"))[:8]
    theirs = torch.stack([plain(Image.open(path).convert("RGB")) for path in paths])
    ours, _ = next(val_batches(
        data[1], batch_size=8, image_size=PIXELS, device=CPU, memory_format=torch.contiguous_format
    ))
    assert relative_error(ours, theirs.double()) < 0.01


def test_training_step(fed, load, feeding, benchmark):
    """An epoch of SimpleNet's training steps; the share of it spent on getting batches is told below the tables."""
    torch.manual_seed(0)
    model = models.build("simplenet", "torch", 2, PIXELS).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    source, waits = feeder(load(STEP_IMAGES)[0], STEP_BATCH), []

    def epoch():
        waited, started = 0.0, time.perf_counter()
        batches, before = source.epoch(0), started
        for x, y in batches:
            waited += time.perf_counter() - before
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            before = time.perf_counter()
        waits.append(100 * waited / (time.perf_counter() - started))

    fed("steps", epoch, images=STEP_IMAGES, batch_size=STEP_BATCH, rounds=STEP_ROUNDS, threads_used=2)
    if benchmark.enabled:
        feeding["data_wait_pct"] = benchmark.extra_info["data_wait_pct"] = statistics.median(waits[1:])  # 0 warms up
