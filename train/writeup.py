"""What the course write-up reports of its own runs, to stand beside ours: 100-class MiniPlaces, 128 px, a Tesla T4."""

from dataclasses import dataclass

CLASSES, IMAGE_SIZE, BATCH_SIZE = 100, 128, 256
MEMORY_KIND = "the write-up's reading of nvidia-smi on its Tesla T4, whole process, average"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One row of its table of models."""

    conv: str
    """Its convolution, by our name for it."""
    top1: float
    """Validation top-1 after the last epoch, percent."""
    top5: float
    """The same within five guesses."""
    epochs: int
    mib: int
    """MEMORY_KIND."""


SIMPLENET = Figures(conv="torch", top1=44.88, top5=73.63, epochs=60, mib=3113)
SIMPLENET_UNFOLD = Figures(conv="unfold", top1=44.90, top5=73.33, epochs=60, mib=4881)
SIMPLEVIT = Figures(conv="torch", top1=43.92, top5=73.60, epochs=90, mib=2117)
CUSTOMNET = Figures(conv="torch", top1=49.69, top5=78.70, epochs=60, mib=4277)
RESNET18_FINE_TUNED = Figures(conv="torch", top1=53.25, top5=80.23, epochs=60, mib=3192)

# Trainable parameters, where it gives them.
PARAMETERS = {"simplenet": 365_028, "simplevit": 1_959_076}

# Others' top-1 and top-5 in percent on the same images, as published.
BETTER = {
    "ResNet-13 from scratch (29.7M parameters, SGD, label smoothing, 108 epochs)": (54.09, 81.34),
    "ResNet50 of Places365 (365 classes)": (55.18, 85.29),
}

# Its SimpleNet's top-1 and top-5 in percent under attack, by (steps, step size, epsilon) and target.
UNDER_ATTACK = {
    (10, 0.01, 0.1): {"least_likely": (11.21, 34.15), "most_likely": (9.00, 35.70)},
    (50, 0.01, 0.1): {"least_likely": (8.03, 25.34), "most_likely": (5.23, 19.88)},
    (10, 0.1, 0.1): {"least_likely": (17.27, 40.40), "most_likely": (12.86, 34.13)},
    (10, 0.01, 10.0): {"least_likely": (11.21, 34.15), "most_likely": (9.00, 35.70)},
    (10, 0.1, 10.0): {"least_likely": (1.84, 8.93), "most_likely": (1.59, 7.08)},
    (50, 0.1, 10.0): {"least_likely": (1.16, 6.06), "most_likely": (1.20, 5.45)},
}

# Its SimpleNet after 30 epochs and 10 more, plain or adversarial: clean and attacked, top-1 and top-5 in percent. Which
# attack that was it does not say.
HARDENED = {
    "plain": ((33.61, 63.51), (14.51, 38.19)),
    "adversarial": ((29.32, 58.55), (23.60, 52.33)),
}


def figures_for(model: str, conv: str, *, fine_tuned: bool) -> Figures | None:
    """Its row for this model and, where it has one, this convolution; otherwise the one with PyTorch's own.

    Its ResNet18 is fine-tuned from ImageNet's weights, so one trained from scratch has no row.
    """
    if (model, conv) == ("simplenet", "unfold"):
        return SIMPLENET_UNFOLD
    if model == "resnet18":
        return RESNET18_FINE_TUNED if fine_tuned else None
    return {"simplenet": SIMPLENET, "simplevit": SIMPLEVIT, "customnet": CUSTOMNET}.get(model)
