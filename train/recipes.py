"""Everything a training run is told, as one dataclass; the recipes are values of it, and this file holds them all.

The command line replaces only what was typed. A run keeps its settings in config.json and is resumed from there.
"""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

from train.data import FASHION_MINI, shows_garments


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One run's settings. Schedules are per step; the learning rate warms up linearly, then follows a cosine to ~0."""

    recipe: str
    """The recipe these settings started from."""
    model: str = "simplenet"
    """A name in models.MODELS."""
    conv: str = "triton"
    """A name in models.CONVOLUTIONS."""
    weights: str = "none"
    """Pretrained weights to start from (ResNet18): "none", "imagenet", or the absolute path of a file."""
    start_from: str | None = None
    """The absolute path of a checkpoint of this lab whose weights the run starts from."""
    data: str = FASHION_MINI
    """"fashion-mini", "fashion-mnist", or the absolute path of a folder."""
    cache: str | None = None
    """Folder of the decoded images; None is the user's own cache folder."""
    image_size: int | None = None
    """Side of the images the network sees, in pixels; None is the data's own: 32 for Fashion-MNIST, else 128."""
    limit_train: int | None = None
    """Use this many training images, evenly over the classes; None is all of them."""
    limit_val: int | None = None
    """The same for validation."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is a GPU."""
    seed: int = 0
    """Decides the initial parameters, the order of the images, their augmentation, and what layers draw."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a training step, all processes together."""
    eval_batch_size: int = 256
    """Images a validation batch; changes speed and memory, never a result."""
    init: Literal["pytorch", "kaiming"]
    """Initial weights: each model's own, or Kaiming's normal distribution with biases at zero."""
    optimizer: Literal["sgd", "adamw"]
    """SGD with `momentum`, or AdamW with torch's default betas."""
    lr: float
    """The learning rate at the top of the schedule."""
    momentum: float = 0.9
    """Of SGD; AdamW takes no notice of it."""
    nesterov: bool = False
    """SGD with Nesterov's momentum."""
    weight_decay: float
    """On every parameter, or only on weights (see `decay_all`)."""
    decay_all: bool = False
    """Decay norms, biases and position embeddings too, as a plain optimiser does."""
    warmup_epochs: float
    """Linear warm-up from ~0 to `lr`; at most half the training, so that a short trial still comes down again."""
    label_smoothing: float = 0.0
    """Share of each training label spread evenly over all classes (Szegedy et al. 2016)."""
    clip: float | None = None
    """Scale gradients down to this norm, all parameters together; None leaves them."""
    ema: float | None = None
    """Decay a step of the moving average of the weights that is validated and kept; None validates the weights."""
    flip_tta: bool = False
    """Validate on the mean of an image's logits and its mirror image's."""
    amp: Literal["off", "fp16", "bf16"] = "off"
    """Automatic mixed precision; fp16 with a scaled loss."""
    channels_last: bool = True
    """Channels-last tensors for PyTorch's convolution; ours always has them, the unfolding one never."""
    fuse: bool = True
    """Let ReLU, max-pool and batch norm join the triton convolution; it means nothing for the others."""
    compile: bool = False
    """Train through torch.compile."""

    adversarial: str | None = None
    """Train on adversarial images of the current weights (Madry et al. 2018, as `attacks.pgd`): the target, a name in
    attacks.objective.TARGETS. None trains on the images as they are."""
    adversarial_steps: int = 5
    """Of that attack: each costs a forward pass and the input's gradient."""
    adversarial_step_size: float = 0.01
    """Of each step, in the normalised space the network sees."""
    adversarial_epsilon: float = 0.1
    """The largest change of a value, L-infinity, in the same space."""

    flip: bool
    """Flip half of the training images left to right."""
    colour: float = 0.0
    """Multiply each channel of a training image by 1 - this ... 1 + this."""
    rotate: float = 0.0
    """Rotate training images by up to so many degrees, and keep the inscribed square."""
    crop_area: float | None = None
    """Random resized crop of at least this share of the area; None crops the centre."""
    crop_ratio: float = 0.0
    """Width over height of that crop: 1 - this ... 1 + this."""


# Those that no recipe needs to name.
DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}

# What the write-up did to its training images.
WRITEUP_AUGMENTATION = dict(flip=True, colour=0.15, rotate=15.0, crop_area=0.25, crop_ratio=0.2)

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
        decay_all=True,
        warmup_epochs=1,
        flip=False,
    ),
    # The course write-up's.
    "writeup": Settings(
        recipe="writeup",
        epochs=60,
        batch_size=256,
        init="pytorch",
        optimizer="sgd",
        lr=0.1,
        weight_decay=1e-4,
        decay_all=True,
        warmup_epochs=5,
        **WRITEUP_AUGMENTATION,
    ),
    "modern": Settings(
        recipe="modern",
        epochs=60,
        batch_size=128,
        init="kaiming",
        optimizer="adamw",
        lr=2e-3,
        weight_decay=5e-2,
        warmup_epochs=3,
        label_smoothing=0.1,
        clip=1.0,
        ema=0.998,
        flip_tta=True,
        **WRITEUP_AUGMENTATION,
    ),
}

# What a recipe changes for one model.
FOR_MODEL: dict[tuple[str, str], dict[str, Any]] = {
    ("writeup", "simplevit"): dict(optimizer="adamw", epochs=90, lr=0.01, weight_decay=0.05, clip=1.0),
    ("modern", "simplevit"): dict(epochs=90, lr=1e-3, init="pytorch"),
    ("modern", "resnet18"): dict(init="pytorch"),
    ("quick", "simplevit"): dict(lr=1e-3, init="pytorch"),
    ("quick", "resnet18"): dict(lr=1e-3, init="pytorch"),
}
# What a recipe changes besides where pretrained weights are fine-tuned, which large steps would wipe out.
FINE_TUNING: dict[str, dict[str, Any]] = {
    "modern": dict(optimizer="sgd", nesterov=True, lr=0.01, weight_decay=5e-4),
}
# What quick changes for photographs, which are fewer to the class and harder than fashion's.
QUICK_PHOTOS: dict[str, Any] = dict(epochs=10, batch_size=64, lr=2e-3, flip=True, crop_area=0.5, crop_ratio=0.2)


def make_recipe(name: str, model: str, data: str, weights: str | None = None) -> Settings:
    """The settings of recipe `name` for a model on `data` (a folder's path, or a name in train.data.NAMED).

    weights     as --weights; None is ImageNet's for ResNet18
    """
    weights = weights or ("imagenet" if model == "resnet18" else "none")
    settings = replace(RECIPES[name], model=model, weights=weights)
    if name == "quick" and not shows_garments(data):
        settings = replace(settings, **QUICK_PHOTOS)
    tuning = FINE_TUNING.get(name, {}) if weights != "none" else {}
    return replace(settings, **FOR_MODEL.get((name, model), {}), **tuning)


def default_recipe(data: str, device: str) -> str:
    """"quick" for Fashion-MNIST or without a GPU, where 60 epochs would take days; else "writeup"."""
    return "quick" if shows_garments(data) or device == "cpu" else "writeup"
