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
from torch import nn

import models
from models.files import is_plain, load_tensors
from train.cli import UserError
from train.files import atomic_write
from train.recipes import Settings

FORMAT = 2
BEST, LAST = "best.pt", "last.pt"

SETTINGS = get_type_hints(Settings)
FINITE = (-sys.float_info.max, sys.float_info.max)
# Least and greatest of what is counted or allocated by; all other numbers need only be finite.
BOUNDS = dict.fromkeys(
    ("epochs", "batch_size", "eval_batch_size", "limit_train", "limit_val", "adversarial_steps"), (1, 2**63 - 1)
) | {"image_size": (8, 4096), "seed": (0, 2**63 - 1)}


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
    settings, classes, model = (contents.get(name) for name in ("settings", "classes", "model"))
    whole = {
        "settings": isinstance(settings, dict),
        "classes": isinstance(classes, list) and all(isinstance(name, str) for name in classes),
        "epoch": fits(contents.get("epoch"), int, 0, BOUNDS["epochs"][1]),
        "model": isinstance(model, dict)
        and all(isinstance(name, str) and is_plain(value) for name, value in model.items()),
    }
    return next((name for name, right in whole.items() if not right), None)


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
    weights, wanted = saved["model"], model.state_dict()
    for name in weights.keys() & wanted.keys():
        if weights[name].dtype != wanted[name].dtype:  # would be rounded, or lose an imaginary part
            raise UserError(f"the weights in {path} do not fit the model: {name} is of {weights[name].dtype}")
    try:
        model.load_state_dict(weights)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the weights in {path} do not fit the model: {error}") from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path} is damaged: not every value of {name} is a finite number")


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
