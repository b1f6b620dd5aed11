"""The report as plain types: what --json writes, and what --against compares with. Times are seconds, sizes bytes."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.conditions import conditions
from bench.measure.bound import LABEL
from bench.report_card import words
from bench.report_card.calibration import Calibration
from bench.report_card.card import Row
from bench.report_card.targets import judge
from train.cli import UserError

FORMAT = "conv-lab report card 1"

# Figures that --against compares, by the name it gives them; the time bound is compared apart, and first.
COMPARED = {
    "bound by": "bound_by", "tile": "tile", "warps": "warps", "stages": "stages", "registers": "registers",
    "spills": "spills", "shared bytes": "shared_bytes", "occupancy": "occupancy", "limited by": "occupancy_limit",
    "programs": "programs", "waves": "waves", "last wave's waste": "last_wave_waste", "unrolled": "unrolled",
    "tensor core instructions": "tensor_core_instructions", "multiply-adds a pass": "multiply_adds_a_pass",
    "others": "others", "overhead": "overhead", "others per FMA": "others_per_fma", "global loads": "global_loads",
    "asynchronous": "asynchronous", "copies in flight": "copies_in_flight", "TMA": "tensor_copies",
    "multiply-adds": "multiply_adds",
    "bytes requested": "bytes_requested", "misses": "misses",
}  # fmt: skip
KEYS = ("arch", "op", "dtype", "x_shape", "w_shape", "stride", "padding", "dilation", "groups")
LEAST_CHANGE = 1e-9
"""Relative, of a figure that counts as another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A row that another run has too, and what of it is not the same."""

    arch: str
    op: str
    dtype: str
    shape: str
    before: float | None
    """The time bound in seconds; None where it cannot be launched."""
    after: float | None
    figures: dict[str, tuple[Any, Any]]
    """{name in COMPARED: (before, after)}"""

    @property
    def ratio(self) -> float:
        """Of the bounds, after / before; above 1 is worse."""
        if self.before and self.after:
            return self.after / self.before
        return 1.0 if self.before == self.after else float("inf") if self.after is None else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    file: str
    changes: tuple[Change, ...]
    """By how much the time bound changed, most first; rows of equal bounds after it."""
    same: int
    only_here: int
    only_there: int


def make_report(rows: Sequence[Row], calibration: Calibration | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "label": LABEL,
        "calibration": calibration.label if calibration else None,
        "rows": [entry(row, calibration) for row in rows],
        "meet_their_targets": sum(not judge(row) for row in rows),
        "conditions": conditions(torch.device("cpu")),
    }


def entry(row: Row, calibration: Calibration | None = None) -> dict[str, Any]:
    """One row, as JSON has it: keys are texts, tuples are lists."""
    return json.loads(
        json.dumps(
            dataclasses.asdict(row)
            | {
                "shape": words.shape(row),
                "roofline_share": row.roofline_share,
                "estimate_seconds": calibration.estimate(row) if calibration else None,
                "misses": judge(row),
            }
        )
    )


def read_report(path: Path) -> dict[str, Any]:
    """What another run's --json wrote. Raises UserError, in one line, for anything else."""
    try:
        told = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"--against {path} is no JSON: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise UserError(f'--against {path} was not written by --json of this command: its "format" is not "{FORMAT}"')
    rows = told.get("rows")
    needed = {*KEYS, *COMPARED.values(), "bound_seconds", "shape"}
    if not isinstance(rows, list) or any(not isinstance(row, dict) or needed - row.keys() for row in rows):
        raise UserError(f"--against {path}: its rows lack figures that this version compares")
    if any(type(row["bound_seconds"]) not in (int, float, type(None)) for row in rows):
        raise UserError(f"--against {path}: a bound is no number")
    return told


def compare(report: dict[str, Any], other: dict[str, Any], file: Path) -> Comparison:
    """`report` now against `other` before."""
    before = {key_of(row): row for row in other["rows"]}
    after = {key_of(row): row for row in report["rows"]}
    shared = [key for key in after if key in before]
    changes = [change for key in shared if (change := _change(before[key], after[key])) is not None]
    return Comparison(
        file=str(file),
        changes=tuple(sorted(changes, key=lambda change: -abs(_size(change.ratio)))),
        same=len(shared) - len(changes),
        only_here=len(after) - len(shared),
        only_there=len(before) - len(shared),
    )


def key_of(row: dict[str, Any]) -> str:
    """What makes it the same row in two runs."""
    return json.dumps([row[name] for name in KEYS])


def _change(before: dict[str, Any], after: dict[str, Any]) -> Change | None:
    figures = {
        name: (before[field], after[field])
        for name, field in COMPARED.items()
        if _differ(before[field], after[field])
    }
    bounds = before["bound_seconds"], after["bound_seconds"]
    if not figures and not _differ(*bounds):
        return None
    where = {name: after[name] for name in ("arch", "op", "dtype", "shape")}
    return Change(**where, before=bounds[0], after=bounds[1], figures=figures)


def _differ(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float):
        return abs(after - before) > LEAST_CHANGE * max(abs(before), abs(after))
    return before != after


def _size(ratio: float) -> float:
    """How far a ratio is from 1, the same for a half and a double."""
    return float("inf") if ratio in (0.0, float("inf")) else max(ratio, 1 / ratio) - 1


def by_table(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """(arch, dtype, rows) of each table, in the order of the rows."""
    for arch, dtype in dict.fromkeys((row.arch, row.dtype) for row in rows):
        yield arch, dtype, [row for row in rows if (row.arch, row.dtype) == (arch, dtype)]
