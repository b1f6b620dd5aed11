"""The training command: python -m train.run simplenet --conv triton"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.run")

import argparse
import contextlib
import dataclasses
import json
import logging
import shlex
from pathlib import Path

import torch
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed

import models
from train import checkpoint
from train.cli import Parser, UserError, make_console, number, path, run_command, stop_on_signal
from train.data import FASHION_MINI, default_image_size, load_data, require_classes, source
from train.devices import one_thread, pick_device
from train.display import Display
from train.distributed import World, connect, restarts, start_time
from train.files import write_json
from train.loop import AMP_DTYPES, Stopped, Trainer
from train.profiling import WARM_UP, Profiler
from train.recipes import RECIPES, Settings, default_recipe, make_recipe
from train.report import backend_of, describe_backend, device_name, draw_curves, print_summary, summarise
from train.run_folder import PLACES, SUMMARY, default_folder, has_settings, new_folder, read_run, the_only_one

EXAMPLES = """
examples:
  python -m train.run simplenet                embedded images, Triton kernels
  python -m train.run simplenet --conv torch   by PyTorch's own convolution
  python -m train.run customnet --data ~/miniplaces --recipe modern
  python -m train.run resnet18 --data ~/flowers --weights ~/resnet18.pth
  python -m train.run --resume runs/simplenet-triton-20260102-030405
  torchrun --nproc-per-node 8 -m train.run simplenet --data ~/miniplaces

