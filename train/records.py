"""metrics.csv, steps.csv and TensorBoard events: what a run measured, kept in step with its checkpoint."""

import csv
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from train.cli import UserError
from train.files import naming, read_csv, write_csv
from train.memory import COLUMNS as MEMORY_COLUMNS

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5",
    "images_per_s", "data_wait_pct", *MEMORY_COLUMNS,
)
STEP_COLUMNS = ("step", "lr", "loss")


class Records:
    """The rows of both tables, as strings; `write` brings the files up to date."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.epochs: list[dict[str, str]] = []
        self.steps: list[dict[str, str]] = []
        self._events: list[Event] = []
        self._event_file: Path | None = None

    def add_step(self, step: int, lr: float, loss: float) -> None:
        """`step` counts from 1; `lr` is the rate it was made with."""
        self.steps.append({"step": str(step), "lr": f"{lr:.9g}", "loss": f"{loss:.9g}"})
        self._add_event(step, {"step/loss": loss, "step/lr": lr})

    def add_epoch(self, step: int, row: dict[str, Any]) -> None:
        """A row of EPOCH_COLUMNS, None where a value is unknown; `step` is where TensorBoard shows the others."""
        self.epochs.append({name: "" if row[name] is None else f"{row[name]:.6g}" for name in EPOCH_COLUMNS})
        known = {name: value for name, value in row.items() if value is not None}
        self._add_event(step, {f"epoch/{name}": value for name, value in known.items() if name != "epoch"})

    def write(self) -> None:
        """Both CSV files anew, and the events since the last call after the earlier ones; raises OSError."""
        write_csv(self.folder / "steps.csv", STEP_COLUMNS, self.steps)
        write_csv(self.folder / "metrics.csv", EPOCH_COLUMNS, self.epochs)
        if self._events:
            if self._event_file is None:  # one of this process's own: an earlier one's may end in a torn record
                self._event_file = new_event_file(self.folder)
            append_events(self._event_file, self._events)
            self._events = []

    def read(self, *, up_to_step: int, up_to_epoch: int) -> None:
        """The rows on disk as far as a checkpoint reaches; TensorBoard is told to forget those beyond it."""
        self.steps = self._rows("steps.csv", STEP_COLUMNS, up_to_step)
        self.epochs = self._rows("metrics.csv", EPOCH_COLUMNS, up_to_epoch, later=MEMORY_COLUMNS)
        start = SessionLog(status=SessionLog.START)
        self._events = [Event(wall_time=time.time(), step=up_to_step + 1, session_log=start)]

    def _rows(
        self, name: str, columns: tuple[str, ...], count: int, *, later: tuple[str, ...] = ()
    ) -> list[dict[str, str]]:
        """The first `count` rows of a table; raises UserError where it has fewer, other columns, or other than numbers.

        `later` are the last columns, whose cells may be empty and which tables of earlier versions lack.
        """
        rows = read_table(self.folder / name)[:count]
        early = columns[: len(columns) - len(later)]
        rows = [row | dict.fromkeys(later, "") if tuple(row) == early else row for row in rows]
        if len(rows) < count or any(tuple(row) != columns or None in row.values() for row in rows):
            raise UserError(f"{self.folder / name} is damaged: last.pt needs its first {count} rows")
        for number, row in enumerate(rows, start=1):
            filled = [value for column, value in row.items() if value or column not in later]
            if not all(map(is_finite, filled)) or float(row[columns[0]]) != number:
                raise UserError(f"{self.folder / name} is damaged in row {number}")
        return rows

    def _add_event(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._events.append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; raises UserError for one that is missing or no text."""
    if not path.is_file():  # nor a pipe, whose end may never come
        raise UserError(f"no table {path}")
    try:
        return read_csv(path)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def new_event_file(folder: Path) -> Path:
    """A file that TensorBoard reads after those that are there already."""
    path = folder / f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}.0"
    append_events(path, [Event(wall_time=time.time(), file_version="brain.Event:2")])
    return path


def append_events(path: Path, events: list[Event]) -> None:
    """Not by torch's SummaryWriter: it writes in a thread, where a full disk becomes a traceback of the thread's."""
    with naming(path), open(path, "ab") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
        writer.flush()
