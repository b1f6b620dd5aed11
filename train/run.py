"""The training command: python -m train.run simplenet --conv triton"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.run")

import argparse
import contextlib
import dataclasses
import fcntl
import json
import logging
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed

import models
from train import checkpoint
from train.cli import Parser, UserError, number, run_command, stop_on_signal
from train.data import FASHION_MINI, default_image_size, load_data, require_classes
from train.devices import one_thread, pick_device
from train.display import Display
from train.distributed import World, connect, restarts, start_time
from train.files import create_json, write_json
from train.loop import AMP_DTYPES, Stopped, Trainer
from train.profiling import WARM_UP, Profiler
from train.recipes import FASHION, RECIPES, Settings, default_recipe, make_recipe
from train.report import backend_of, describe_backend, device_name, draw_curves, print_summary, summarise

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
    add("--data", metavar="fashion-mini|fashion-mnist|PATH", help="images to train on (default: the embedded ones)")
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
    add("--cache", type=Path, metavar="DIR", help="where decoded images are kept (default: ~/.cache/conv-lab)")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to train (default: auto, the GPU if there is one)")
    add("--amp", choices=list(AMP_DTYPES), help="automatic mixed precision (default: off)")
    add("--compile", action=on_off, help="train through torch.compile (default: no)")
    add("--channels-last", action=on_off, help="the layout for --conv torch (default: yes)")
    add("--weights", metavar="FILE|imagenet|none", help="pretrained weights of ResNet18 (default: imagenet)")
    add("--init", type=Path, metavar="FILE", help="start from the weights of a checkpoint of the same model")
    seed = number(int, least=0, most=2**63 - 1)
    add("--seed", type=seed, metavar="N", help="of weights, order and augmentation (default: 0)")
    add("--out", type=Path, metavar="DIR", help="the run folder (default: runs/<model>-<conv>-<time>)")
    add("--resume", type=Path, metavar="DIR", help="go on with the run in DIR, with the settings it began with")
    add("--profile", type=whole, metavar="N", help="profile N training steps: a table of operators and a trace")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    typed = {name: value for name, value in vars(arguments).items() if value is not None}
    with connect() as world:
        console = Console(quiet=not world.is_main)
        if "resume" in typed:
            resume(typed, console, world)
        else:
            start(typed, console, world)


def start(typed: dict, console: Console, world: World) -> None:
    """A new run, or what torchrun restarted of one."""
    out, profile = typed.pop("out", None), typed.pop("profile", None)
    settings = make_settings(typed)
    folder = world.share(out.expanduser() if out else default_folder(settings, started=start_time()))
    if world.share(restarts() > 0 and has_settings(folder, settings)):
        resume({"resume": folder}, console, world)
        return
    with new_folder(folder, settings, exact=out is not None) if world.is_main else contextlib.nullcontext() as made:
        trainer = make_trainer(settings, world.share(made), console, world)
        trainer.save()  # whatever happens from now on, --resume can go on
        train(trainer, console, profile)


def resume(typed: dict, console: Console, world: World) -> None:
    """The rest of an earlier run."""
    folder, profile, model = typed.pop("resume"), typed.pop("profile", None), typed.pop("model", None)
    if typed:
        flag = "--" + next(iter(typed)).replace("_", "-")
        raise UserError(f"--resume goes on with the settings in {folder / 'config.json'}; leave out {flag}")
    with the_only_one(folder) if world.is_main else contextlib.nullcontext():
        settings, saved = world.share(read_run(folder) if world.is_main else None)
        if model not in (None, settings.model):
            raise UserError(f"{folder} is a run of {settings.model}, not of {model}")
        if world.share((folder / "summary.json").exists()):
            show_finished(folder, console)
            return
        trainer = make_trainer(settings, folder, console, world)
        if saved is None:
            trainer.save()
        else:
            trainer.resume(saved)
        console.print(f"going on after step {trainer.step}", highlight=False)
        train(trainer, console, profile)


def show_finished(folder: Path, console: Console) -> None:
    console.print(f"{folder} is complete: there is nothing left to do", soft_wrap=True, highlight=False)
    path = folder / "summary.json"
    try:
        print_summary(console, json.loads(path.read_text()), folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete it and resume again to rewrite it") from error


def make_settings(typed: dict) -> Settings:
    """The recipe with what was typed in its place, and everything that was left open decided."""
    if "model" not in typed:
        raise UserError(f"name a model to train: {', '.join(models.MODELS)} (or --resume DIR)")
    typed["device"] = pick_device(typed.get("device", "auto")).type
    data = typed.setdefault("data", FASHION_MINI)
    if data not in FASHION:
        data = typed["data"] = absolute("--data", data)  # a run is resumed from any folder
    typed.setdefault("image_size", default_image_size(data))
    name = typed.pop("recipe", None) or default_recipe(data, typed["device"])
    if typed.get("weights", "none") != "none":
        if typed["model"] != "resnet18":
            raise UserError(f"--weights {typed['weights']}: there are pretrained weights for resnet18 only")
        if typed["weights"] != "imagenet":
            typed["weights"] = existing("--weights", typed["weights"])
    if "init" in typed:
        typed["start_from"] = existing("--init", typed.pop("init"))
        typed.setdefault("weights", "none")
    if "cache" in typed:
        typed["cache"] = absolute("--cache", typed["cache"])
    for name_of_none in ("clip", "ema"):
        if typed.get(name_of_none) == 0:
            typed[name_of_none] = None
    return dataclasses.replace(make_recipe(name, typed["model"], data), **typed)


def absolute(flag: str, path: str | Path) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # a user whose home is not known
        raise UserError(f"{flag} {path}: {error}") from error


def existing(flag: str, path: str | Path) -> str:
    """`absolute`, of a file that is there: known before the images are read."""
    whole = absolute(flag, path)
    if not Path(whole).is_file():
        raise UserError(f"{flag} {path}: no such file")
    return whole


def read_run(folder: Path) -> tuple[Settings, dict | None]:
    """The settings of the run in `folder` and what last.pt holds, which must have been made with them.

    A run killed before it began to train has no last.pt yet, and nothing to lose: None, it starts from the beginning.
    """
    path = folder / "config.json"
    try:
        settings = Settings(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from error
    if not any((folder / name).exists() for name in RUN_FILES if name != path.name):
        return settings, None
    saved = checkpoint.load(folder / "last.pt")
    if saved.get("settings") != dataclasses.asdict(settings):
        raise UserError(f"{folder / 'last.pt'} is of other settings than {path} names")
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    return settings, saved


def has_settings(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds a run with these settings."""
    try:
        return json.loads((folder / "config.json").read_text()) == dataclasses.asdict(settings)
    except (OSError, ValueError):
        return False


