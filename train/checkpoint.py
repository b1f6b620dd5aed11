"""Checkpoints: plain types and tensors only, so that torch.load(weights_only=True) reads them anywhere.

best.pt   format, settings, classes, epoch, step, val_top1, model
last.pt   the same and what it takes to go on: batch (inside the epoch), data (fingerprints of the images),
          trained_model, optimizer, scaler, meter, timing, best

`model` holds the weights to evaluate: the moving average where the run keeps one, and `trained_model` is then what
the optimiser moves. Keys are the model's own, whatever it was wrapped in to be trained. Generators need no state:
what is random in a step follows from the seed and the position.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from train.cli import UserError
from train.files import atomic_write
from train.recipes import Settings

FORMAT = 2
BEST, LAST = "best.pt", "last.pt"


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
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged or is no checkpoint ({type(error).__name__})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of the lab")
    return contents


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
        return replace(Settings(**saved["settings"]), **changes)
    except TypeError as error:
        raise UserError(f"{path} is of another version of the lab: {error}") from error


def load_weights(path: Path, saved: dict[str, Any], model: nn.Module) -> None:
    """Copies the weights to evaluate into `model`; raises UserError where they do not fit it."""
    try:
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the weights in {path} do not fit the model: {error}") from error


def load_model(path: Path, *, conv: str | None = None, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """(the model in eval mode on `device`, what `load` read) of a checkpoint, or of a run folder's best.pt.

    `conv` is the convolution to build it with, None the one it was trained with; the weights are the same for all, and
    lie in models.memory_format(conv). Raises UserError for a file that is missing, damaged or does not fit.
    """
    path = checkpoint_file(path)
    saved = load(path)
    try:
        settings = saved["settings"]
        model = models.build(
            settings["model"], conv or settings["conv"], len(saved["classes"]), settings["image_size"],
            fuse=settings.get("fuse"),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    load_weights(path, saved, model)
    return model.to(device).eval(), saved


def checkpoint_file(path: Path) -> Path:
    """`path`, or its best.pt where it is a run folder."""
    return path / BEST if path.is_dir() else path
