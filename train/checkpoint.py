"""Checkpoints: plain types and tensors only, so that torch.load(weights_only=True) reads them anywhere.

best.pt   format, settings, classes, epoch, step, val_top1, model
last.pt   the same and what it takes to go on: batch (inside the epoch), data (fingerprints of the images),
          trained_model, optimizer, scaler, meter, timing, best

`model` holds the weights to evaluate: the moving average where the run keeps one, and `trained_model` is then what
the optimiser moves. Keys are the model's own, whatever it was wrapped in to be trained. Generators need no state:
what is random in a step follows from the seed and the position.
"""

import io
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import models
from attacks.pgd import MOST_STEPS
from models.files import is_plain, load_tensors
from train.cli import LARGEST, UserError, printable
from train.files import atomic_write
from train.recipes import Settings

FORMAT = 2
BEST, LAST = "best.pt", "last.pt"

SETTINGS = get_type_hints(Settings)
FINITE = (-sys.float_info.max, sys.float_info.max)
# Least and greatest of what is counted or allocated by; all other numbers need only be finite.
BOUNDS = dict.fromkeys(("epochs", "batch_size", "eval_batch_size", "limit_train", "limit_val"), (1, LARGEST[int])) | {
    "image_size": (8, 4096), "seed": (0, LARGEST[int]), "adversarial_steps": (1, MOST_STEPS),
}
PATHS = {"data", "cache", "start_from", "weights"}  # a file's name may hold anything

# What each optimiser keeps of every parameter that it has moved.
STATES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}


def save(path: Path, contents: dict[str, Any]) -> None:
    """Writes `contents` whole or not at all; raises OSError naming `path`."""
    # Through memory, because torch's own writer turns a full disk into an internal error.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **contents}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU; raises UserError for a file that is missing, damaged or of another kind."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        contents = load_tensors(path)
    except Exception as error:
        raise UserError(f"{path} is damaged or is no checkpoint ({type(error).__name__})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of the lab")
    if (part := misshapen(contents)) is not None:
        raise UserError(f"{path} is damaged: {part} is missing or of another type")
    return contents


def misshapen(contents: dict[str, Any]) -> str | None:
    """The first of what every checkpoint holds that this one does not, or holds as something else."""
    settings, classes = contents.get("settings"), contents.get("classes")
    whole = {
        "settings": isinstance(settings, dict),
        "classes": isinstance(classes, list) and all(isinstance(name, str) for name in classes),
        "epoch": fits(contents.get("epoch"), int, 0, BOUNDS["epochs"][1]),
        "model": is_state(contents.get("model")),
    }
    return next((name for name, right in whole.items() if not right), None)


