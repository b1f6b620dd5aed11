"""Finished and unfinished runs, read back from their folders: config.json, metrics.csv and summary.json."""

import json
import math
import reprlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from train.checkpoint import FINITE, can_be_shown, fits, require_values
from train.cli import UserError
from train.recipes import DEFAULTS
from train.records import EPOCH_COLUMNS, MEMORY_COLUMNS, read_table
from train.report import backend_of
from train.run_folder import CONFIG, METRICS, SUMMARY

# Settings that change neither what is learned nor what is measured.
IRRELEVANT = {"seed", "cache"}

SUMMARY_TYPES = {
    "backend": Literal["compiled", "interpreter", "native"], "device": str, "classes": int, "images_per_s": float,
    "memory": dict, "processes": int,
}
MEMORY_TYPES = {"kind": str, "mib": float | None}
# Memory is compared by the summaries: its columns have empty cells, and runs of earlier versions lack them.
COLUMNS = tuple(name for name in EPOCH_COLUMNS if name not in MEMORY_COLUMNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run folder says."""

    folder: Path
    config: dict[str, Any]
    """The run's settings."""
    epochs: list[dict[str, float]]
    """COLUMNS of metrics.csv, a row an epoch."""
    summary: dict[str, Any] | None
    """summary.json; None while the run is unfinished."""

    @property
    def classes(self) -> int | None:
        return self.summary["classes"] if self.summary else None

    @property
    def images_per_s(self) -> float:
        """Training images per second; of an unfinished run the mean over its epochs."""
        if self.summary:
            return self.summary["images_per_s"]
        return statistics.fmean(self.column("images_per_s"))

    @property
    def crossing(self) -> int | None:
        return crossing_epoch(self.column("train_top1"), self.column("val_top1"))

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.epochs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed: one row of a table, one line of a figure."""

    runs: list[Run]

    @property
    def config(self) -> dict[str, Any]:
        """Of the first run: of all of them, but for the seed."""
        return self.runs[0].config

    @property
    def finished(self) -> bool:
        return self.runs[0].summary is not None

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.runs[0].epochs)

    @property
    def backend(self) -> str:
        """Where the convolutions were computed: "compiled", "interpreter" or "native"."""
        config = self.config
        summary = self.runs[0].summary
        return summary["backend"] if summary else backend_of(config["conv"], torch.device(config["device"]))

    @property
    def device(self) -> str:
        """As its maker calls it, "4 × " of several processes; of an unfinished run, which has not said, its kind."""
        summary = self.runs[0].summary
        if not summary:
            return self.config["device"]
        processes = summary.get("processes", 1)
        return summary["device"] if processes == 1 else f"{processes} × {summary['device']}"

    @property
    def memory(self) -> dict[str, list[float]]:
        """What was measured as memory -> MiB of each finished run that measured it: figures of two kinds never mix."""
        figures: dict[str, list[float]] = {}
        for entry in (run.summary["memory"] for run in self.runs if run.summary):
            figures.setdefault(entry["kind"], []).extend([] if entry["mib"] is None else [entry["mib"]])
        return figures

    def each(self, figure: Callable[[Run], float]) -> list[float]:
        return [figure(run) for run in self.runs]

    def curve(self, column: str) -> tuple[list[float], list[float]]:
        """(mean, spread) of a column of metrics.csv at every epoch."""
        values = list(zip(*(run.column(column) for run in self.runs), strict=True))
        return [statistics.fmean(v) for v in values], [spread(v) for v in values]


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample, with n - 1; of a single value 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def crossing_epoch(train: Sequence[float], val: Sequence[float]) -> int | None:
    """The first epoch, from 1, whose train accuracy is above its validation accuracy."""
    return next((i for i, (t, v) in enumerate(zip(train, val, strict=True), start=1) if t > v), None)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and inside them, each once; raises UserError for a path that holds none."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no run folder {path}")
        if (path / METRICS).exists() or (path / CONFIG).exists():
            folders = [path]
        else:
            folders = sorted(file.parent for file in path.rglob(METRICS) if (file.parent / CONFIG).is_file())
        if not folders:
            raise UserError(f"{path} holds no run: no folder in it has a {METRICS} and a {CONFIG}")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_run(folder: Path) -> Run:
    """Raises UserError naming the file that is missing, damaged, or lacks something."""
    config = read_object(folder / CONFIG, ("model", "conv", "recipe", "epochs", "seed", "data", "image_size", "device"))
    config = DEFAULTS | config  # a run from before there was some setting
    try:
        require_values(config)
        torch.device(config["device"])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from error
    summary = None
    if (folder / SUMMARY).exists():
        summary = read_object(folder / SUMMARY, SUMMARY_TYPES.keys() - {"processes"})
        require_types(folder / SUMMARY, {"processes": 1} | summary, SUMMARY_TYPES)
        require_types(folder / SUMMARY, summary["memory"], MEMORY_TYPES)
    epochs = read_metrics(folder / METRICS)
    if summary and len(epochs) != config["epochs"]:
        raise UserError(
            f"{folder / METRICS} is damaged: it has {len(epochs)} rows, and the run finished {config['epochs']} epochs"
        )
    return Run(folder=folder, config=config, epochs=epochs, summary=summary)


def require_types(path: Path, values: dict[str, Any], types: Mapping[str, Any]) -> None:
    """Raises UserError unless `values`, out of `path`, has values of these types, and text that can be shown."""
    for name, hint in types.items():
        value = values.get(name)
        if name not in values or not fits(value, hint, *FINITE) or not can_be_shown(value):
            raise UserError(f"{path} is damaged: {name} is {reprlib.repr(values.get(name, 'missing'))}")


def read_object(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    if not path.is_file():  # nor a pipe, whose end may never come
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    if missing := [key for key in keys if key not in value]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return value


def read_metrics(path: Path) -> list[dict[str, float]]:
    """COLUMNS of its rows, as numbers."""
    if not path.is_file():
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}")
    rows, numbers = read_table(path), []
    for count, row in enumerate(rows, start=1):
        if missing := [name for name in COLUMNS if name not in row]:
            raise UserError(f"{path} lacks the column {', '.join(missing)}")
        try:
            numbers.append({name: float(row[name]) for name in COLUMNS})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged in row {count}: {error}") from error
        if not all(math.isfinite(value) for value in numbers[-1].values()):
            raise UserError(f"{path} is damaged in row {count}: not every value is a finite number")
        if numbers[-1]["epoch"] != count:
            raise UserError(f"{path} is damaged: its row {count} is of epoch {row['epoch']}")
    return numbers


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """In the order of each group's first run. Runs on different devices, or at different epochs, stay apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.config.items() if name not in IRRELEVANT}
        where = run.summary and [run.summary.get(name) for name in ("device", "processes", "backend")]
        groups.setdefault(json.dumps([settings, where, len(run.epochs)], sort_keys=True), []).append(run)
    return [Group(runs=members) for members in groups.values()]