# A folder that holds one of these holds a run, and is never written over.
RUN_FILES = ("config.json", "steps.csv", "metrics.csv", "best.pt", "last.pt", "summary.json")


def default_folder(settings: Settings, started: float) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
    return Path("runs", f"{settings.model}-{settings.conv}-{name}")


@contextlib.contextmanager
def new_folder(folder: Path, settings: Settings, *, exact: bool) -> Iterator[Path]:
    """The run's folder with its config.json, proved writable and ours alone before anything slow happens.

    Where the user named it, it must be this `exact` one; otherwise one that is taken gets a number behind its name.
    Where no checkpoint was written into it, config.json and the folders made for it are gone again.
    """
    data = Path(settings.data)
    if settings.data not in FASHION and not (data / "train").exists() and not (data / "train.txt").exists():
        for flag, path in (("--out", folder), ("--cache", settings.cache)):
            if path is not None and Path(path).absolute().is_relative_to(data):
                raise UserError(f"{path} would lie among the class folders of {data}; take another {flag}")
    wanted, again = folder, 1
    while True:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if any((folder / name).exists() for name in RUN_FILES):
                raise FileExistsError
            create_json(folder / "config.json", dataclasses.asdict(settings))  # of two processes, one can
            break
        except FileExistsError:
            if exact:
                raise UserError(
                    f"{folder} already holds a run; take another --out, or go on with it by "
                    f"--resume {shlex.quote(str(folder))}"
                ) from None
            again += 1
            folder = wanted.with_name(f"{wanted.name}-{again}")
        except OSError:
            remove(folder, made)
            raise
    try:
        with the_only_one(folder):
            yield folder
    finally:
        if not (folder / "last.pt").exists():
            remove(folder, made)


@contextlib.contextmanager
def the_only_one(folder: Path) -> Iterator[None]:
    """No other process of this machine trains in `folder` inside the block; raises UserError where one does."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no run to resume in {folder}: it has no {path.name}")
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}") from None
        yield


def remove(folder: Path, made: list[Path]) -> None:
    """What a run writes before its first checkpoint, and those of the folders `made`, innermost first, left empty."""
    with contextlib.suppress(OSError):
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def make_trainer(settings: Settings, folder: Path, console: Console, world: World) -> Trainer:
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
    if min(settings.batch_size, len(train_data)) == 1:
        require_norms_of_one(settings)
    console.print(
        f"{settings.model} on {len(train_data):,} training and {len(val_data):,} validation images of "
        f"{len(train_data.classes)} classes at {settings.image_size} px; "
        f"convolutions {describe_backend(backend, device_name(device))}; "
        f"{f'{world.size} processes; ' if world.size > 1 else ''}run folder {folder}",
        soft_wrap=True,
        highlight=False,
    )
    return Trainer(settings, train_data, val_data, device, folder, world)


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


def train(trainer: Trainer, console: Console, profile: int | None) -> None:
    settings, folder, world = trainer.settings, trainer.folder, trainer.world
    profiler = None
    if profile is not None:
        left = settings.epochs * trainer.steps_per_epoch - trainer.step
        if profile + WARM_UP > left:
            raise UserError(f"--profile {profile}: of this run's {left} steps the first {WARM_UP} are not profiled")
        if world.is_main:
            profiler = Profiler(profile, folder, console, trainer.device)
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
    except Stopped:
        raise UserError(
            f"stopped after step {trainer.step}, saved in {folder / 'last.pt'}; "
            f"go on with: python -m train.run {settings.model} --resume {shlex.quote(str(folder))}"
        ) from None
    if not world.is_main:
        return
    draw_curves(
        folder,
        f"{settings.model}, {settings.conv} convolution, {settings.recipe} recipe, {Path(settings.data).name}",
        label_smoothing=settings.label_smoothing,
    )
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
    write_json(folder / "summary.json", summary)
    print_summary(console, summary, folder)


if __name__ == "__main__":
    main()
