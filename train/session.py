"""A run in its folder: begun there or gone on with, and trained to its end. For every command that trains."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed

import models
from train import checkpoint, shortage
from train.cli import UserError, stop_on_signal
from train.data import default_image_size, load_data, require_classes
from train.devices import OutOfMemory, needing_memory, one_thread, pick_device
from train.display import Display
from train.distributed import World
from train.files import write_json
from train.loop import Stopped, Trainer
from train.memory import VALIDATION
from train.profiling import WARM_UP, Profiler
from train.recipes import Settings
from train.rehearsal import Training, Validation, step_of
from train.report import (
    adversarial_entry,
    backend_of,
    describe_attack,
    describe_backend,
    device_name,
    draw_curves,
    print_summary,
    summarise,
)
from train.run_folder import CONFIG, PLACES, SUMMARY, differences, new_folder, read_run, the_only_one


def train_in(folder: Path, settings: Settings, console: Console, world: World) -> None:
    """Trains `settings` in `folder` to the end: a new run, or the rest of the one that was begun there with them.

    A complete one is left as it is. Another cache or device is no other settings; other data is, for a complete run's
    images are not looked at again. Raises UserError where the folder holds a run of other settings, and where training
    is stopped: the same call then goes on.
    """
    size = settings.image_size or default_image_size(settings.data)
    settings = dataclasses.replace(settings, device=pick_device(settings.device).type, image_size=size)
    try:
        if not world.share((folder / CONFIG).exists()):
            begin(folder, settings, console, world, exact=True)
            return
        with begun(folder, world) as (theirs, saved):
            if others := differences(theirs, settings) - (set(PLACES) - {"data"}):
                raise UserError(f"{folder} holds a run of other settings: {', '.join(sorted(others))}; "
                                "take another folder")
            if is_complete(folder, world):
                console.print(f"{folder} is complete", soft_wrap=True)
                return
            go_on(folder, settings, saved, console, world)
    except Stopped as stop:
        raise UserError(f"{stop}; the same command goes on from there") from None


def begin(
    folder: Path, settings: Settings, console: Console, world: World, *, exact: bool, profile: int | None = None
) -> None:
    """A new run; `exact` as in `new_folder`. Raises Stopped, and UserError for what a user can put right."""
    with new_folder(folder, settings, exact=exact) if world.is_main else contextlib.nullcontext() as made:
        trainer = make_trainer(settings, world.share(made), console, world)
        profiler = make_profiler(profile, trainer, console)
        trainer.save()  # whatever happens from now on, the run can be gone on with
        train(trainer, console, profiler)


@contextlib.contextmanager
def begun(folder: Path, world: World) -> Iterator[tuple[Settings, dict | None]]:
    """What `read_run` says of the run in `folder`, where nobody else trains inside the block."""
    with the_only_one(folder) if world.is_main else contextlib.nullcontext():
        yield world.share(read_run(folder) if world.is_main else None)


def go_on(
    folder: Path, settings: Settings, saved: dict | None, console: Console, world: World, *, profile: int | None = None
) -> None:
    """The rest of the run that is `begun` in `folder`. Raises as `begin`."""
    trainer = make_trainer(settings, folder, console, world, saved)
    profiler = make_profiler(profile, trainer, console)
    if saved is None:
        trainer.save()
    elif world.is_main:
        trainer.records.write()  # a full disk or a read-only folder shows itself before a step is made
    console.print(f"going on after step {trainer.step}")
    train(trainer, console, profiler)


def is_complete(folder: Path, world: World) -> bool:
    return world.share((folder / SUMMARY).exists())


def make_trainer(
    settings: Settings, folder: Path, console: Console, world: World, saved: dict | None = None
) -> Trainer:
    """Everything that can go wrong before training goes wrong here."""
    device = world.device(pick_device(settings.device).type)  # a run may be resumed on another machine
    try:
        backend = backend_of(settings.conv, device)
        with torch.device("meta"):  # whether the model takes such images is known before any is read
            models.build(settings.model, settings.conv, num_classes=2, image_size=settings.image_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    with needing_memory(f"these images at {settings.image_size} px; take a smaller --image-size"):
        train_data, val_data = load_data(
            settings.data,
            settings.image_size,
            limit_train=settings.limit_train,
            limit_val=settings.limit_val,
            console=console,
            cache=Path(settings.cache) if settings.cache else None,
        )
    require_classes(train_data)
    if settings.limit_train is not None and settings.limit_train < len(train_data.classes):
        raise UserError(
            f"--limit-train {settings.limit_train} would leave some of the {len(train_data.classes)} classes without "
            "an image"
        )
    if min(settings.batch_size, len(train_data)) == 1:
        require_norms_of_one(settings)
    attack = adversarial_entry(settings)
    console.print(
        f"{settings.model} on {len(train_data):,} training and {len(val_data):,} validation images of "
        f"{len(train_data.classes)} classes at {settings.image_size} px; "
        f"{f'adversarial training ({describe_attack(attack)}); ' if attack else ''}"
        f"convolutions {describe_backend(backend, device_name(device))}; "
        f"{f'{world.size} processes; ' if world.size > 1 else ''}run folder {folder}",
        soft_wrap=True,
    )
    with needing_memory(f"the weights of {settings.model} on {device_name(device)}"):
        return Trainer(settings, train_data, val_data, device, folder, world, saved)


def require_norms_of_one(settings: Settings) -> None:
    """Raises UserError for a model with a batch norm that has nothing to normalise by in a step of one image."""
    size = settings.image_size
    with torch.device("meta"):
        try:
            models.build(settings.model, "torch", num_classes=2, image_size=size)(torch.empty(1, 3, size, size))
        except ValueError as error:
            raise UserError(
                f"{settings.model} has a batch norm that cannot train on one image of {size} px a step; "
                "take a larger --batch-size"
            ) from error


def make_profiler(steps: int | None, trainer: Trainer, console: Console) -> Profiler | None:
    """Of rank 0, if --profile asked for one; UserError where the run has too few steps left."""
    if steps is None:
        return None
    left = trainer.settings.epochs * trainer.steps_per_epoch - trainer.step
    if steps + WARM_UP > left:
        raise UserError(f"--profile {steps}: of this run's {left} steps the first {WARM_UP} are not profiled")
    return Profiler(steps, trainer.folder, console, trainer.device) if trainer.world.is_main else None


def train(trainer: Trainer, console: Console, profiler: Profiler | None) -> None:
    """To the last epoch, then the summary. Raises Stopped, and UserError for what a user can put right."""
    settings, folder, world = trainer.settings, trainer.folder, trainer.world
    display = Display(
        console,
        epochs=settings.epochs,
        train_images=len(trainer.train),
        val_images=len(trainer.val),
        batch_size=settings.batch_size,
    )
    if settings.compile:  # it writes the code it cannot compile, tens of lines, and raises what we tell in one
        logging.getLogger("torch._inductor.scheduler").addFilter(lambda record: record.levelno < logging.CRITICAL)
    try:
        with (
            stop_on_signal(patient=world.size > 1) as stop,
            display,
            one_thread(backend_of(settings.conv, trainer.device)),
        ):
            trainer.fit(display, stop, profiler)
    except BackendCompilerFailed as error:
        raise UserError(f"--compile: torch.compile cannot compile here: {error}") from error
    except OutOfMemory as error:
        draw(trainer)
        raise UserError(describe_shortage(trainer, error.phase)) from error
    except (UserError, Stopped):
        draw(trainer)
        raise
    draw(trainer)
    if not world.is_main:
        return
    summary = summarise(
        settings,
        trainer.device,
        classes=len(trainer.train.classes),
        train_images=len(trainer.train),
        val_images=len(trainer.val),
        last=trainer.records.epochs[-1],
        best=trainer.best,
        processes=world.size,
        images_per_s=trainer.timing["total_images"] / trainer.timing["total_seconds"],
        memory=trainer.memory.summary(),
    )
    write_json(folder / SUMMARY, summary)
    print_summary(console, summary, folder)


def describe_shortage(trainer: Trainer, phase: str) -> str:
    """One line: what ran out of memory in the phase, what is predicted to fit, and what is kept."""
    settings, world, model = trainer.settings, trainer.world, trainer.model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # Beside the step: averaged weights, and gradients as DistributedDataParallel sends them around.
    besides = weights * (bool(settings.ema) + (world.size > 1))
    images, flag, work = trainer.feeder.count // world.size, "--batch-size", Training
    if phase == VALIDATION:
        share = -(-len(trainer.val) // world.size)
        images, flag, work = min(settings.eval_batch_size, share), "--eval-batch-size", Validation
        state = (value for values in trainer.optimizer.state.values() for value in values.values())
        kept = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        besides += sum(tensor.nbytes for tensor in (*kept, *state) if isinstance(tensor, torch.Tensor))
    step = step_of(settings, images)
    told = shortage.describe(
        step, trainer.device, settings, flag=flag, work=work, processes=world.size if work is Training else 1,
        besides=besides,
    )
    return f"{phase}: {told}; {trainer.folder / checkpoint.LAST} holds step {trainer.saved_step}"


def draw(trainer: Trainer) -> None:
    """curves.png of the epochs so far, if there are any; rank 0 does."""
    if trainer.world.is_main and trainer.records.epochs:
        draw_curves(trainer.folder, trainer.settings)


def show_finished(folder: Path, console: Console) -> None:
    console.print(f"{folder} is complete: there is nothing left to do", soft_wrap=True)
    summary = folder / SUMMARY
    if not summary.is_file():  # a pipe, say, whose end may never come
        raise UserError(f"{summary} is no file")
    try:
        print_summary(console, json.loads(summary.read_text()), folder)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{summary} is damaged; delete it and resume again to rewrite it") from error
