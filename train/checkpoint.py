"""Checkpoints: plain types and tensors only, so that torch.load(weights_only=True) reads them anywhere.

best.pt   format, settings, classes, epoch, step, val_top1, model
last.pt   the same and what it takes to go on: optimizer, batch (inside the epoch), meter, timing, best, rng
"""

import io
from pathlib import Path
from typing import Any

import torch

from train.cli import UserError
from train.files import atomic_write

FORMAT = 1


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


def get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that layers such as dropout draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
