"""A run's folder: who may make it, who may train in it, and what it says of the run.

Each of FILES is a contract with those who read runs; a folder that holds one of them is never written over.
"""

import contextlib
import dataclasses
import fcntl
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import checkpoint
from train.cli import UserError
from train.data import NAMED
from train.files import create_json, make_folder
from train.recipes import Settings
from train.records import read_table

CONFIG, STEPS, METRICS, SUMMARY = "config.json", "steps.csv", "metrics.csv", "summary.json"
FILES = (CONFIG, STEPS, METRICS, SUMMARY, checkpoint.BEST, checkpoint.LAST)

# Where a run finds things and computes, and how much of it at once is validated; another machine's may differ.
PLACES = ("data", "cache", "device", "eval_batch_size")


def default_folder(settings: Settings, started: float) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
    return Path("runs", f"{settings.model}-{settings.conv}-{name}")


@contextlib.contextmanager
def new_folder(folder: Path, settings: Settings, *, exact: bool) -> Iterator[Path]:
    """The run's folder with its config.json, proved writable and ours alone before anything slow happens.

    Where the user named it, it must be this `exact` one; otherwise one that is taken gets a number behind its name.
    Where no checkpoint was written into it, config.json and the folders made for it are gone again.
    """
    data = Path(settings.data)
    if settings.data not in NAMED and not (data / "train").exists() and not (data / "train.txt").exists():
        for flag, path in (("--out", folder), ("--cache", settings.cache)):
            if path is not None and Path(path).absolute().is_relative_to(data):
                raise UserError(f"{path} would lie among the class folders of {data}; take another {flag}")
    wanted, again = folder, 1
    while True:
        made = make_folder(folder)
        try:
            if any((folder / name).exists() for name in FILES):
                raise FileExistsError
            create_json(folder / CONFIG, dataclasses.asdict(settings))  # of two processes, one can
            break
        except FileExistsError:
            if exact:
                raise UserError(
                    f"{folder} already holds a run; take another --out, or go on with it by "
                    f"--resume {shlex.quote(str(folder))}"
                ) from None
            again += 1
            folder = wanted.with_name(f"{wanted.name}-{again}")
        except OSError:
            remove(folder, made)
            raise
    try:
        with the_only_one(folder):
            yield folder
    finally:
        if not (folder / checkpoint.LAST).exists():
            remove(folder, made)


@contextlib.contextmanager
def the_only_one(folder: Path) -> Iterator[None]:
    """No other process of this machine trains in `folder` inside the block; raises UserError where one does."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no run to resume in {folder}: it has no {path.name}")
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}") from None
        yield


def remove(folder: Path, made: list[Path]) -> None:
    """What a run writes before its first checkpoint, and those of the folders `made`, innermost first, left empty."""
    with contextlib.suppress(OSError):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def read_run(folder: Path) -> tuple[Settings, dict | None]:
    """The settings of the run in `folder` and what last.pt holds, which must have been made with them.

    A run killed before its first checkpoint was whole has nothing to lose: None, it starts from the beginning.
    """
    path = folder / CONFIG
    try:
        settings = checkpoint.parse_settings(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from error
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    if not has_begun(folder):
        return settings, None
    saved = checkpoint.load(folder / checkpoint.LAST)
    if not is_of(saved, settings):
        raise UserError(f"{folder / 'last.pt'} is of other settings than {path} names")
    return settings, saved


def has_settings(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds a run with these settings."""
    try:
        return checkpoint.parse_settings(json.loads((folder / CONFIG).read_text())) == settings
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def is_of(saved: dict[str, Any], settings: Settings) -> bool:
    """Whether the checkpoint `saved` was made with these settings, PLACES apart."""
    try:
        return differences(checkpoint.parse_settings(saved["settings"]), settings) <= set(PLACES)
    except (TypeError, ValueError):
        return False


def differences(one: Settings, other: Settings) -> set[str]:
    """The names of the settings in which they differ.

    Of Settings and not of what was written down of them: a run from before there was some setting has its default.
    """
    ours, theirs = dataclasses.asdict(one), dataclasses.asdict(other)
    return {name for name in ours if ours[name] != theirs[name]}


def has_begun(folder: Path) -> bool:
    """Whether a step was made in it; last.pt is first written before that, after the tables without rows."""
    if any((folder / name).exists() for name in (checkpoint.LAST, checkpoint.BEST, SUMMARY)):
        return True
    steps = folder / STEPS
    return steps.exists() and bool(read_table(steps))