Recipes: quick (AdamW, few epochs) is the default on Fashion-MNIST and on a CPU,
writeup (the course write-up's settings) otherwise; modern adds label smoothing,
gradient clipping, a moving average of the weights and mirror images.

--data takes MiniPlaces (a folder with train.txt and val.txt), or a folder
PATH/train/<class>/*.jpg with PATH/val/<class>/*.jpg, or PATH/<class>/*.jpg,
which is then split.

Under torchrun --batch-size is that of all processes together; who raises it
raises --lr in proportion. Without a GPU the Triton kernels run in Triton's
interpreter: right, and slow.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train.run",
        usage="python -m train.run MODEL [options]\n       python -m train.run --resume DIR",
        description="Train a model on images and write its curves, checkpoints and a summary into a run folder.",
        epilog=EXAMPLES,
        argument_default=argparse.SUPPRESS,  # only what was typed overrides the recipe
    )
    whole = number(int, above=0)
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("model", nargs="?", default=None, choices=list(models.MODELS), help="what to train (not needed by --resume)")
    add("--conv", choices=list(models.CONVOLUTIONS), help="which convolution computes it (default: triton)")
    add("--data", type=source, metavar="fashion-mini|fashion-mnist|PATH",
        help="images to train on (default: the embedded ones)")
    add("--recipe", choices=list(RECIPES), help="settings to start from (default: see below)")
    add("--epochs", type=whole, metavar="N", help="passes over the training images")
    add("--batch-size", type=whole, metavar="N", help="images a training step, all processes together")
    add("--lr", type=number(float, above=0, most=1e4), metavar="X", help="highest learning rate of the schedule")
    add("--optimizer", choices=["sgd", "adamw"], help="what makes the steps")
    add("--weight-decay", type=number(float, least=0), metavar="X", help="decay of the weights")
    add("--label-smoothing", type=number(float, least=0, most=0.99), metavar="X", help="share spread over all classes")
    add("--clip", type=number(float, least=0), metavar="X", help="largest norm of the gradient (0: any)")
    add("--ema", type=number(float, least=0, most=0.999999), metavar="X",
        help="decay a step of a moving average of the weights, which is then what is validated (0: none)")
    add("--flip-tta", action=on_off, help="validate on images and their mirror images")
    side = number(int, least=8, most=4096)
    add("--image-size", type=side, metavar="N", help="side of the images (Fashion-MNIST: 32, else 128)")
    add("--limit-train", type=whole, metavar="N", help="use only N training images, evenly over the classes")
    add("--limit-val", type=whole, metavar="N", help="use only N validation images, evenly over the classes")
    add("--cache", type=path, metavar="DIR", help="where decoded images are kept (default: ~/.cache/conv-lab)")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to train (default: auto, the GPU if there is one)")
    add("--amp", choices=list(AMP_DTYPES), help="automatic mixed precision (default: off)")
    add("--compile", action=on_off, help="train through torch.compile (default: no)")
    add("--channels-last", action=on_off, help="the layout for --conv torch (default: yes)")
    add("--weights", type=weights, metavar="FILE|imagenet|none",
        help="pretrained weights of ResNet18 (default: imagenet)")
    add("--init", type=path, metavar="FILE", help="start from the weights of a checkpoint or run of the same model")
    seed = number(int, least=0, most=2**63 - 1)
    add("--seed", type=seed, metavar="N", help="of weights, order and augmentation (default: 0)")
    add("--out", type=path, metavar="DIR", help="the run folder (default: runs/<model>-<conv>-<time>)")
    add("--resume", type=path, metavar="DIR",
        help="go on with the run in DIR, with the settings it began with; where its images lie elsewhere by now, "
        "name them with --data")
    add("--profile", type=whole, metavar="N", help="profile N training steps: a table of operators and a trace")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    typed = {name: value for name, value in vars(arguments).items() if value is not None}
    with connect() as world:
        console = make_console(quiet=not world.is_main)
        if "resume" in typed:
            resume(typed, console, world)
        else:
            start(typed, console, world)


def start(typed: dict, console: Console, world: World) -> None:
    """A new run, or what torchrun restarted of one."""
    out, profile = typed.pop("out", None), typed.pop("profile", None)
    settings = make_settings(typed)
    folder = world.share(out or default_folder(settings, started=start_time()))
    if world.share(restarts() > 0 and has_settings(folder, settings)):
        resume({"resume": folder}, console, world)
        return
    with new_folder(folder, settings, exact=out is not None) if world.is_main else contextlib.nullcontext() as made:
        trainer = make_trainer(settings, world.share(made), console, world)
        profiler = make_profiler(profile, trainer, console)
        trainer.save()  # whatever happens from now on, --resume can go on
        train(trainer, console, profiler)


def resume(typed: dict, console: Console, world: World) -> None:
    """The rest of an earlier run."""
    folder, profile, model = typed.pop("resume"), typed.pop("profile", None), typed.pop("model", None)
    if others := typed.keys() - set(PLACES):
        flag = "--" + min(others).replace("_", "-")
        raise UserError(f"--resume goes on with the settings in {folder / 'config.json'}; leave out {flag}")
    place(typed)
    with the_only_one(folder) if world.is_main else contextlib.nullcontext():
        settings, saved = world.share(read_run(folder) if world.is_main else None)
        if model not in (None, settings.model):
            raise UserError(f"{folder} is a run of {settings.model}, not of {model}")
        if world.share((folder / SUMMARY).exists()):
            show_finished(folder, console)
            return
        trainer = make_trainer(dataclasses.replace(settings, **typed), folder, console, world, saved)
        profiler = make_profiler(profile, trainer, console)
        if saved is None:
            trainer.save()
        console.print(f"going on after step {trainer.step}")
        train(trainer, console, profiler)


def show_finished(folder: Path, console: Console) -> None:
    console.print(f"{folder} is complete: there is nothing left to do", soft_wrap=True)
    summary = folder / SUMMARY
    try:
        print_summary(console, json.loads(summary.read_text()), folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary} is damaged; delete it and resume again to rewrite it") from error


def make_settings(typed: dict) -> Settings:
    """The recipe with what was typed in its place, and everything that was left open decided."""
    if "model" not in typed:
        raise UserError(f"name a model to train: {', '.join(models.MODELS)} (or --resume DIR)")
    data = typed.setdefault("data", FASHION_MINI)
    typed.setdefault("device", "auto")
    place(typed)
    typed.setdefault("image_size", default_image_size(data))
    name = typed.pop("recipe", None) or default_recipe(data, typed["device"])
    if typed.get("weights", "none") != "none":
        if typed["model"] != "resnet18":
            raise UserError(f"--weights {typed['weights']}: there are pretrained weights for resnet18 only")
        if typed["weights"] != "imagenet":
            typed["weights"] = existing("--weights", Path(typed["weights"]))
    if "init" in typed:
        typed["start_from"] = existing("--init", checkpoint.checkpoint_file(typed.pop("init")))
        typed.setdefault("weights", "none")
    for name_of_none in ("clip", "ema"):
        if typed.get(name_of_none) == 0:
            typed[name_of_none] = None
    return dataclasses.replace(make_recipe(name, typed["model"], data, typed.get("weights")), **typed)


def weights(text: str) -> str:
    """An argparse type: "imagenet", "none", or the path of a file."""
    return text if text in ("imagenet", "none") else str(path(text))


def place(typed: dict) -> None:
    """What was typed for PLACES, as it holds from any folder and on this machine."""
    if "cache" in typed:
        typed["cache"] = str(typed["cache"].absolute())
    if "device" in typed:
        typed["device"] = pick_device(typed["device"]).type


def existing(flag: str, file: Path) -> str:
    """The absolute path of a file that is there: known before the images are read."""
    if not file.is_file():
        raise UserError(f"{flag} {file}: no such file")
    return str(file.absolute())


def make_trainer(
    settings: Settings, folder: Path, console: Console, world: World, saved: dict | None = None
) -> Trainer:
    """Everything that can go wrong before training goes wrong here."""
    pick_device(settings.device)  # a run may be resumed on another machine
    device = world.device(settings.device)
    try:
        backend = backend_of(settings.conv, device)
        with torch.device("meta"):  # whether the model takes such images is known before any is read
            models.build(settings.model, settings.conv, num_classes=2, image_size=settings.image_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    try:
        train_data, val_data = load_data(
            settings.data,
            settings.image_size,
            limit_train=settings.limit_train,
            limit_val=settings.limit_val,
            console=console,
            cache=Path(settings.cache) if settings.cache else None,
        )
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise MemoryError(f"for these images at {settings.image_size} px; take a smaller --image-size") from error
    require_classes(train_data)
    if settings.limit_train is not None and settings.limit_train < len(train_data.classes):
        raise UserError(
            f"--limit-train {settings.limit_train} would leave some of the {len(train_data.classes)} classes without "
            "an image"
        )
    if min(settings.batch_size, len(train_data)) == 1:
        require_norms_of_one(settings)
    console.print(
        f"{settings.model} on {len(train_data):,} training and {len(val_data):,} validation images of "
        f"{len(train_data.classes)} classes at {settings.image_size} px; "
        f"convolutions {describe_backend(backend, device_name(device))}; "
        f"{f'{world.size} processes; ' if world.size > 1 else ''}run folder {folder}",
        soft_wrap=True,
    )
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
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"not enough GPU memory for {settings.batch_size} images of {settings.image_size} px a step; "
            "take a smaller --batch-size or --image-size"
        ) from error
    except UserError:
        draw(trainer)
        raise
    except Stopped:
        draw(trainer)
        command = "python" if world.size == 1 else "torchrun, as before, with"
        raise UserError(
            f"stopped after step {trainer.step}, saved in {folder / checkpoint.LAST}; "
            f"go on with: {command} -m train.run {settings.model} --resume {shlex.quote(str(folder))}"
        ) from None
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
    )
    write_json(folder / SUMMARY, summary)
    print_summary(console, summary, folder)


def draw(trainer: Trainer) -> None:
    """curves.png of the epochs so far, if there are any; rank 0 does."""
    settings = trainer.settings
    if trainer.world.is_main and trainer.records.epochs:
        draw_curves(
            trainer.folder,
            f"{settings.model}, {settings.conv} convolution, {settings.recipe} recipe, {Path(settings.data).name}",
            label_smoothing=settings.label_smoothing,
        )


if __name__ == "__main__":
    main()
