"""Work on batches whose results are kept as they come, so that an interrupted command goes on where it was."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from attacks.run.subject import Subject
from train.cli import UserError
from train.devices import one_thread
from train.files import write_json

# Conditions that do not decide a figure.
IRRELEVANT = ("checkpoint", "data")


def over_batches(
    subject: Subject, file: Path, key: dict[str, Any], work: Callable[[Tensor, Tensor, slice], Tensor], console: Console
) -> list[Any]:
    """What `work` gives for each batch, as lists, in order.

    file    keeps what is done while the rest is; the same call with the same key goes on from it
    key     everything that decides the results
    work    work(x (B, 3, S, S), y (B,), mine) of this process's images x[mine]; results are added up over processes

    Raises UserError where it is interrupted, and for a damaged file. The file is the caller's to delete, once what was
    made of the results is safe.
    """
    deciding = json.dumps({name: value for name, value in key.items() if name not in IRRELEVANT}, sort_keys=True)
    world, results = subject.world, subject.world.share(read(file, deciding) if subject.world.is_main else None)
    mine = slice(world.rank, None, world.size)
    try:
        with one_thread(subject.backend), progress_bar(console) as progress:
            task = progress.add_task("batches attacked", total=subject.batch_count, completed=len(results))
            for number, (x, y) in enumerate(subject.batches()):
                if number < len(results):
                    continue
                results.append(world.sum(work(x, y, mine)).tolist())
                if world.is_main:
                    write_json(file, {"key": deciding, "results": results, "checksum": checksum(results)})
                progress.update(task, completed=len(results))
    except KeyboardInterrupt:
        if not results:
            raise UserError(f"interrupted before the first of {subject.batch_count} batches was done") from None
        raise UserError(
            f"interrupted after {len(results)} of {subject.batch_count} batches; "
            f"the same command goes on from {file}"
        ) from None
    return results


def read(file: Path, key: str) -> list[Any]:
    """The results in `file` if they are of this key; none where it is missing or of another."""
    if not file.exists():
        return []
    if not file.is_file():  # a pipe, say, whose end may never come
        raise UserError(f"{file} is no file; move it away to begin anew")
    try:
        saved = json.loads(file.read_text())
        if saved["key"] != key:
            return []
        if saved["checksum"] != checksum(saved["results"]):
            raise ValueError("checksum")
        return saved["results"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged; delete it to begin anew") from error


def checksum(results: list[Any]) -> int:
    """A digit that has rotted is a number still; written as JSON, a number that was read is what it was."""
    return zlib.crc32(json.dumps(results).encode())


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), TextColumn("left"),
        console=console, transient=True, expand=True, disable=console.quiet or not console.is_terminal,
    )
