"""Files that are whole or absent: written beside their place under a temporary name, then moved there."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends well; until then the old file stays.

    A link stays, and what it leads to is written; what is no file, as a pipe or /dev/stdout, is written straight.
    Raises OSError naming `path` (on a full disk, say), with the temporary file gone.
    """
    if path.exists() and not path.is_file():
        with naming(path), open(path, "wb") as file:
            yield file
        return
    asked, path = path, Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(asked):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a full disk may show itself only here
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block is told as one of `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def make_folder(folder: Path) -> list[Path]:
    """`folder` and those it lies in; the ones it made, innermost first. Where that fails, none of them is left."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    return made


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def create_json(path: Path, value: Mapping[str, Any]) -> None:
    """As write_json, but raises FileExistsError where there is a file already."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        write_json(temporary, value)
        try:
            os.link(temporary, path)
        finally:
            temporary.unlink()


def write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
