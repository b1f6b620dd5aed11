"""The gpu-check command: python -m bench.gpu_check"""

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.conditions import conditions, gpu_state
from bench.gpu_check import parts
from bench.gpu_check.console import print_part, print_summary
from train.cli import Parser, UserError, path, run_command
from train.files import atomic_write, write_json

QUICK_SECONDS = 540
"""All parts of a quick run together; one that would begin later, or with less than LEAST_SECONDS, does not."""
LEAST_SECONDS = 10

DESCRIPTION = """\
Check the Triton kernels on the GPU of this machine: the convolution's tests on CUDA tensors, each tile by itself,
autotuning, times beside cuDNN's, the memory of training steps, and compute-sanitizer where it is installed. One report,
which is written again after each part; a part that fails, hangs or crashes is recorded and the others go on.
"""

EXAMPLES = """
examples:
  python -m bench.gpu_check                 everything, two hours at most
  python -m bench.gpu_check --quick         fewer shapes, nine minutes
  python -m bench.gpu_check --parts tuning timing --out h100.json

exit code: 0 all passed, 1 a part failed, 2 nothing could be checked
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.gpu_check",
        usage="python -m bench.gpu_check [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    names = [part.name for part in parts.PARTS]
    parser.add_argument("--quick", action="store_true", help="fewer tests, layers and models, nine minutes at most")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--out", type=path, metavar="FILE", help="the report (runs/gpu-check-<time>.json)")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    """Exits 1 if a part failed; raises UserError where nothing can be checked or the report cannot be written."""
    reason = why_no_gpu()
    if reason is not None:
        raise UserError(f"gpu-check needs a CUDA GPU; none is visible ({reason})")
    file = arguments.out or Path("runs", f"gpu-check-{datetime.now():%Y%m%d-%H%M%S}.json")
    if arguments.out is None:
        file.parent.mkdir(exist_ok=True)
    elif file.is_dir():
        raise UserError(f"--out {file} is a folder; name a file")
    device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {
        "gpu_check": 1,
        "command": " ".join(["python -m bench.gpu_check", *sys.argv[1:]]),
        "quick": arguments.quick,
        "begun": now(),
        "ended": None,
        "conditions": conditions(device) | {"cores": len(os.sched_getaffinity(0)), "arch": arch_of(device)},
        "parts": {},
    }
    write_json(file, report)  # a file that cannot be written is known before the hour that follows
    chosen = [part for part in parts.PARTS if arguments.parts is None or part.name in arguments.parts]
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        run_parts(chosen, report, file, console, Path(folder), device)
        calibration = Path(folder, parts.CALIBRATION)
        if calibration.exists():
            with atomic_write(file.with_name(f"{file.stem}-calibration.json")) as copy:
                copy.write(calibration.read_bytes())
    print_summary(console, report, file)
    if failed(report):
        sys.exit(1)


def run_parts(
    chosen: list[parts.Part], report: dict, file: Path, console: Console, folder: Path, device: torch.device
) -> None:
    """Runs the parts one after the other, and writes the report after each."""
    begun, quick = time.monotonic(), report["quick"]
    for part in chosen:
        left = QUICK_SECONDS - (time.monotonic() - begun) if quick else math.inf
        missing, interrupted = part.missing(folder, quick), None
        if missing is not None:
            outcome = {"status": parts.NOT_RUN, "reason": missing}
        elif left < LEAST_SECONDS:
            outcome = {"status": parts.TIMED_OUT, "reason": f"the {QUICK_SECONDS} s of --quick were used up before it"}
        else:
            limit = min(part.quick_limit if quick else part.limit, left)
            with console.status(part.title) if console.is_terminal else contextlib.nullcontext():
                try:
                    outcome = parts.run(part, folder, quick=quick, limit=limit)
                except KeyboardInterrupt as stop:
                    (outcome,), interrupted = stop.args or ({"status": parts.INTERRUPTED, "reason": "at once"},), stop
        report["parts"][part.name] = outcome | {"gpu_after": gpu_state(device)}
        report["ended"] = now()
        write_json(file, report)
        print_part(console, part, outcome)
        if interrupted is not None:
            raise KeyboardInterrupt from interrupted


def failed(report: dict) -> list[str]:
    """The parts that did not pass, but for those that this machine has no tool for."""
    return [
        name for name, outcome in report["parts"].items() if outcome["status"] not in (parts.PASSED, parts.NOT_RUN)
    ]


def why_no_gpu() -> str | None:
    """Why PyTorch sees no GPU, in a few words; None where it sees one."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    if told:
        return " ".join(str(told[0].message).split())
    return "no NVIDIA driver answers"


def arch_of(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
