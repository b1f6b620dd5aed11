"""Makes fashion-mini.npz out of Fashion-MNIST's four IDX files.

    python -m train.fashion_mini.make --source /usr/share/datasets/fashion-mnist

The default source is where Debian's package `dataset-fashion-mnist` puts them. For each class it takes the first
300 images of the training set and the first 100 of the test set, in their original order, class after class.
"""

import argparse
from pathlib import Path

import numpy as np

from train.fashion_mnist import DEBIAN_SOURCE, load_arrays

TRAIN_PER_CLASS, VAL_PER_CLASS = 300, 100


def first_of_each_class(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images of every class, class after class: (10 * count, 28, 28) and (10 * count,)."""
    chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)])
    return images[chosen], labels[chosen]


def make_arrays(source: Path) -> dict[str, np.ndarray]:
    """The four arrays of fashion-mini.npz."""
    arrays, whole = {}, load_arrays(source)
    for part, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        images, labels = whole[f"{part}_images"], whole[f"{part}_labels"]
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = first_of_each_class(images, labels, count)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=DEBIAN_SOURCE, help="folder of the four files (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fashion-mini.npz"))
    args = parser.parse_args()
    np.savez_compressed(args.out, **make_arrays(args.source))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
