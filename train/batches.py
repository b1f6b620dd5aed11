"""Batches out of a Dataset: their order, their augmentation, and the float tensor a network wants.

Everything random is a function of (seed, epoch, batch), not of a generator's history, so a run resumed inside an
epoch sees exactly the images it would have seen.
"""

import numpy as np
import torch
from torch import Tensor

from train.data import Dataset


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count)."""
    return torch.randperm(count, generator=generator(seed, epoch))


def generator(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of the numbers and is unrelated for neighbouring ones."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))  # torch takes a signed 64-bit seed


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full batches only: the up to batch_size - 1 images left over differ from epoch to epoch.

    A last batch of another size would weigh its images differently and make Triton specialise its kernels anew.
    A set smaller than one batch is one batch.
    """
    return max(1, count // batch_size)


def train_batch(
    data: Dataset, chosen: Tensor, image_size: int, *, device: torch.device, flip: bool, crop: bool,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(x (B, 3, S, S) float in 0..255, y (B,)) on `device`, each image with its own flip and crop."""
    x = data.images[chosen].to(device, non_blocking=True)
    y = data.labels[chosen].to(device, non_blocking=True)
    if crop:
        room = x.shape[-1] - image_size + 1
        offsets = torch.randint(room, (2, len(chosen)), generator=random).to(device)
        x = crop_each(x, offsets[0], offsets[1], image_size)
    else:
        x = centre_crop(x, image_size)
    if flip:
        flipped = torch.rand(len(chosen), generator=random).to(device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    return x, y


def val_batch(data: Dataset, chosen: slice, image_size: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x (B, 3, S, S), y (B,)) on `device`: the centre of each image."""
    x = data.images[chosen].to(device, non_blocking=True)
    return centre_crop(x, image_size), data.labels[chosen].to(device, non_blocking=True)


def normalise(x: Tensor, data: Dataset, memory_format: torch.memory_format) -> Tensor:
    """Pixels 0..255 as floats of mean 0 and deviation 1 per channel, in the layout the model asks for.

    The layout is set here, once a batch, rather than in each model's forward: a model then never converts, and the
    conversion rides on the one from uint8.
    """
    mean = 255 * torch.tensor(data.mean, device=x.device).view(1, 3, 1, 1)
    std = 255 * torch.tensor(data.std, device=x.device).view(1, 3, 1, 1)
    return x.to(torch.float32, memory_format=memory_format).sub_(mean).div_(std)


def centre_crop(x: Tensor, side: int) -> Tensor:
    start = (x.shape[-1] - side) // 2
    return x[:, :, start : start + side, start : start + side]


def crop_each(x: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """x[n, :, top[n] : top[n] + side, left[n] : left[n] + side] for every n."""
    steps = torch.arange(side, device=x.device)
    rows, columns = top[:, None] + steps, left[:, None] + steps  # (B, side) each
    images = torch.arange(len(x), device=x.device)[:, None, None]
    # Indices around the channel slice put the channels last: (B, side, side, 3).
    return x[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
