"""The reproducing command: python -m bench.reproduce --quick"""

import argparse
import contextlib
import fcntl
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.conditions import conditions
from bench.reproduce.plan import QUICK_TRAIN, QUICK_VAL, Scope, Stage, make_plan
from bench.reproduce.report import write_report
from bench.reproduce.results import Results
from bench.reproduce.stages import FOLDER, Outcome, run_all
from train.cli import Parser, UserError, make_console, path, run_command
from train.data import FASHION_MINI, NAMED, load_data, require_classes, source
from train.devices import pick_device
from train.files import make_folder, write_json

DESCRIPTION = """\
Turn images into the course write-up's report, ours beside theirs: train all models with all convolutions, compare
them, account for their memory, look at what they look at, attack SimpleNet, train it adversarially. Each step is a
command of this lab, run in a process of its own, and named in the report. What is done is kept: the same command goes
on where it was interrupted, and tries again what failed.
"""

EXAMPLES = """
examples:
  python -m bench.reproduce --quick           embedded images, a quarter hour
  python -m bench.reproduce --data ~/miniplaces --out runs/report    for a GPU

--quick trains 3 epochs on 640 images at 32 px: it shows that everything works
and how the report looks; its accuracies are no reproduction. Without it the
write-up's recipe is followed, 60 to 90 epochs of each of twelve trainings. In
DIR: REPORT.md, REPORT.html (one file, pictures inside), runs/ and more/, and
stages/ with what each command printed.
Exit code 1: a step failed, and the report says which and why.
"""
SETTINGS, LOCK = "reproduce.json", ".reproduce.lock"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.reproduce",
        usage="python -m bench.reproduce [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--data", type=source, default=FASHION_MINI, metavar="fashion-mini|fashion-mnist|PATH",
        help="images to train on, as for train.run (default: the embedded ones)")
    add("--quick", action="store_true", help="cut everything down to a quarter hour on two cores")
    add("--out", type=path, metavar="DIR", help="where all goes (default: runs/reproduce, or runs/reproduce-quick)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where (default: auto, the GPU if any)")
    add("--weights", metavar="FILE|imagenet|none",
        help="what ResNet18 starts from (default: imagenet; with --quick: none)")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    """Exits 1 if a stage failed."""
    scope = scope_of(arguments)
    out = arguments.out or Path("runs", "reproduce-quick" if scope.quick else "reproduce")
    console = make_console()
    if scope.data not in NAMED and out.absolute().is_relative_to(scope.data):
        raise UserError(f"{out} would lie among the images of {scope.data}; take another --out")
    # Images that are missing or broken are known before the first of many trainings fails for it.
    limits = (QUICK_TRAIN, QUICK_VAL) if scope.quick and scope.data != FASHION_MINI else (None, None)
    train, _ = load_data(
        scope.data, scope.image_size, limit_train=limits[0], limit_val=limits[1], console=console
    )
    require_classes(train)
    if scope.device == "cpu" and not scope.quick:
        console.print("no GPU: the Triton kernels are interpreted, and whole recipes take weeks; see --quick")
    with claimed(out, scope):
        stages = make_plan(scope)
        place = conditions(torch.device("cuda", 0) if scope.device == "cuda" else torch.device("cpu"))

        def write(outcomes: dict[str, Outcome]) -> list[Path]:
            about = {"command": shown_command(), "ended": datetime.now().astimezone().isoformat(timespec="seconds")}
            return write_report(Results(out=out, scope=scope, outcomes=outcomes), stages, about | place)

        where = {name: place[name] for name in ("device", "commit")}
        outcomes = work(console, stages, out, where, write)
        files = write(outcomes)
    failed = [stage for stage in stages if outcomes[stage.name].reason is not None]
    for stage in failed:
        log = out / FOLDER / f"{stage.name}.txt"
        console.print(f"failed: {stage.title}: {outcomes[stage.name].reason} ({log})", soft_wrap=True, markup=False)
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True)
    if failed:
        sys.exit(1)


def scope_of(arguments: argparse.Namespace) -> Scope:
    """Raises UserError for weights that are not there."""
    weights = arguments.weights
    if weights is None:
        weights = "none" if arguments.quick else "imagenet"
    if weights not in ("imagenet", "none"):
        if not Path(weights).is_file():
            raise UserError(f"--weights {weights}: no such file")
        weights = str(Path(weights).absolute())
    return Scope(
        quick=arguments.quick, data=arguments.data, device=pick_device(arguments.device).type, weights=weights
    )


def shown_command() -> str:
    return shlex.join(["python", "-m", "bench.reproduce", *sys.argv[1:]])


@contextlib.contextmanager
def claimed(out: Path, scope: Scope) -> Iterator[None]:
    """While open, `out` is this process's, and of this scope alone.

    Raises UserError where another process works in it, it was made with other options, or it is some other folder.
    """
    file = out / SETTINGS
    if not file.exists() and out.is_dir() and any(not one.name.startswith(".") for one in out.iterdir()):
        raise UserError(f"{out} holds other files; name an empty or a new --out")
    make_folder(out)
    with open(out / LOCK, "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working in {out}") from None
        if not file.exists():
            write_json(file, asdict(scope))
        require_same(file, asdict(scope))
        yield


def require_same(file: Path, asked: dict[str, Any]) -> None:
    try:
        made = json.loads(file.read_text())
        differing = [f"--{name} {made[name]}" for name, value in asked.items() if made[name] != value]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged; name another --out") from error
    if differing:
        raise UserError(f"{file.parent} was begun with {', '.join(differing)}; name another --out")


@contextlib.contextmanager
def interrupted_by_hangup() -> Iterator[None]:
    """While open, a lost terminal interrupts as Ctrl-C does, but under nohup."""
    usual = signal.getsignal(signal.SIGHUP)
    if usual != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, usual)


def work(
    console: Console, stages: Sequence[Stage], out: Path, where: Mapping[str, str | None],
    write: Callable[[dict[str, Outcome]], object],
) -> dict[str, Outcome]:
    """Runs the stages, and after each one that ran `write`s what there is: days pass until the last.

    On a terminal a bar counts them, with what the running one says.
    """
    progress = Progress(
        MofNCompleteColumn(), BarColumn(bar_width=12), TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    width = max(20, console.width - 36)
    with progress, interrupted_by_hangup():
        task = progress.add_task("", total=len(stages))

        def begin(stage: Stage) -> None:
            progress.update(task, description=stage.title)
            if not console.is_terminal:
                console.print(f"{stage.title} ...", markup=False)

        def told(stage: Stage, line: str) -> None:
            progress.update(task, description=f"{stage.title}: {line.strip()}"[:width])

        def end(outcomes: dict[str, Outcome], stage: Stage, earlier: bool) -> None:
            progress.advance(task)
            outcome = outcomes[stage.name]
            if not earlier:
                write(outcomes)
            how = "done before" if earlier else f"{outcome.seconds:,.0f} s"
            how = how if outcome.reason is None else f"failed: {outcome.reason}"
            console.print(f"{stage.title:36} {how}", markup=False, soft_wrap=True)

        try:
            return run_all(stages, out, where, begin, told, end)
        except KeyboardInterrupt:
            raise UserError(f"interrupted; the same command goes on in {out}") from None
