"""The training loop: epochs of steps, a validation after each, and a position from which it can go on exactly.

Whatever is random in a step is drawn from generators seeded by (seed, epoch, batch), so that position is two numbers.
"""

import contextlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from attacks.pgd import pgd
from train import checkpoint
from train.augment import Augmentation
from train.batches import LAYERS, Feeder, generator, val_batches
from train.cli import StopRequest, UserError
from train.data import Dataset
from train.devices import telling_of_memory
from train.display import Display
from train.distributed import World
from train.memory import SAVING, TRAINING, VALIDATION, MemoryAccount
from train.meter import Meter
from train.optim import MovingAverage, initialise, learning_rate, make_optimizer
from train.profiling import Profiler
from train.recipes import Settings
from train.records import Records

SAVE_EVERY = 300  # seconds; within a long epoch, so that a crash costs no more
AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Stopped(Exception):
    """The user asked for a stop; last.pt in `folder` holds the position. How to go on is for the command to say."""

    def __init__(self, step: int, folder: Path, model: str):
        super().__init__(f"stopped after step {step}, saved in {folder / checkpoint.LAST}")
        self.folder, self.model = folder, model


class Trainer:
    """One run: the model, its optimiser, and the position in the training.

    `saved` is what the last.pt of an earlier part of the run holds: it is taken up there.
    """

    def __init__(
        self, settings: Settings, train: Dataset, val: Dataset, device: torch.device, folder: Path, world: World,
        saved: dict | None = None,
    ):
        self.settings, self.train, self.val, self.device, self.folder = settings, train, val, device, folder
        self.world = world
        self.memory_format = layout(settings)
        self.feeder = Feeder(
            train, batch_size=settings.batch_size, image_size=settings.image_size, device=device,
            memory_format=self.memory_format, augmentation=augmentation(settings), seed=settings.seed,
            rank=world.rank, world_size=world.size,
        )
        self.steps_per_epoch = self.feeder.steps_per_epoch

        torch.manual_seed(settings.seed)
        self.model = models.build(
            settings.model, settings.conv, len(train.classes), settings.image_size, fuse=settings.fuse
        )
        initialise(self.model, settings.init)
        if saved is None:
            for turn in (True, False):  # rank 0 first: what it downloads the others find
                if world.is_main is turn:
                    load_initial_weights(self.model, settings, train.classes)
                world.share(None)
        self.model = world.sync_norms(self.model.to(device, memory_format=self.memory_format), device)
        self.average = MovingAverage(self.model, settings.ema) if settings.ema else None
        self.forward = world.wrap(self.model, device)
        if settings.compile:
            self.forward = torch.compile(self.forward)
        self.optimizer = make_optimizer(self.model, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")

        self.epoch = 0  # epochs finished
        self.batch = 0  # steps made in the epoch under way
        self.meter = Meter(len(train.classes), device)
        self.timing = {"seconds": 0.0, "waiting": 0.0, "images": 0, "total_seconds": 0.0, "total_images": 0}
        self.best = {"epoch": 0, "val_top1": -1.0}
        self.saved_step, self.saved_time = 0, time.monotonic()
        self.memory = MemoryAccount(device)
        self.records = Records(folder)
        if saved is not None:
            self.resume(saved)

    @property
    def step(self) -> int:
        """Optimiser steps made so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and kept: the moving average where there is one."""
        return self.average.model if self.average else self.model

    def fit(self, display: Display, stop: StopRequest, profiler: Profiler | None = None) -> None:
        """Trains to the last epoch. Raises Stopped, OutOfMemory, or UserError when the loss is no longer a number."""
        with self.memory:
            if reason := self.memory.unavailable:
                display.console.print(f"memory is not followed: {reason}", soft_wrap=True, highlight=False)
            for _ in range(self.epoch, self.settings.epochs):
                self.fit_epoch(display, stop, profiler)

    def fit_epoch(self, display: Display, stop: StopRequest, profiler: Profiler | None) -> None:
        """One epoch, or the rest of it, with its validation, its row and its checkpoint."""
        with telling_of_memory(TRAINING):
            self.train_epoch(display, stop, profiler)
        self.memory.mark(TRAINING)
        with profiler.paused() if profiler else contextlib.nullcontext(), telling_of_memory(VALIDATION):
            row = self.train_row() | self.validate(display, stop)
        if not math.isfinite(row["val_loss"]):
            self.fail("validation loss", row["val_loss"], row["lr"], step=self.step)
        self.memory.mark(VALIDATION)
        row |= self.memory.end_epoch()
        self.epoch, self.batch = self.epoch + 1, 0
        self.meter = Meter(len(self.train.classes), self.device)
        self.timing |= {"seconds": 0.0, "waiting": 0.0, "images": 0}
        self.records.add_epoch(self.step, row)
        self.save(is_best=row["val_top1"] > self.best["val_top1"], val_top1=row["val_top1"])
        display.epoch_done(self.epoch, row)
        self.memory.mark(SAVING)

    def train_epoch(self, display: Display, stop: StopRequest, profiler: Profiler | None) -> None:
        """The steps of the epoch that are still to make."""
        self.forward.train()
        with contextlib.closing(self.feeder.epoch(self.epoch, start=self.batch)) as fed:
            while self.batch < self.steps_per_epoch:
                self.stop_if_asked(stop)
                started = time.perf_counter()
                x, y = next(fed)
                waited = time.perf_counter() - started
                self.train_step(x, y)
                self.count_time(time.perf_counter() - started, waited, images=self.world.size * len(y))
                display.training(self.epoch, self.batch, self.meter, self.speed(), self.wait_share())
                if profiler:
                    profiler.step()
                if time.monotonic() - self.saved_time > SAVE_EVERY:
                    self.save()

    def train_step(self, x: Tensor, y: Tensor) -> None:
        """One step of the optimiser on this process's share of a batch."""
        settings = self.settings
        if settings.adversarial:
            x = self.attacked(x, y)
        # By the position alone, so that no generator's state needs keeping; each process draws for other images.
        seeded = generator(settings.seed, self.epoch, self.batch, LAYERS, self.world.rank)
        torch.manual_seed(seeded.initial_seed())
        lr = learning_rate(self.step, settings, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, settings.amp):
            logits = self.forward(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=settings.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()

        sums = self.world.sum(self.meter.sums_of(logits, y, loss))
        total, _, _, images = sums.tolist()  # waits for the GPU, so that the times counted are the step's own
        if not math.isfinite(total):
            self.fail("loss", total / images, lr, step=self.step + 1)
        if settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.batch += 1
        if self.average:
            self.average.update(self.model, self.step)
        self.meter.sums += sums
        self.records.add_step(self.step, lr, total / images)

    def attacked(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images for x (N, C, H, W) and the weights as they are, in memory of their own.

        Of the model itself, in evaluation mode: images of one batch do not depend on each other, statistics and draws
        of layers are the training forward's alone, and neither DistributedDataParallel nor torch.compile takes part.
        So all else of the step is what it is without an attack.
        """
        settings = self.settings
        return pgd(
            self.model, x, settings.adversarial, y, num_steps=settings.adversarial_steps,
            step_size=settings.adversarial_step_size, epsilon=settings.adversarial_epsilon,
        )

    @torch.no_grad()
    def validate(self, display: Display, stop: StopRequest) -> dict[str, float]:
        """The val_* columns of metrics.csv, over all of the validation images, each counted once."""
        meter, settings = Meter(len(self.val.classes), self.device), self.settings
        model = self.evaluated.eval()
        done = 0
        for x, y in val_batches(
            self.val, batch_size=settings.eval_batch_size, image_size=settings.image_size, device=self.device,
            memory_format=self.memory_format, rank=self.world.rank, world_size=self.world.size,
        ):
            if self.world.size == 1:  # several agree at the end only, for their numbers of batches may differ
                self.stop_if_asked(stop)
            with autocast(self.device, settings.amp):
                logits = predict(model, x, flip=settings.flip_tta)
            meter.update(logits, y, F.cross_entropy(logits, y))
            done += self.world.size * len(y)
            display.validating(self.epoch, min(done, len(self.val)))
        meter.sums = self.world.sum(meter.sums)
        self.stop_if_asked(stop)  # resumed, this epoch has no steps left and is validated from the beginning
        return dict(zip(("val_loss", "val_top1", "val_top5"), meter.compute(), strict=True))

    def stop_if_asked(self, stop: StopRequest) -> None:
        """Saves and raises Stopped where any of the processes was asked to stop."""
        if self.world.any(bool(stop), self.device):
            self.save()
            raise Stopped(self.step, self.folder, self.settings.model)

    def train_row(self) -> dict[str, float]:
        """The columns of metrics.csv that the training steps decide: in adversarial training, on adversarial images."""
        loss, top1, top5 = self.meter.compute()
        return {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss, "train_top1": top1, "train_top5": top5,
            "images_per_s": self.speed(),
            "data_wait_pct": self.wait_share(),
        }

    def count_time(self, seconds: float, waited: float, *, images: int) -> None:
        for name, amount in (
            ("seconds", seconds), ("waiting", waited), ("images", images),
            ("total_seconds", seconds), ("total_images", images),
        ):
            self.timing[name] += amount

    def speed(self) -> float:
        """Training images per second in this epoch, all processes together, validation not counted."""
        return self.timing["images"] / self.timing["seconds"]

    def wait_share(self) -> float:
        """Percent of this epoch's training time spent on getting batches: read, augmented and normalised."""
        return 100 * self.timing["waiting"] / self.timing["seconds"]

    def fail(self, what: str, loss: float, lr: float, *, step: int) -> NoReturn:
        if self.world.is_main:
            self.records.write()
        raise UserError(
            f"the {what} became {loss} at step {step} with learning rate {lr:.3g}; "
            f"{self.folder / checkpoint.LAST} holds step {self.saved_step}; "
            "start again with a smaller --lr, or with --clip"
        )

    def save(self, *, is_best: bool = False, val_top1: float | None = None) -> None:
        """Writes the CSV files, then best.pt where this is the best so far, then last.pt; only rank 0 does.

        In this order a run killed in between has rows beyond last.pt, which resuming drops, and never lacks any.
        """
        self.saved_step, self.saved_time = self.step, time.monotonic()
        if is_best:
            self.best = {"epoch": self.epoch, "val_top1": val_top1}
        if not self.world.is_main:
            return
        self.records.write()
        contents = {
            "settings": asdict(self.settings), "classes": list(self.train.classes),
            "epoch": self.epoch, "step": self.step, "val_top1": val_top1, "model": self.evaluated.state_dict(),
        }
        if is_best:
            checkpoint.save(self.folder / checkpoint.BEST, contents)
        checkpoint.save(self.folder / checkpoint.LAST, contents | {
            "batch": self.batch, "data": [self.train.fingerprint, self.val.fingerprint],
            "trained_model": self.model.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "meter": self.meter.sums, "timing": self.timing, "best": self.best,
        })

    def resume(self, saved: dict) -> None:
        """Takes up the position that last.pt holds, `saved`; raises UserError where it is not of this run."""
        path = self.folder / checkpoint.LAST
        checkpoint.require_same_model(path, saved, self.settings.model, self.train.classes)
        if saved.get("data") != [self.train.fingerprint, self.val.fingerprint]:
            raise UserError(f"the images of {self.settings.data} are not those that {path} was trained on")
        fresh = {"scaler": self.scaler.state_dict(), "meter": self.meter.sums, "timing": self.timing}
        checkpoint.require_position(path, saved, fresh, self.steps_per_epoch)
        self.epoch, self.batch = saved["epoch"], saved["batch"]
        self.meter.sums = saved["meter"].to(self.device)
        self.timing, self.best = saved["timing"], saved["best"]
        stepped = self.step > 0
        if self.scaler.is_enabled() and stepped:  # it leaves out the steps whose gradients overflow
            stepped = None
        if self.settings.optimizer == "sgd" and self.settings.momentum == 0:  # it has nothing to keep
            stepped = False
        try:
            checkpoint.copy_weights(saved["trained_model"] if self.average else saved["model"], self.model)
            if self.average:
                checkpoint.copy_weights(saved["model"], self.average.model)
            checkpoint.load_optimizer(saved["optimizer"], self.optimizer, stepped=stepped)
            self.scaler.load_state_dict(saved["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        self.saved_step = self.step
        self.records.read(up_to_step=self.step, up_to_epoch=self.epoch)


def layout(settings: Settings) -> torch.memory_format:
    """The memory format of the run's parameters and batches."""
    if settings.conv == "torch" and settings.channels_last:
        return torch.channels_last
    return models.memory_format(settings.conv)


def augmentation(settings: Settings) -> Augmentation:
    return Augmentation(
        flip=settings.flip, colour=settings.colour, rotate=settings.rotate,
        crop_area=settings.crop_area, crop_ratio=settings.crop_ratio,
    )


def load_initial_weights(model: nn.Module, settings: Settings, classes: tuple[str, ...]) -> None:
    """Pretrained weights (--weights) or those of a checkpoint of ours (--init); UserError where they misfit."""
    if settings.weights != "none":
        source = settings.weights if settings.weights == "imagenet" else Path(settings.weights)
        try:
            models.load_pretrained(model, settings.model, source)
        except ValueError as error:
            raise UserError(str(error)) from error
    if settings.start_from is not None:
        path = Path(settings.start_from)
        saved = checkpoint.load(path)
        checkpoint.require_same_model(path, saved, settings.model, classes)
        checkpoint.load_weights(path, saved, model)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of mixed precision that a key of AMP_DTYPES names; "off" changes nothing."""
    dtype = AMP_DTYPES[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def predict(model: nn.Module, x: Tensor, *, flip: bool) -> Tensor:
    """(N, classes) float32 logits; with `flip`, the mean over each image and its mirror image."""
    logits = model(x).float()
    return (logits + model(x.flip(3)).float()) / 2 if flip else logits
