"""fashion-mini: 3,000 training and 1,000 validation images of Fashion-MNIST, embedded (MIT licence beside it)."""

from pathlib import Path

import numpy as np

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)


def load_arrays() -> dict[str, np.ndarray]:
    """train_images (3000, 28, 28), train_labels (3000,), val_images (1000, 28, 28), val_labels (1000,); all uint8."""
    with np.load(Path(__file__).with_name("fashion-mini.npz")) as archive:
        return {name: archive[name] for name in archive.files}
