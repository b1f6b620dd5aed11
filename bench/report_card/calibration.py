"""Times measured on a GPU, turned into factors that make estimates of bounds.

    write(path, rows)                    # rows of one GPU, each with its seconds
    calibration = read(path)
    calibration.estimate(row)            # seconds, or None for what was not measured

A factor is the median over layers of measured / bound, one for each operation and dtype: robust against a layer that
was disturbed, and blind to how layers differ. How many layers it is of, and between what they lie, stands beside it.

The file is JSON:

    {"format": "conv-lab calibration 1", "arch": "sm_80", "gpu": "...", "date": "2026-01-31", "commit": "...",
     "factors": {"forward": {"fp16": {"factor": 1.6, "n": 7, "least": 1.3, "most": 2.2}}},
     "rows": [{"op": ..., "dtype": ..., "x_shape": ..., "seconds": ..., "bound_seconds": ..., ...}]}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure.gpus import GPUS
from bench.report_card.card import DTYPES, FUSED, OPERATIONS, Row, dtype_name, row
from kernels.geometry import ConvGeometry
from train.cli import UserError
from train.files import write_json
from train.report import git_commit

FORMAT = "conv-lab calibration 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What a file says."""

    arch: str
    gpu: str
    date: str
    file: str
    factors: dict[tuple[str, str], tuple[float, int]]
    """{(op, dtype): (measured / bound, layers)}"""

    @property
    def label(self) -> str:
        layers = "; ".join(
            f"{op} {dtype} {factor:.2f} times the bound, n = {n}" for (op, dtype), (factor, n) in self.factors.items()
        )
        return f"estimate, calibrated on {self.gpu}, {self.date}, {self.file} ({layers})"

    def estimate(self, row: Row) -> float | None:
        """Seconds; None for another architecture, and for an operation or dtype that was not measured."""
        found = self.factors.get((row.op, row.dtype)) if row.arch == self.arch else None
        return found[0] * row.bound_seconds if found and row.bound_seconds else None


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Makes the file of measured `rows`, each with its bound, for which its kernels are compiled here.

    Each has arch ("sm_80"), gpu (its name), op, dtype ("fp16", "float16", or a torch.dtype), precision, x_shape,
    w_shape, stride, padding, dilation, groups, seconds; others of its entries are kept.

    Raises ValueError for no rows, rows of several GPUs, and seconds that are no time.
    """
    kinds = {(one["arch"], one["gpu"]) for one in rows}
    if len(kinds) != 1:
        raise ValueError(f"a calibration is of one GPU, these rows are of {len(kinds)}: {sorted(kinds)}")
    ((arch, gpu),) = kinds
    kept, ratios = [], {}
    for one in rows:
        if not (isfinite(one["seconds"]) and one["seconds"] > 0):
            raise ValueError(f"{one['op']} of {one['x_shape']} took {one['seconds']} seconds")
        dtype, precision = _dtype_of(one)
        geometry = ConvGeometry.of(
            one["x_shape"], one["w_shape"], one["stride"], one["padding"], one["dilation"], one["groups"]
        )
        found = row(one["op"], geometry, dtype, precision, arch)
        if found.bound_seconds is None:
            raise ValueError(f"{one['op']} of {one['x_shape']} was timed, and {found.bound_by}")
        ratios.setdefault((one["op"], found.dtype), []).append(one["seconds"] / found.bound_seconds)
        theirs = {name: value for name, value in one.items() if name not in ("arch", "gpu", "precision")}
        kept.append(
            theirs | {"dtype": found.dtype, "bound_seconds": found.bound_seconds, "bound_by": found.bound_by}
        )
    factors: dict[str, dict] = {}
    for (op, dtype), of_layers in ratios.items():
        factors.setdefault(op, {})[dtype] = {
            "factor": median(of_layers), "n": len(of_layers), "least": min(of_layers), "most": max(of_layers),
        }  # fmt: skip
    write_json(
        path,
        {
            "format": FORMAT, "arch": arch, "gpu": gpu, "date": date.today().isoformat(), "commit": git_commit(),
            "factors": factors, "rows": kept,
        },
    )  # fmt: skip


def read(path: Path) -> Calibration:
    """Raises UserError, in one line, for a file that is no calibration, and OSError for one that is not there."""
    try:
        told = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"--calibration {path} is no JSON: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise UserError(f'--calibration {path} is no calibration: its "format" is not "{FORMAT}"')
    wrong = _what_is_wrong(told)
    if wrong:
        raise UserError(f"--calibration {path}: {wrong}")
    factors = {
        (op, dtype): (float(found["factor"]), found["n"])
        for op, of_dtypes in told["factors"].items()
        for dtype, found in of_dtypes.items()
    }
    return Calibration(arch=told["arch"], gpu=told["gpu"], date=told["date"], file=str(path), factors=factors)


def _what_is_wrong(told: dict[str, Any]) -> str | None:
    """The first thing that is, in words."""
    for name in ("arch", "gpu", "date"):
        if not isinstance(told.get(name), str):
            return f'"{name}" is {told.get(name)!r} instead of a text'
    if told["arch"] not in GPUS:
        return f'"arch" is {told["arch"]!r}; known: {", ".join(GPUS)}'
    if not isinstance(told.get("factors"), dict) or not told["factors"]:
        return '"factors" holds no factor'
    for op, of_dtypes in told["factors"].items():
        if op not in (*OPERATIONS, *FUSED) or not isinstance(of_dtypes, dict):
            return f'"factors" of {op!r}: operations are {", ".join(OPERATIONS)}'
        for dtype, found in of_dtypes.items():
            if dtype not in DTYPES:
                return f"{dtype!r} is no dtype; known: {', '.join(DTYPES)}"
            factor, n = (found.get(name) for name in ("factor", "n")) if isinstance(found, dict) else (None, None)
            if type(factor) not in (int, float) or not (isfinite(factor) and factor > 0):
                return f"the factor of {op} {dtype} is {factor!r} instead of a number above 0"
            if type(n) is not int or n < 1:
                return f'"n" of {op} {dtype} is {n!r} instead of how many layers were measured'
    return None


def _dtype_of(one: Mapping[str, Any]) -> tuple:
    """(dtype, precision) of a measured row."""
    name = str(one["dtype"]).removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name]
    for dtype, precision in DTYPES.values():
        if str(dtype) == f"torch.{name}":
            return DTYPES[dtype_name(dtype, one.get("precision", precision))]
    raise ValueError(f"unknown dtype {one['dtype']!r}; known: {', '.join(DTYPES)}")
