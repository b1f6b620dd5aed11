"""The training loop: epochs of steps, a validation after each, and a position from which it can go on exactly."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F

import models
from train import batches, checkpoint
from train.cli import StopRequest, UserError
from train.data import Dataset
from train.display import Display
from train.meter import Meter
from train.optim import initialise, learning_rate, make_optimizer
from train.recipes import Settings
from train.records import Records


class Stopped(Exception):
    """The user asked for a stop; last.pt holds the position."""


class Trainer:
    """One run: the model, its optimiser, and the position in the training."""

    def __init__(
        self, settings: Settings, train: Dataset, val: Dataset, device: torch.device, folder: Path,
    ):
        self.settings, self.train, self.val, self.device, self.folder = settings, train, val, device, folder
        self.memory_format = models.memory_format(settings.conv)
        self.steps_per_epoch = batches.steps_per_epoch(len(train), settings.batch_size)

        torch.manual_seed(settings.seed)
        self.model = models.build(settings.model, settings.conv, len(train.classes), settings.image_size)
        initialise(self.model, settings.init)
        self.model.to(device)
        self.optimizer = make_optimizer(self.model, settings)

        self.epoch = 0  # epochs finished
        self.batch = 0  # steps made in the epoch under way
        self.meter = Meter(len(train.classes), device)
        self.timing = {"seconds": 0.0, "waiting": 0.0, "images": 0, "total_seconds": 0.0, "total_images": 0}
        self.best = {"epoch": 0, "val_top1": -1.0}
        self.saved_step = 0
        self.records = Records(folder)

    @property
    def step(self) -> int:
        """Optimiser steps made so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    def fit(self, display: Display, stop: StopRequest) -> None:
        """Trains to the last epoch. Raises Stopped, or UserError when the loss is no longer a number."""
        for _ in range(self.epoch, self.settings.epochs):
            self.train_epoch(display, stop)
            row = self.train_row() | self.validate(display, stop)
            if not math.isfinite(row["val_loss"]):
                self.fail("validation loss", row["val_loss"], row["lr"], step=self.step)
            self.epoch, self.batch = self.epoch + 1, 0
            self.meter = Meter(len(self.train.classes), self.device)
            self.timing |= {"seconds": 0.0, "waiting": 0.0, "images": 0}
            self.records.add_epoch(self.step, row)
            self.save(is_best=row["val_top1"] > self.best["val_top1"], val_top1=row["val_top1"])
            display.epoch_done(self.epoch, row)

    def train_epoch(self, display: Display, stop: StopRequest) -> None:
        """The steps of the epoch that are still to make."""
        settings, count = self.settings, min(self.settings.batch_size, len(self.train))
        order = batches.epoch_order(len(self.train), seed=settings.seed, epoch=self.epoch)
        self.model.train()
        while self.batch < self.steps_per_epoch:
            if stop:
                self.save()
                raise Stopped
            started = time.perf_counter()
            pixels, y = batches.train_batch(
                self.train, order[self.batch * count : (self.batch + 1) * count], settings.image_size,
                device=self.device, flip=settings.flip, crop=settings.crop,
                random=batches.generator(settings.seed, self.epoch, self.batch),
            )
            x = batches.normalise(pixels, self.train, self.memory_format)
            waited = time.perf_counter() - started

            lr = learning_rate(self.step, settings, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad()
            loss.backward()
            value = loss.item()  # waits for the GPU, so that the times below are the step's own
            if not math.isfinite(value):
                self.fail("loss", value, lr, step=self.step + 1)
            self.optimizer.step()

            self.batch += 1
            self.meter.update(logits, y, loss)
            self.count_time(time.perf_counter() - started, waited, images=count)
            self.records.add_step(self.step, lr, value)
            display.training(self.epoch, self.batch, self.meter, self.speed())

    @torch.no_grad()
    def validate(self, display: Display, stop: StopRequest) -> dict[str, float]:
        """The val_* columns of metrics.csv, over all of the validation images."""
        meter, size = Meter(len(self.val.classes), self.device), self.settings.eval_batch_size
        self.model.eval()
        for start in range(0, len(self.val), size):
            if stop:
                self.save()  # resumed, this epoch has no steps left and is validated from the beginning
                raise Stopped
            chosen = slice(start, start + size)
            pixels, y = batches.val_batch(self.val, chosen, self.settings.image_size, device=self.device)
            logits = self.model(batches.normalise(pixels, self.val, self.memory_format))
            meter.update(logits, y, F.cross_entropy(logits, y))
            display.validating(self.epoch, min(start + size, len(self.val)))
        return dict(zip(("val_loss", "val_top1", "val_top5"), meter.compute(), strict=True))

    def train_row(self) -> dict[str, float]:
        """The columns of metrics.csv that the training steps of the epoch decide."""
        loss, top1, top5 = self.meter.compute()
        return {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss, "train_top1": top1, "train_top5": top5,
            "images_per_s": self.speed(),
            "data_wait_pct": 100 * self.timing["waiting"] / self.timing["seconds"],
        }

    def count_time(self, seconds: float, waited: float, *, images: int) -> None:
        for name, amount in (
            ("seconds", seconds), ("waiting", waited), ("images", images),
            ("total_seconds", seconds), ("total_images", images),
        ):
            self.timing[name] += amount

    def speed(self) -> float:
        """Training images per second in this epoch, validation not counted."""
        return self.timing["images"] / self.timing["seconds"]

    def fail(self, what: str, loss: float, lr: float, *, step: int) -> NoReturn:
        self.records.write()
        raise UserError(
            f"the {what} became {loss} at step {step} with learning rate {lr:.3g}; "
            f"last.pt holds step {self.saved_step}"
        )

    def save(self, *, is_best: bool = False, val_top1: float | None = None) -> None:
        """Writes the CSV files, then best.pt where this is the best so far, then last.pt.

        In this order a run killed in between has rows beyond last.pt, which resuming drops, and never lacks any.
        """
        self.records.write()
        contents = {
            "settings": asdict(self.settings), "classes": list(self.train.classes),
            "epoch": self.epoch, "step": self.step, "val_top1": val_top1, "model": self.model.state_dict(),
        }
        if is_best:
            self.best = {"epoch": self.epoch, "val_top1": val_top1}
            checkpoint.save(self.folder / "best.pt", contents)
        checkpoint.save(self.folder / "last.pt", contents | {
            "batch": self.batch, "train_images": len(self.train), "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.sums, "timing": self.timing, "best": self.best,
            "rng": checkpoint.get_rng(self.device),
        })
        self.saved_step = self.step

    def resume(self) -> None:
        """Takes up the position in last.pt; raises UserError where it is not of this run."""
        path = self.folder / "last.pt"
        saved = checkpoint.load(path)
        expected = (asdict(self.settings), list(self.train.classes), len(self.train))
        if (saved.get("settings"), saved.get("classes"), saved.get("train_images")) != expected:
            raise UserError(f"{path} is of other settings or other data than {self.folder / 'config.json'} names")
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.epoch, self.batch = saved["epoch"], saved["batch"]
            self.meter.sums = saved["meter"].to(self.device)
            self.timing, self.best = saved["timing"], saved["best"]
            checkpoint.set_rng(saved["rng"], self.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        self.saved_step = self.step
        self.records.read(up_to_step=self.step, up_to_epoch=self.epoch)
