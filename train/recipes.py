"""Everything a training run is told, as one dataclass; the recipes are values of it.

The command line replaces only what was typed. A run keeps its settings in config.json and is resumed from there.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One run's settings. Schedules are per step; the learning rate warms up linearly, then follows a cosine to ~0."""

    recipe: str
    """The recipe these settings started from."""
    model: str = "simplenet"
    """A name in models.MODELS."""
    conv: str = "triton"
    """A name in models.CONVOLUTIONS."""
    data: str = "fashion-mini"
    """"fashion-mini", or the absolute path of a folder."""
    image_size: int | None = None
    """Side of the images the network sees, in pixels; None is the data's own: 32 for fashion-mini, else 128."""
    limit_train: int | None = None
    """Use this many training images, evenly over the classes; None is all of them."""
    limit_val: int | None = None
    """The same for validation."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is a GPU."""
    seed: int = 0
    """Decides the initial parameters, the order of the images and their augmentation."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a training step."""
    eval_batch_size: int = 256
    """Images a validation batch; changes speed and memory, never a result."""
    init: Literal["pytorch", "kaiming"]
    """Initial weights: each layer's own default, or Kaiming's normal distribution with biases at zero."""
    optimizer: Literal["sgd", "adamw"]
    """SGD with `momentum`, or AdamW with torch's default betas."""
    lr: float
    """The learning rate at the top of the schedule."""
    momentum: float = 0.9
    """Of SGD; AdamW takes no notice of it."""
    weight_decay: float
    """On every parameter."""
    warmup_epochs: float
    """Linear warm-up from ~0 to `lr`; at most half the training, so that a short trial still comes down again."""
    flip: bool
    """Flip half of the training images left to right."""
    crop: bool
    """Crop training images at random from 1.125 times the size; otherwise from the centre."""


RECIPES = {
    # For small images and few of them, where SGD's 60 epochs are not to be had: on fashion-mini it passes 75% within
    # minutes on two CPU cores. Without augmentation, which at this length costs accuracy (random crops: 4 points).
    "quick": Settings(
        recipe="quick",
        epochs=3,
        batch_size=32,
        init="kaiming",  # SimpleNet has no normalisation, and torch's default starts it with vanishing activations
        optimizer="adamw",
        lr=1.5e-3,
        weight_decay=1e-2,
        warmup_epochs=1,
        flip=False,
        crop=False,
    ),
    # The course write-up's. Of its augmentation the flip and the crop are here; colour, rotation and scale are not.
    "writeup": Settings(
        recipe="writeup",
        epochs=60,
        batch_size=256,
        init="pytorch",
        optimizer="sgd",
        lr=0.1,
        weight_decay=1e-4,
        warmup_epochs=5,
        flip=True,
        crop=True,
    ),
}


def default_recipe(data: str, device: str) -> str:
    """"quick" for the embedded images or without a GPU, where 60 epochs would take days; else "writeup"."""
    return "quick" if data == "fashion-mini" or device == "cpu" else "writeup"
