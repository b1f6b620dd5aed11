"""The training command: python -m train.run simplenet --conv triton"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.run")

import argparse
import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

import models
from train import checkpoint
from train.cli import Parser, UserError, number, run_command, stop_on_signal
from train.data import FASHION_MINI, default_image_size, load_data, require_classes
from train.display import Display
from train.files import write_json
from train.loop import Stopped, Trainer
from train.recipes import RECIPES, Settings, default_recipe
from train.report import backend_of, describe_backend, device_name, draw_curves, print_summary, summarise

EXAMPLES = """
examples:
  python -m train.run simplenet                        the embedded images, through the Triton kernels
  python -m train.run simplenet --conv torch           the same with PyTorch's own convolution
  python -m train.run simplenet --data ~/flowers --image-size 64 --epochs 10
  python -m train.run --resume runs/simplenet-triton-20260102-030405

Recipes: quick (AdamW, a few epochs) is the default on fashion-mini and on a CPU, writeup (SGD, 60 epochs)
otherwise. --data takes a folder PATH/train/<class>/*.jpg with PATH/val/<class>/*.jpg, or PATH/<class>/*.jpg,
which is then split. Without a GPU the Triton kernels run in Triton's interpreter: right, and slow.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train.run",
        usage="python -m train.run MODEL [options]\n       python -m train.run --resume DIR",
        description="Train a model on images and write its curves, checkpoints and a summary into a run folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was typed overrides the recipe
        allow_abbrev=False,
    )
    whole = number(int, above=0)
    add = parser.add_argument
    add("model", nargs="?", default=None, choices=list(models.MODELS), help="what to train (not needed by --resume)")
    add("--conv", choices=list(models.CONVOLUTIONS), help="which convolution computes it (default: triton)")
    add("--data", metavar="fashion-mini|PATH", help="the embedded images (the default), or a folder of class folders")
    add("--recipe", choices=list(RECIPES), help="settings to start from (default: see below)")
    add("--epochs", type=whole, metavar="N", help="passes over the training images")
    add("--batch-size", type=whole, metavar="N", help="images a training step")
    add("--lr", type=number(float, above=0, most=1e4), metavar="X", help="highest learning rate of the schedule")
    side = number(int, least=8, most=4096)
    add("--image-size", type=side, metavar="N", help="side of the images (fashion-mini: 32, else 128)")
    add("--limit-train", type=whole, metavar="N", help="use only N training images, evenly over the classes")
    add("--limit-val", type=whole, metavar="N", help="use only N validation images, evenly over the classes")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to train (default: auto, the GPU if there is one)")
    seed = number(int, least=0, most=2**63 - 1)
    add("--seed", type=seed, metavar="N", help="of weights, order and augmentation (default: 0)")
    add("--out", type=Path, metavar="DIR", help="the run folder (default: runs/<model>-<conv>-<time>)")
    add("--resume", type=Path, metavar="DIR", help="go on with the run in DIR, with the settings it began with")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    typed = {name: value for name, value in vars(arguments).items() if value is not None}
    console = Console()
    if "resume" in typed:
        resume(typed, console)
    else:
        start(typed, console)


def start(typed: dict, console: Console) -> None:
    """A new run."""
    out = typed.pop("out", None)
    settings = make_settings(typed)
    with new_folder(out, settings) as folder:
        trainer = make_trainer(settings, folder, console)
        trainer.save()  # whatever happens from now on, --resume can go on
        train(trainer, console)


def resume(typed: dict, console: Console) -> None:
    """The rest of an earlier run."""
    folder = typed.pop("resume")
    model = typed.pop("model", None)
    if typed:
        flag = "--" + next(iter(typed)).replace("_", "-")
        raise UserError(f"--resume goes on with the settings in {folder / 'config.json'}; leave out {flag}")
    settings = read_settings(folder)
    if model not in (None, settings.model):
        raise UserError(f"{folder} is a run of {settings.model}, not of {model}")
    if (folder / "summary.json").exists():
        console.print(f"{folder} is complete: there is nothing left to do", soft_wrap=True, highlight=False)
        try:
            print_summary(console, json.loads((folder / "summary.json").read_text()), folder)
        except (ValueError, KeyError, TypeError) as error:
            path = folder / "summary.json"
            raise UserError(f"{path} is damaged; delete it and resume again to rewrite it") from error
        return
    trainer = make_trainer(settings, folder, console)
    trainer.resume()
    console.print(f"going on after step {trainer.step}", highlight=False)
    train(trainer, console)


def make_settings(typed: dict) -> Settings:
    """The recipe with what was typed in its place, and everything that was left open decided."""
    if "model" not in typed:
        raise UserError(f"name a model to train: {', '.join(models.MODELS)} (or --resume DIR)")
    typed["device"] = pick_device(typed.get("device", "auto"))
    data = typed.setdefault("data", FASHION_MINI)
    typed.setdefault("image_size", default_image_size(data))
    recipe = RECIPES[typed.pop("recipe", None) or default_recipe(data, typed["device"])]
    if data != FASHION_MINI:
        try:
            typed["data"] = str(Path(data).expanduser().absolute())  # a run is resumed from any folder
        except RuntimeError as error:
            raise UserError(f"--data {data}: {error}") from error
    return dataclasses.replace(recipe, **typed)


def read_settings(folder: Path) -> Settings:
    """The settings of the run in `folder`; config.json must say what its checkpoint was made with."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no run to resume in {folder}: it has no {path.name}")
    try:
        settings = Settings(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from error
    if checkpoint.load(folder / "last.pt").get("settings") != dataclasses.asdict(settings):
        raise UserError(f"{folder / 'last.pt'} is of other settings than {path} names")
    return settings


def pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


# A folder that holds one of these holds a run, and is never written over.
RUN_FILES = ("config.json", "steps.csv", "metrics.csv", "best.pt", "last.pt", "summary.json")


@contextlib.contextmanager
def new_folder(out: Path | None, settings: Settings) -> Iterator[Path]:
    """The run's folder with its config.json, proved writable and ours alone before anything slow happens.

    Where no checkpoint was written into it, config.json and the folders made for it are gone again.
    """
    folder = (out or Path("runs", f"{settings.model}-{settings.conv}-{time.strftime('%Y%m%d-%H%M%S')}")).expanduser()
    data = Path(settings.data)
    if settings.data != FASHION_MINI and not (data / "train").is_dir() and folder.absolute().is_relative_to(data):
        raise UserError(f"the run folder {folder} would lie among the class folders of {data}; take another --out")
    wanted, again = folder, 1
    while True:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if any((folder / name).exists() for name in RUN_FILES):
                raise FileExistsError
            with open(folder / "config.json", "x") as file:  # of two processes, one
                json.dump(dataclasses.asdict(settings), file, indent=2)
            break
        except FileExistsError:
            if out is not None:
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
        yield folder
    finally:
        if not (folder / "last.pt").exists():
            remove(folder, made)


def remove(folder: Path, made: list[Path]) -> None:
    """What a run writes before its first checkpoint, and those of the folders `made`, innermost first, left empty."""
    with contextlib.suppress(OSError):
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def make_trainer(settings: Settings, folder: Path, console: Console) -> Trainer:
    """Everything that can go wrong before training goes wrong here."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    device = torch.device(settings.device)
    try:
        backend = backend_of(settings.conv, device)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    try:
        train_data, val_data = load_data(
            settings.data,
            settings.image_size,
            limit_train=settings.limit_train,
            limit_val=settings.limit_val,
            console=console,
        )
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise MemoryError(f"for these images at {settings.image_size} px; take a smaller --image-size") from error
    require_classes(train_data)
    console.print(
        f"{settings.model} on {len(train_data):,} training and {len(val_data):,} validation images of "
        f"{len(train_data.classes)} classes at {settings.image_size} px; "
        f"convolutions {describe_backend(backend, device_name(device))}; run folder {folder}",
        soft_wrap=True,
        highlight=False,
    )
    return Trainer(settings, train_data, val_data, device, folder)


@contextlib.contextmanager
def one_thread(backend: str) -> Iterator[None]:
    """PyTorch on one thread while kernels are interpreted: a second one only takes the interpreter's core from it."""
    threads = torch.get_num_threads()
    if backend == "interpreter":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(trainer: Trainer, console: Console) -> None:
    settings, folder = trainer.settings, trainer.folder
    display = Display(
        console,
        epochs=settings.epochs,
        train_images=len(trainer.train),
        val_images=len(trainer.val),
        batch_size=settings.batch_size,
    )
    try:
        with stop_on_signal() as stop, display, one_thread(backend_of(settings.conv, trainer.device)):
            trainer.fit(display, stop)
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
    draw_curves(folder, f"{settings.model}, {settings.conv} convolution, {Path(settings.data).name}")
    summary = summarise(
        settings,
        trainer.device,
        classes=len(trainer.train.classes),
        train_images=len(trainer.train),
        val_images=len(trainer.val),
        last=trainer.records.epochs[-1],
        best=trainer.best,
        images_per_s=trainer.timing["total_images"] / trainer.timing["total_seconds"],
    )
    write_json(folder / "summary.json", summary)
    print_summary(console, summary, folder)


if __name__ == "__main__":
    main()
