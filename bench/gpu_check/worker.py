"""The parts of gpu-check that are ours, each a process: python -m bench.gpu_check.worker PART FILE [--quick]

A part appends a line of JSON to FILE for each thing it found, so that one that is stopped half way leaves the others.
It exits 1, with the reason on the last line of its output, if anything was wrong.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from bench.gpu_check import chains, memory, steps
from bench.gpu_check.ahead import compile_all
from bench.gpu_check.chains import Chain
from bench.gpu_check.operations import Case, Operands, Precise, cases, launch, native, ours, precision_of
from bench.gpu_check.steps import CONTENDERS, StepCase
from bench.measure.timer import EventTime, Flush
from bench.rows import TOLERANCE, worst_error
from kernels import conv2d, runtime, tuning

ROUNDS, QUICK_ROUNDS = 50, 20
STEP_ROUNDS, QUICK_STEP_ROUNDS = 40, 10
RELATIVE = TOLERANCE

Note = Callable[[dict], None]


def tune(note: Note, device: torch.device, *, quick: bool) -> str | None:
    """Autotunes each case, in a cache of its own. The reason why something is wrong, or None."""
    target = runtime.target_for(device)
    chosen = cases(target.name, quick=quick)
    jobs = [partial(launch, case, tile) for case in chosen for tile in case.candidates(target)]
    note({"ahead": compile_all(jobs, target.name)})
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


def compile_timed(note: Note, device: torch.device, *, quick: bool, tuned: bool) -> None:
    """Compiles what is timed below; what was `tuned` before was also compiled before."""
    target = runtime.target_for(device)
    of_cases = [
        partial(launch, case, case.candidates(target)[0])
        for case in ([] if tuned else cases(target.name, quick=quick))
    ]
    of_chains = [partial(chains.launch, chain) for chain in chains.chains(target.name)]
    note({"ahead": compile_all([*of_cases, *of_chains, *steps.jobs(target.name)], target.name)})


def time_all(note: Note, device: torch.device, *, quick: bool) -> str | None:
    """Times each case with its first tile beside cuDNN, once ours is right."""
    target = runtime.target_for(device)
    chosen = cases(target.name, quick=quick)
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
    """Medians over the rounds; raises AssertionError where ours is wrong."""
    operands = Operands.of(case, device)
    with precision_of(case, benchmark=False):
        exact = (native(case, operands.double()),)
    calls = {"seconds": lambda: (ours(case, operands),), "native_seconds": lambda: (native(case, operands),)}
    return race(case, case.dtype, calls, exact, flush, rounds)


def time_chains(note: Note, device: torch.device, *, quick: bool) -> str | None:
    """Times each fused chain beside PyTorch's and beside ours unfused, once ours is right."""
    arch = runtime.target_for(device).name
    flush, rounds, wrong = Flush(device), QUICK_ROUNDS if quick else ROUNDS, []
    for chain in chains.chains(arch):
        row = chain.row() | {"arch": arch, "gpu": torch.cuda.get_device_name(device)}
        try:
            note(row | timed_chain(chain, device, flush, rounds))
        except (RuntimeError, TritonError, AssertionError) as error:
            note(row | {"error": told(error)})
            wrong.append(f"{chain.layer.name} {chain.name} {row['dtype']}: {told(error)}")
    return f"{len(wrong)} chains failed, the first: {wrong[0]}" if wrong else None


def timed_chain(chain: Chain, device: torch.device, flush: Flush, rounds: int) -> dict:
    """As `timed`, with "unfused_seconds" where there is such a thing."""
    operands = chains.Operands.of(chain, device)
    with precision_of(chain, benchmark=False):
        exact = chains.native(chain, operands.double())
    calls = {
        name: partial(by, chain, operands)
        for name, by in (
            ("seconds", chains.ours), ("native_seconds", chains.native), ("unfused_seconds", chains.unfused),
        )
        if name != "unfused_seconds" or chain.has_unfused
    }  # fmt: skip
    found = race(chain, chain.dtype, calls, exact, flush, rounds)
    unfused = found.get("unfused_seconds")
    return found | ({"ratio_to_unfused": found["seconds"] / unfused} if unfused else {})


Calls = dict[str, Callable[[], tuple[torch.Tensor, ...]]]
"""Ours as "seconds", PyTorch's as "native_seconds"; others."""


def race(
    case: Precise, dtype: torch.dtype, calls: Calls, exact: tuple[torch.Tensor, ...], flush: Flush, rounds: int
) -> dict:
    """Medians over the rounds, in which the calls take turns; raises AssertionError where ours is wrong."""
    with precision_of(case, benchmark=True):
        errors = {name: worst_error(call(), exact) for name, call in calls.items()}
        kind = case.precision if case.precision == "tf32" else str(dtype).removeprefix("torch.")
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


def time_steps(note: Note, device: torch.device, *, quick: bool) -> str | None:
    """Times whole training steps by each of CONTENDERS, once ours are as right as PyTorch's."""
    wrong = []
    for case in steps.step_cases(runtime.target_for(device).name):
        row = case.row() | {"gpu": torch.cuda.get_device_name(device)}
        try:
            note(row | timed_step(case, device, QUICK_STEP_ROUNDS if quick else STEP_ROUNDS))
        except (RuntimeError, TritonError, AssertionError) as error:
            note(row | {"error": told(error)})
            wrong.append(f"{case.model} {case.kind}: {told(error)}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return f"{len(wrong)} steps failed, the first: {wrong[0]}" if wrong else None


def timed_step(case: StepCase, device: torch.device, rounds: int) -> dict:
    """Medians over the rounds, in which the contenders take turns; raises AssertionError where ours is wrong."""
    contenders = {name: steps.training(case, name, device) for name in CONTENDERS}
    with precision_of(case, benchmark=False):
        errors = steps.errors(case, contenders)
    for name, error in errors.items():
        limit = max(steps.TOLERANCES[case.kind], steps.TIMES_NATIVE * errors["torch"])
        assert error <= limit, f"the gradients of {name} are wrong by {error:.1e}, so its time means nothing"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with precision_of(case, benchmark=True):
        for made in contenders.values():
            made.step()  # cuDNN looks for its algorithms, the optimiser makes its state
        hosts = {name: steps.host_seconds(made) for name, made in contenders.items()}
        for _ in range(rounds):
            for name, made in contenders.items():
                start = EventTime()
                made.step()
                times[name].append(EventTime() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": medians,
        "ratio": {name: medians["triton"] / seconds for name, seconds in medians.items() if name != "triton"},
        "slowest": {name: max(values) for name, values in times.items()},
        "fastest": {name: min(values) for name, values in times.items()},
        "host_seconds": hosts, "relative_error": errors, "n": rounds,
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
            compile_timed(note, device, quick=quick, tuned=(folder / "tuning.jsonl").exists())
            reasons = [time(note, device, quick=quick) for time in (time_all, time_chains, time_steps)]
            wrong = "; ".join(filter(None, reasons)) or None
        elif part == "memory":
            if not (folder / "timing.jsonl").exists():  # which compiled the same kernels
                arch = runtime.target_for(device).name
                note({"ahead": compile_all(steps.jobs(arch), arch)})
            wrong = memory.measure_all(note, quick=quick)
        else:
            touch(note, device, quick=quick)
    if wrong is not None:
        sys.stderr.write(f"{wrong}\n")
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
