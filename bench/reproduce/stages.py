"""Runs stages, each in a process of its own and each once: what ended well is not run again.

Of each stage DIR/stages/NAME.json says how it ended and DIR/stages/NAME.txt what it printed.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from bench.reproduce.plan import Stage
from train.cli import UserError
from train.files import write_json

SECONDS_TO_STOP = 120
"""Given to an interrupted stage for its checkpoint."""
SECONDS_TO_LOOK = 0.3
"""Between two looks at what a stage has printed."""
TAIL = 16384
"""Bytes of that: what it said last is among them."""
FOLDER = "stages"
INTERRUPTED = "it was interrupted"
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a stage ended."""

    command: str
    """`Stage.typed`."""
    seconds: float
    reason: str | None
    """Why it failed, in one line; None where it did not."""
    ended: str
    """When, by ISO 8601."""
    device: str
    commit: str | None
    """The lab's."""


def outcome_of(stage: Stage, out: Path) -> Outcome | None:
    """None of a stage that never began, whose command was another, or whose training is gone.

    Raises UserError where another command's training would be gone on with.
    """
    file = out / FOLDER / f"{stage.name}.json"
    try:
        outcome = Outcome(**json.loads(file.read_text()))
        float(outcome.seconds)
    except FileNotFoundError:
        outcome = None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it and what the stage wrote") from error
    same = outcome is not None and outcome.command == stage.typed
    if not same and stage.has_begun(out):
        folder = out / stage.run_folder
        raise UserError(f"{folder} holds a run of another command; move it away, or name another --out")
    is_gone = stage.run_folder is not None and not stage.has_begun(out)
    return outcome if same and not is_gone else None


def run_all(
    stages: Sequence[Stage], out: Path, place: Mapping[str, str | None], begin: Callable[[Stage], None],
    told: Callable[[Stage, str], None], end: Callable[[dict[str, Outcome], Stage, bool], None],
) -> dict[str, Outcome]:
    """Outcome of each stage by name. A failed stage fails those that need it; the next call tries it again.

    What reads the results of a stage that runs runs after it, though it was done before.

    place   device and commit of this call
    begin   called before a stage runs
    told    called with what it printed last, from time to time
    end     called with the outcomes so far, the last one's stage, and whether it is an earlier call's
    """
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    found = {stage.name: outcome_of(stage, out) for stage in stages}
    outcomes = {name: outcome for name, outcome in found.items() if outcome is not None}
    ran: set[str] = set()
    for stage in stages:
        outcome = outcomes.get(stage.name)
        earlier = outcome is not None and outcome.reason is None and ran.isdisjoint((*stage.needs, *stage.reads))
        if not earlier:
            ran.add(stage.name)
            lacking = [name for name in stage.needs if outcomes[name].reason is not None]

            def keep(seconds: float, reason: str | None, stage: Stage = stage) -> None:
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                kept = Outcome(command=stage.typed, seconds=seconds, reason=reason, ended=now, **place)
                outcomes[stage.name] = kept
                write_json(out / FOLDER / f"{stage.name}.json", asdict(kept))

            if lacking:
                keep(0.0, f"it needs {lacking[0]}, which failed")
            else:
                begin(stage)
                keep(0.0, INTERRUPTED)  # until it has ended
                keep(*run(stage, out, lambda line, stage=stage: told(stage, line)))
        end(outcomes, stage, earlier)
    return outcomes


def run(stage: Stage, out: Path, told: Callable[[str], None]) -> tuple[float, str | None]:
    """(seconds, why it failed). Raises KeyboardInterrupt after the stage has stopped as it does for Ctrl-C."""
    begun, file = time.monotonic(), out / FOLDER / f"{stage.name}.txt"
    process = None
    try:
        with open(file, "ab") as log, interrupts_held_back():
            start = log.tell()
            # A session of its own: Ctrl-C reaches it through us, once.
            process = subprocess.Popen(
                [sys.executable, *stage.command(out)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_begin_child, env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_LOOK)
            if lines := said(file, start):
                told(lines[-1])
    except KeyboardInterrupt:
        if process is not None:
            stop(process)
        raise
    return round(time.monotonic() - begun, 1), reason_of(process.returncode, said(file, start))


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """What would interrupt comes when the block has ended: while a process is made, Python loses the exception."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_child() -> None:
    """In the child: Linux interrupts it, as Ctrl-C does, should this process be killed; nothing is held back."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def stop(process: subprocess.Popen) -> None:
    """As by Ctrl-C; by force, with all it started, where that takes too long or Ctrl-C comes again."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_STOP)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(file: Path, start: int) -> list[str]:
    """The last lines that a stage printed, from byte `start` of its file on."""
    with open(file, "rb") as log:
        log.seek(max(start, os.fstat(log.fileno()).st_size - TAIL))
        text = log.read(TAIL).decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def reason_of(code: int, lines: Sequence[str]) -> str | None:
    """Why a command failed, in one line: its own error, its exception, what it said last, or the signal that ended it.

    None where it did not fail.
    """
    if code == 0:
        return None
    if code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    for line in reversed(lines):
        if match := re.match(r"[\w.]+: error: (.*)", line):
            return match[1]
    traces = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    if traces:
        exceptions = [line for line in lines[traces[-1] + 1 :] if not line.startswith(" ")]
        return (exceptions or lines)[0]
    return lines[-1] if lines else f"exit code {code}"
