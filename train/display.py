"""What a run shows while it works: a live bar on a terminal, one plain line an epoch anywhere else."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from train.meter import Meter

TRAIN_COST = 3  # a training image takes about three times a validation image: forward and two gradients


class Display:
    """A context manager around the training; the trainer calls the other methods."""

    def __init__(self, console: Console, *, epochs: int, train_images: int, val_images: int, batch_size: int):
        self.console, self.epochs, self.batch_size = console, epochs, batch_size
        self.train_images, self.val_images = train_images, val_images
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            expand=True,
            disable=console.quiet or not console.is_terminal,
            speed_estimate_period=60,
        )
        self.started = time.perf_counter()

    def __enter__(self) -> "Display":
        self.task = self.progress.add_task("starting", total=self.epochs * self._epoch_cost(), figures="")
        self.progress.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def training(self, epoch: int, batch: int, meter: Meter, images_per_s: float, wait: float) -> None:
        """After a step: `epoch` counts those finished, `batch` the steps in this one; `wait` is percent of the time."""
        if self.progress.disable:
            return
        loss, top1, _ = meter.compute()
        done = TRAIN_COST * min(batch * self.batch_size, self.train_images)
        self._update(epoch, done, f"loss {loss:.3f}  top-1 {top1:.1f}%  {images_per_s:,.0f} images/s  data {wait:.1f}%")

    def validating(self, epoch: int, images: int) -> None:
        """After a validation batch: `images` are done."""
        self._update(epoch, TRAIN_COST * self.train_images + images, f"validating {images}/{self.val_images}")

    def epoch_done(self, epoch: int, row: dict[str, Any]) -> None:
        """One line that stays."""
        elapsed = time.perf_counter() - self.started
        self.progress.console.print(
            f"epoch {epoch}/{self.epochs}  train {row['train_loss']:.3f} {row['train_top1']:.1f}%  "
            f"val {row['val_loss']:.3f} {row['val_top1']:.1f}%  {row['images_per_s']:,.0f} images/s  "
            f"data wait {row['data_wait_pct']:.1f}%  {elapsed:,.0f} s",
            soft_wrap=True,
            highlight=False,
        )

    def _epoch_cost(self) -> int:
        return TRAIN_COST * self.train_images + self.val_images

    def _update(self, epoch: int, done: int, figures: str) -> None:
        self.progress.update(
            self.task,
            description=f"epoch {epoch + 1}/{self.epochs}",
            completed=epoch * self._epoch_cost() + done,
            figures=figures,
        )
