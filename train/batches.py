"""Batches out of a Dataset: their order, and the augmented, normalised float tensor a network wants.

Everything random is a function of (seed, epoch, batch), not of a generator's history, so a run resumed inside an
epoch sees exactly the images it would have seen.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from train.augment import Augmentation, augment_and_normalise, centre_crop, draw, normalise
from train.cli import UserError
from train.data import Dataset

# Above 0, for trailing zeros do not count: they tell a batch's two streams from each other and from an epoch's order.
AUGMENTATION, LAYERS = 1, 2

T = TypeVar("T")


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count)."""
    return torch.randperm(count, generator=generator(seed, epoch))


def generator(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on the numbers and is unrelated for neighbouring ones; zeros at the end of
    them do not count."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))  # torch takes a signed 64-bit seed


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full batches only: the up to batch_size - 1 images left over differ from epoch to epoch.

    A last batch of another size would weigh its images differently and make Triton specialise its kernels anew.
    A set smaller than one batch is one batch.
    """
    return max(1, count // batch_size)


@dataclass(frozen=True, slots=True)
class Feeder:
    """The training batches of a dataset, for one of `world_size` processes that share each batch.

    Raises UserError where they cannot share it evenly.
    """

    data: Dataset
    _: KW_ONLY
    batch_size: int
    """Images a batch, all processes together."""
    image_size: int
    """Side of the images the network sees."""
    device: torch.device
    """Where batches are augmented and handed out."""
    memory_format: torch.memory_format
    augmentation: Augmentation
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.count % self.world_size:
            raise UserError(f"a batch of {self.count} images does not split evenly over {self.world_size} processes")

    @property
    def count(self) -> int:
        """Images in each batch: fewer than asked for where there are fewer."""
        return min(self.batch_size, len(self.data))

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data), self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batches of an epoch from number `start` on.

        (x (B/world_size, 3, S, S) float32 of mean 0 and deviation 1, y (B/world_size,) int64), on the device. The next
        x takes the place of the last, for on a CPU fresh memory would cost half the time of a large batch.
        """
        order = epoch_order(len(self.data), seed=self.seed, epoch=epoch)

        mean, std = moments(self.data, self.device)
        x = empty_batch(self.count // self.world_size, self.image_size, self.device, self.memory_format)

        share = slice(self.rank, None, self.world_size)

        def gather(batch: int) -> tuple[int, Tensor, Tensor]:
            mine = order[batch * self.count : (batch + 1) * self.count][share]
            return batch, *gather_rows(self.data, mine, pin=self.device.type == "cuda")

        def finish(batch: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            # Drawn here and not in the thread, where PyTorch's operators would be in the way of the step's own.
            draws = draw(
                self.count, self.augmentation, generator(self.seed, epoch, batch, AUGMENTATION),
                centre_share=self.image_size / images.shape[-1],
            )[share].to(self.device)
            augment_and_normalise(
                images.to(self.device, non_blocking=True), draws, self.augmentation, mean, std, out=x
            )
            return x, labels.to(self.device, non_blocking=True)

        yield from ahead(gather, finish, range(start, self.steps_per_epoch))


def val_batches(
    data: Dataset, *, batch_size: int, image_size: int, device: torch.device, memory_format: torch.memory_format,
    rank: int = 0, world_size: int = 1,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The centres of this process's share of the images, in order, each once; the last batch may be short."""
    mean, std = moments(data, device)
    mine = torch.arange(rank, len(data), world_size)
    parts = mine.split(batch_size) if len(mine) else ()

    def gather(part: int) -> tuple[Tensor, Tensor]:
        return gather_rows(data, parts[part], pin=device.type == "cuda")

    def finish(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = normalise(
            centre_crop(images.to(device, non_blocking=True), image_size), mean, std,
            out=empty_batch(len(images), image_size, device, memory_format),
        )
        return x, labels.to(device, non_blocking=True)

    yield from ahead(gather, finish, range(len(parts)))


def moments(data: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)


def empty_batch(count: int, side: int, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    return torch.empty((count, 3, side, side), device=device, memory_format=memory_format)


def gather_rows(data: Dataset, chosen: Tensor, *, pin: bool) -> tuple[Tensor, Tensor]:
    """Images and labels with the numbers `chosen`, copied out of the dataset; page-locked where they go to a GPU."""
    return take(data.images, chosen, pin=pin), take(data.labels, chosen, pin=pin)


def take(rows: Tensor, chosen: Tensor, *, pin: bool) -> Tensor:
    """rows[chosen] in memory of its own. PyTorch keeps page-locked memory until the copies out of it have ended.

    By NumPy, in one thread: PyTorch would start a second team of threads, which the step's own would have to wait for,
    and its rows[chosen] takes 6 times as long.
    """
    out = torch.empty((len(chosen), *rows.shape[1:]), dtype=rows.dtype, pin_memory=pin)
    np.take(rows.numpy(), chosen.numpy(), axis=0, out=out.numpy(), mode="clip")  # "raise" would copy `out` once more
    return out


def ahead(gather: Callable[[int], tuple], finish: Callable[..., T], numbers: range) -> Generator[T, None, None]:
    """finish(*gather(n)) for each of the numbers, gathered by a thread that is one ahead, and finished here.

    Reading pages of a file that is mapped into memory waits for the disk; in a thread it does so during the step. It
    begins when the batch before is finished, for the two would get in each other's way. An exception is raised here.
    """
    if not numbers:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="gather") as pool:
        waiting = pool.submit(gather, numbers[0])
        for following in numbers[1:]:
            made = finish(*waiting.result())
            waiting = pool.submit(gather, following)
            yield made
        yield finish(*waiting.result())
