"""The training command: python -m train.run simplenet --conv triton"""

if __name__ == "__main__":  # before the seconds that importing torch takes
    from train.startup import quit_on_interrupt

    quit_on_interrupt("train.run")

import argparse
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import models
from attacks.objective import TARGETS
from train import checkpoint, session
from train.cli import Parser, UserError, make_console, number, path, run_command
from train.data import FASHION_MINI, default_image_size, source
from train.devices import pick_device
from train.distributed import World, connect, restarts, start_time
from train.loop import AMP_DTYPES, Stopped
from train.recipes import RECIPES, Settings, default_recipe, make_recipe
from train.run_folder import PLACES, default_folder, has_settings

EXAMPLES = """
examples:
  python -m train.run simplenet                embedded images, Triton kernels
  python -m train.run simplenet --conv torch   by PyTorch's own convolution
  python -m train.run customnet --data ~/miniplaces --recipe modern
  python -m train.run resnet18 --data ~/flowers --weights ~/resnet18.pth
  python -m train.run simplenet --init pretrained.pt --epochs 10 --adversarial
  python -m train.run --resume runs/simplenet-triton-20260102-030405
  torchrun --nproc-per-node 8 -m train.run simplenet --data ~/miniplaces

Recipes: quick (AdamW, few epochs) is the default on Fashion-MNIST and on a CPU,
writeup (the course write-up's settings) otherwise; modern adds label smoothing,
gradient clipping, a moving average of the weights and mirror images.

--data takes MiniPlaces (a folder with train.txt and val.txt), or a folder
PATH/train/<class>/*.jpg with PATH/val/<class>/*.jpg, or PATH/<class>/*.jpg,
which is then split.

--adversarial trains on images that an attack (projected gradients, L-infinity)
makes of each batch against the weights of that step; all else is as without it.
TARGET is least_likely (the default), most_likely or untargeted. Accuracies and
losses of training, train_top1 among them, are then those on the adversarial
images, and images/s counts the attack's time; validation is on clean images.

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
    add("--eval-batch-size", type=whole, metavar="N", help="images a validation batch in each process (256)")
    add("--lr", type=number(float, above=0, most=1e4), metavar="X", help="highest learning rate of the schedule")
    add("--optimizer", choices=["sgd", "adamw"], help="what makes the steps")
    add("--weight-decay", type=number(float, least=0), metavar="X", help="decay of the weights")
    add("--label-smoothing", type=number(float, least=0, most=0.99), metavar="X", help="share spread over all classes")
    add("--clip", type=number(float, least=0), metavar="X", help="largest norm of the gradient (0: any)")
    add("--ema", type=number(float, least=0, most=0.999999), metavar="X",
        help="decay a step of a moving average of the weights, which is then what is validated (0: none)")
    add("--flip-tta", action=on_off, help="validate on images and their mirror images")
    add("--image-size", type=bounded("image_size"), metavar="N",
        help="side of the images (Fashion-MNIST: 32, else 128)")
    add("--limit-train", type=whole, metavar="N", help="use only N training images, evenly over the classes")
    add("--limit-val", type=whole, metavar="N", help="use only N validation images, evenly over the classes")
    add("--cache", type=path, metavar="DIR", help="where decoded images are kept (default: ~/.cache/conv-lab)")
    add("--device", choices=["auto", "cpu", "cuda"], help="where to train (default: auto, the GPU if there is one)")
    add("--amp", choices=list(AMP_DTYPES), help="automatic mixed precision (default: off)")
    add("--fuse", action=on_off, help="with --conv triton: ReLU, max-pool and norm join the kernels (default: yes)")
    add("--compile", action=on_off, help="train through torch.compile (default: no)")
    add("--channels-last", action=on_off, help="the layout for --conv torch (default: yes)")
    add("--weights", type=weights, metavar="FILE|imagenet|none",
        help="pretrained weights of ResNet18 (default: imagenet)")
    add("--init", type=path, metavar="FILE", help="start from the weights of a checkpoint or run of the same model")
    size = number(float, least=0)
    add("--adversarial", nargs="?", const="least_likely", choices=TARGETS, metavar="TARGET",
        help="train on adversarial images of the weights as they are (see below)")
    add("--adversarial-steps", type=bounded("adversarial_steps"), metavar="N",
        help="steps of the attack (default: 5)")
    add("--adversarial-step-size", type=size, metavar="X", help="of one step, in normalised space (default: 0.01)")
    add("--adversarial-epsilon", type=size, metavar="X", help="largest change of a pixel, likewise (default: 0.1)")
    add("--seed", type=bounded("seed"), metavar="N", help="of weights, order and augmentation (default: 0)")
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
        try:
            if "resume" in typed:
                resume(typed, console, world)
            else:
                start(typed, console, world)
        except Stopped as stop:
            launcher = "python" if world.size == 1 else "torchrun, as before, with"
            raise UserError(
                f"{stop}; go on with: {launcher} -m train.run {stop.model} --resume {shlex.quote(str(stop.folder))}"
            ) from None


def start(typed: dict, console: Console, world: World) -> None:
    """A new run, or what torchrun restarted of one."""
    out, profile = typed.pop("out", None), typed.pop("profile", None)
    settings = make_settings(typed)
    folder = world.share(out or default_folder(settings, started=start_time()))
    if world.share(restarts() > 0 and has_settings(folder, settings)):
        resume({"resume": folder}, console, world)
        return
    session.begin(folder, settings, console, world, exact=out is not None, profile=profile)


def resume(typed: dict, console: Console, world: World) -> None:
    """The rest of an earlier run."""
    folder, profile, model = typed.pop("resume"), typed.pop("profile", None), typed.pop("model", None)
    if others := typed.keys() - set(PLACES):
        flag = "--" + min(others).replace("_", "-")
        raise UserError(f"--resume goes on with the settings in {folder / 'config.json'}; leave out {flag}")
    place(typed)
    with session.begun(folder, world) as (settings, saved):
        if model not in (None, settings.model):
            raise UserError(f"{folder} is a run of {settings.model}, not of {model}")
        if session.is_complete(folder, world):
            session.show_finished(folder, console)
            return
        session.go_on(folder, dataclasses.replace(settings, **typed), saved, console, world, profile=profile)


def make_settings(typed: dict) -> Settings:
    """The recipe with what was typed in its place, and everything that was left open decided."""
    if "model" not in typed:
        raise UserError(f"name a model to train: {', '.join(models.MODELS)} (or --resume DIR)")
    of_attack = {name for name in typed if name.startswith("adversarial_")}
    if of_attack and "adversarial" not in typed:
        raise UserError(f"--{min(of_attack).replace('_', '-')} is for adversarial training: add --adversarial")
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


def bounded(name: str) -> Callable[[str], int]:
    """An argparse type: what the setting `name` can be."""
    least, most = checkpoint.BOUNDS[name]
    return number(int, least=least, most=most)


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


if __name__ == "__main__":
    main()
