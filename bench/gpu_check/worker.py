"""The parts of gpu-check that are ours, each a process: python -m bench.gpu_check.worker PART FILE [--quick]

A part appends a line of JSON to FILE for each thing it found, so that one that is stopped half way leaves the others.
It exits 1, with the reason on the last line of its output, if anything was wrong.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from triton.errors import TritonError

from bench.gpu_check.ahead import compile_all
from bench.gpu_check.operations import Case, Operands, cases, native, ours, precision_of
from bench.measure.timer import EventTime, Flush
from bench.rows import TOLERANCE, relative_error
from kernels import conv2d, runtime, tuning

ROUNDS, QUICK_ROUNDS = 50, 20
# ||result - exact|| / ||exact||, exact being float64 of the same operands: a rounding of the result, or of TF32's.
RELATIVE = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 2e-3, "float32": TOLERANCE["layer"]}

Note = Callable[[dict], None]


def tune(note: Note, device: torch.device, *, quick: bool) -> str | None:
    """Autotunes each case, in a cache of its own. The reason why something is wrong, or None."""
    target = runtime.target_for(device)
    chosen = cases(target.name, quick=quick)
    note({"ahead": compile_all([(case, tile) for case in chosen for tile in case.candidates(target)], target.name)})
    wrong = []
    for case in chosen:
        candidates = case.candidates(target)
        if len(candidates) == 1:
            note(case.row() | {"tile": asdict(candidates[0]), "only_candidate": True})
            continue
        known = len(tuning.record())
        try:
            ours(case, Operands.of(case, device))
        except (RuntimeError, TritonError) as error:
            note(case.row() | {"error": told(error)})
            wrong.append(f"{case.layer.name} {case.op}: {told(error)}")
            continue
        made = tuning.record()[known:]
        if not made:
            return f"the launcher of {case.op} did not tune, though there are {len(candidates)} candidates"
        trials = made[-1].trials
        first, best = trials[0].seconds, min(trial.seconds for trial in trials if trial.seconds is not None)
        note(case.row() | {
            "tile": asdict(made[-1].tile), "trials": [asdict(trial) for trial in trials], "first_seconds": first,
            "best_seconds": best, "first_over_best": first and first / best,
        })  # fmt: skip
        wrong += [f"{case.layer.name} {case.op}: {trial.tile} fails: {trial.error}" for trial in trials if trial.error]
    return f"{len(wrong)} wrong, the first: {wrong[0]}" if wrong else None


def time_all(note: Note, device: torch.device, *, quick: bool, compiled: bool) -> str | None:
    """Times each case with its first tile beside cuDNN, once ours is right."""
    target = runtime.target_for(device)
    chosen = cases(target.name, quick=quick)
    if not compiled:
        note({"ahead": compile_all([(case, case.candidates(target)[0]) for case in chosen], target.name)})
    flush, rounds, wrong = Flush(device), QUICK_ROUNDS if quick else ROUNDS, []
    for case in chosen:
        row = case.row() | {"arch": target.name, "gpu": torch.cuda.get_device_name(device)}
        row["tile"] = asdict(case.candidates(target)[0])
        try:
            note(row | timed(case, device, flush, rounds))
        except (RuntimeError, TritonError, AssertionError) as error:
            note(row | {"error": told(error)})
            wrong.append(f"{case.layer.name} {case.op} {row['dtype']}: {told(error)}")
    return f"{len(wrong)} rows failed, the first: {wrong[0]}" if wrong else None


def timed(case: Case, device: torch.device, flush: Flush, rounds: int) -> dict:
    """Medians over the rounds, in which ours and cuDNN's take turns; raises AssertionError where ours is wrong."""
    operands = Operands.of(case, device)
    with precision_of(case, benchmark=False):
        exact = native(case, operands.double())
    calls = {"seconds": lambda: ours(case, operands), "native_seconds": lambda: native(case, operands)}
    with precision_of(case, benchmark=True):
        errors = {name: relative_error(call(), exact) for name, call in calls.items()}
        kind = case.precision if case.precision == "tf32" else str(case.dtype).removeprefix("torch.")
        assert errors["seconds"] <= RELATIVE[kind], f"wrong by {errors['seconds']:.1e}, so its time means nothing"
        del exact
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                flush()
                start = EventTime()
                call()
                times[name].append(EventTime() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {
        "ratio": medians["seconds"] / medians["native_seconds"],
        "slowest": {name: max(values) for name, values in times.items()},
        "fastest": {name: min(values) for name, values in times.items()},
        "relative_error": errors["seconds"], "native_relative_error": errors["native_seconds"], "n": rounds,
    }  # fmt: skip


# What compute-sanitizer watches: every kernel once, small, with blocks that reach over each edge.
TOUCHED = [
    ((2, 20, 13, 11), (36, 20, 3, 3), {"padding": 1}),
    ((3, 3, 17, 15), (24, 3, 5, 5), {"stride": 2, "padding": 2}),
    ((2, 64, 9, 9), (64, 32, 3, 3), {"stride": (2, 1), "padding": 1, "groups": 2}),
    ((3, 40, 9, 11), (80, 1, 3, 5), {"stride": (2, 1), "padding": 1, "groups": 40}),
    ((2, 64, 32, 32), (64, 64, 3, 3), {"padding": 1}),
]


def touch(note: Note, device: torch.device, *, quick: bool) -> None:
    """A forward and a backward pass of each case of TOUCHED."""
    for dtype in (torch.float16,) if quick else runtime.DTYPES:
        for x_shape, w_shape, options in TOUCHED:
            x = torch.randn(x_shape, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
            w = torch.randn(w_shape, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
            y = conv2d(x, w, torch.zeros(w_shape[0], dtype=dtype, device=device), **options)
            y.backward(torch.ones_like(y))
            torch.cuda.synchronize(device)
            note({"dtype": str(dtype).removeprefix("torch."), "x_shape": x_shape, "w_shape": w_shape} | options)


def told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(argv: list[str]) -> int:
    part, file, *rest = argv
    quick, folder, wrong = "--quick" in rest, Path(file).parent, None
    with open(file, "a") as lines:

        def note(found: dict) -> None:
            lines.write(json.dumps(found) + "\n")
            lines.flush()

        device = torch.device("cuda", torch.cuda.current_device())
        if part == "tuning":
            with tuning.enabled(folder / "choices"):
                wrong = tune(note, device, quick=quick)
        elif part == "timing":
            # What was tuned before was also compiled before.
            wrong = time_all(note, device, quick=quick, compiled=(folder / "tuning.jsonl").exists())
        else:
            touch(note, device, quick=quick)
    if wrong is not None:
        sys.stderr.write(f"{wrong}\n")
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
