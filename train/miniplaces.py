"""MiniPlaces as it is distributed: images/, and the lists train.txt and val.txt, whose lines are "path label".

    train.txt        train/a/abbey/00000001.jpg 0
    val.txt          val/00000001.jpg 97
    categories.txt   /a/abbey 0          (optional: names the labels)

A piece of it keeps the labels of the whole, so labels here are any whole numbers; they are renumbered 0..C-1 in order.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.cli import UserError, printable
from train.folder import ImageFiles

LABEL = re.compile("[0-9]{1,18}")  # Python refuses to read thousands of digits


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One line of a list."""

    name: str
    """The path as it is written there."""
    label: int
    line: int
    path: str | None
    """Where the file is, or None where it is not on the disk."""


def is_miniplaces(root: Path) -> bool:
    """Whether both lists are there; raises UserError where one is missing beside an images folder."""
    lists = [name for name in ("train.txt", "val.txt") if (root / name).is_file()]
    if len(lists) == 1 and (root / "images").is_dir():
        missing = "val.txt" if lists == ["train.txt"] else "train.txt"
        raise UserError(f"{root} has {lists[0]} but no {missing}")
    return len(lists) == 2


def list_miniplaces(root: Path) -> tuple[ImageFiles, ImageFiles, str]:
    """(train, val, a notice of missing images or ""), in the lists' order; raises UserError naming file and line."""
    train, val = read_list(root, "train.txt"), read_list(root, "val.txt")
    train_labels = {item.label for item in train}
    for item in val:
        if item.label not in train_labels:
            raise UserError(f"{root / 'val.txt'}:{item.line}: label {item.label} has no images in train.txt")
    names = class_names(root, train)
    parts, missing, example = [], [], None
    for title, list_name, items in (("training", "train.txt", train), ("validation", "val.txt", val)):
        here = [item for item in items if item.path]
        if not here:
            raise UserError(f"{root} holds none of the {len(items):,} images that its {list_name} lists")
        listed, kept = Counter(item.label for item in items), {item.label for item in here}
        for label, name in names.items():
            if label not in kept:
                raise UserError(
                    f"class {name!r} (label {label}) has no {title} images: {root / list_name} lists {listed[label]}, "
                    "none of which is on the disk"
                )
        if len(here) < len(items):
            missing.append(f"{len(items) - len(here):,} of the {len(items):,} images in {list_name}")
            example = example or next(item.name for item in items if not item.path)
        parts.append(in_order(here, names))
    notice = f"{root}: missing are {' and '.join(missing)}, the first is {printable(example)}" if missing else ""
    return parts[0], parts[1], notice


def in_order(items: list[Listed], names: dict[int, str]) -> ImageFiles:
    number = {label: i for i, label in enumerate(names)}
    return ImageFiles(
        paths=tuple(item.path for item in items),
        labels=tuple(number[item.label] for item in items),
        classes=tuple(names.values()),
    )


def read_list(root: Path, list_name: str) -> list[Listed]:
    """The lines of a list; a path is one below root/images or below root, also where it begins with a slash.

    Raises UserError for one with "..": a list may come from anywhere. Links in the data folder are its owner's.
    """
    folders = [str(folder) for folder in (root / "images", root) if folder.is_dir()]
    items, first_line = [], {}
    for line, name, label in read_lines(root / list_name):
        if ".." in name.split("/"):
            raise UserError(f"{root / list_name}:{line}: {name} may lead out of the data folder")
        file = os.path.normpath(name).lstrip("/")  # a//b.jpg and a/./b.jpg are one
        if first_line.setdefault(file, line) != line:
            raise UserError(f"{root / list_name}:{line}: {name} is listed before, in line {first_line[file]}")
        places = (f"{folder}/{name}" for folder in folders)
        path = next(filter(os.path.isfile, places), None)
        items.append(Listed(name=name, label=label, line=line, path=path))
    if not items:
        raise UserError(f"{root / list_name} lists no images")
    return items


def read_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line number, path, label) of each line that is not blank; raises UserError naming the line that is neither."""
    text = path.read_text("utf-8-sig", errors="surrogateescape")  # names of files may be any bytes
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        words = line.strip().rsplit(None, 1)
        if len(words) != 2 or not LABEL.fullmatch(words[1]):
            raise UserError(f"{path}:{number}: not a path and a label, as in 'a/abbey/1.jpg 0': {line.strip()[:80]!r}")
        yield number, words[0], int(words[1])


def class_names(root: Path, train: list[Listed]) -> dict[int, str]:
    """Original label -> name, in order of labels: out of categories.txt, else the folder of its first image.

    Names lose the folder of their first letter: /c/church/outdoor is "church/outdoor".
    """
    folders = {}
    for item in train:
        if item.label not in folders:
            folders[item.label] = os.path.dirname(item.name).removeprefix("train").strip("/.")
    categories = {}
    if (root / "categories.txt").is_file():
        for line, category, label in read_lines(root / "categories.txt"):
            if label in categories:
                raise UserError(f"{root / 'categories.txt'}:{line}: label {label} is named before, {categories[label]}")
            categories[label] = category
    full = {label: (categories.get(label) or folders[label]).strip("/") for label in sorted(folders)}
    names = {label: without_letter(name) for label, name in full.items()}
    uses = Counter(names.values())
    # A flat list has no folders to tell its classes by, and two letters could hold folders of the same name.
    return {
        label: printable(name if name and uses[name] == 1 else f"{full[label] or 'class'} ({label})")
        for label, name in names.items()
    }


def without_letter(name: str) -> str:
    """"a/abbey" -> "abbey"."""
    letter, _, rest = name.partition("/")
    return rest if len(letter) == 1 and rest.startswith(letter) else name