def is_state(value: Any) -> bool:
    """Whether `value` can be a model's state_dict."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_plain(one) for name, one in value.items())


def require_position(path: Path, saved: dict[str, Any], fresh: dict[str, Any], steps_per_epoch: int) -> None:
    """Raises UserError unless `saved`, read from the last.pt `path`, can be a position in a training.

    fresh   the scaler, meter and timing that a training begins with, as they are saved
    """
    epoch, batch, step, meter, timing = (saved.get(name) for name in ("epoch", "batch", "step", "meter", "timing"))
    trained, best = saved.get("trained_model"), saved.get("best")
    whole = {
        "batch": fits(batch, int, 0, steps_per_epoch),
        "step": type(step) is type(batch) is int and step == epoch * steps_per_epoch + batch,
        "trained_model": is_state(trained) if saved["settings"].get("ema") else trained is None,
        "scaler": are_numbers(saved.get("scaler"), fresh["scaler"]),
        "meter": is_plain(meter) and (meter.shape, meter.dtype) == (fresh["meter"].shape, fresh["meter"].dtype)
        and meter.isfinite().all() and (batch == 0 or meter[-1] > 0),
        "timing": are_numbers(timing, fresh["timing"])
        and (batch == 0 or timing["seconds"] > 0) and (step == 0 or timing["total_seconds"] > 0),
        "best": isinstance(best, dict) and best.keys() == {"epoch", "val_top1"}
        and fits(best["epoch"], int, 0, epoch) and fits(best["val_top1"], float, -1, 100),
    }  # fmt: skip
    if (part := next((name for name, right in whole.items() if not right), None)) is not None:
        raise UserError(f"{path} is damaged: {part} is missing or wrong")


def are_numbers(values: Any, like: dict[str, Any]) -> bool:
    """Whether `values` has the keys of `like` with numbers of the same types, finite and at least 0."""
    return (
        isinstance(values, dict) and values.keys() == like.keys()
        and all(fits(values[name], type(like[name]), 0, FINITE[1]) for name in like)
    )


def parse_settings(values: Any) -> Settings:
    """Settings as a file holds them; TypeError for those of another version, ValueError for a value that none can have.

    A checkpoint has checksums, config.json has none and may have been edited.
    """
    settings = Settings(**values)
    require_values(values)
    return settings


def require_values(values: Mapping[str, Any]) -> None:
    """Raises ValueError naming a setting whose value is of the wrong type or out of bounds; others are not settings."""
    for name, value in values.items():
        if name in SETTINGS and not fits(value, SETTINGS[name], *BOUNDS.get(name, FINITE)):
            raise ValueError(f"{name} is {reprlib.repr(value)}")
        if name in SETTINGS.keys() - PATHS and not can_be_shown(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}")


def can_be_shown(value: Any) -> bool:
    """Whether `value` is no text that would steer a terminal."""
    return not isinstance(value, str) or printable(value) == value


def fits(value: Any, hint: Any, least: float, most: float) -> bool:
    """Whether `value` is of the type, and between the bounds if it is a number; NaN is between none."""
    if get_origin(hint) is UnionType:
        return any(fits(value, one, least, most) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return type(value) in {int, hint} and least <= value <= most
    return type(value) is hint


def require_same_model(path: Path, saved: dict[str, Any], model: str, classes: Sequence[str]) -> None:
    """Raises UserError unless `saved`, read from `path`, is of the named model and of these classes."""
    settings, theirs = saved.get("settings", {}), saved.get("classes", [])
    if settings.get("model") != model:
        raise UserError(f"{path} holds a {settings.get('model')}, not a {model}")
    if len(theirs) != len(classes):
        raise UserError(f"{path} has {len(theirs)} classes, the data {len(classes)}")
    for number, (one, other) in enumerate(zip(theirs, classes, strict=True)):
        if one != other:
            raise UserError(f"class {number} of {path} is {one!r}, of the data {other!r}")


def settings_of(path: Path, saved: dict[str, Any], **changes: Any) -> Settings:
    """What `saved`, read from `path`, was trained with, some of it changed; UserError where of another version."""
    try:
        return replace(parse_settings(saved["settings"]), **changes)
    except TypeError as error:
        raise UserError(f"{path} is of another version of the lab: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def load_weights(path: Path, saved: dict[str, Any], model: nn.Module) -> None:
    """Copies the weights to evaluate into `model`; raises UserError where they do not fit it, or are no numbers."""
    try:
        copy_weights(saved["model"], model)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"the weights in {path} do not fit the model: {error}") from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path} is damaged: not every value of {name} is a finite number")


def copy_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    """model.load_state_dict, which alone would round other types, or drop an imaginary part: ValueError for them."""
    wanted = model.state_dict()
    for name in weights.keys() & wanted.keys():
        if weights[name].dtype != wanted[name].dtype:
            raise ValueError(f"{name} is of {weights[name].dtype}")
    model.load_state_dict(weights)


def load_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer, *, stepped: bool | None) -> None:
    """optimizer.load_state_dict, which alone would take other options, and states of any shape or none.

    stepped     whether it has moved the parameters; None where both can be

    Raises ValueError, or what a value of another type raises.
    """
    ours = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in ours]:
        raise ValueError("the optimizer's groups are others")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = saved["state"]
    if states.keys() != (set(range(len(parameters))) if stepped or (stepped is None and states) else set()):
        raise ValueError("the optimizer has no states, or those of other parameters")
    for number, state in states.items():
        shapes = {name: () if name == "step" else parameters[number].shape for name in STATES[type(optimizer)]}
        if state.keys() != shapes.keys():
            raise ValueError(f"the optimizer's state {number} has other parts")
        for name, value in state.items():
            if not is_plain(value) or (value.shape, value.dtype) != (shapes[name], parameters[number].dtype):
                raise ValueError(f"the optimizer's {name} {number} is of another shape or type")
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, ours, strict=True):
        if not fits(group["lr"], float, 0, FINITE[1]):
            raise ValueError(f"the optimizer's lr is {reprlib.repr(group['lr'])}")
        for name in own.keys() - {"params", "lr"}:  # the rate is set before each step
            if group[name] != own[name]:
                raise ValueError(f"the optimizer's {name} is {reprlib.repr(group[name])}")


def load_model(path: Path, *, conv: str | None = None, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """(the model in eval mode on `device`, what `load` read) of a checkpoint, or of a run folder's best.pt.

    `conv` is the convolution to build it with, None the one it was trained with; the weights are the same for all, and
    lie in models.memory_format(conv). Raises UserError for a file that is missing, damaged or does not fit.
    """
    path = checkpoint_file(path)
    saved = load(path)
    settings = settings_of(path, saved)
    try:
        model = models.build(
            settings.model, conv or settings.conv, len(saved["classes"]), settings.image_size, fuse=settings.fuse
        )
    except TypeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    load_weights(path, saved, model)
    return model.to(device).eval(), saved


def checkpoint_file(path: Path) -> Path:
    """`path`, or its best.pt where it is a run folder."""
    return path / BEST if path.is_dir() else path
