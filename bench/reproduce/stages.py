"""Runs stages, each in a process of its own and each once: what ended well is not run again.

Of each stage DIR/stages/NAME.json says how it ended and DIR/stages/NAME.txt what it printed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.reproduce.plan import Stage
from train.cli import UserError
from train.files import write_json

SECONDS_TO_STOP = 120
"""Given to an interrupted stage for its checkpoint."""
FOLDER = "stages"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a stage ended."""

    command: str
    """`Stage.typed`."""
    seconds: float
    reason: str | None
    """Why it failed, in one line; None where it did not."""


def outcome_of(stage: Stage, out: Path) -> Outcome | None:
    """None of a stage that never began, or whose command was another.

    Raises UserError where another command's training would be gone on with.
    """
    file = out / FOLDER / f"{stage.name}.json"
    try:
        outcome = Outcome(**json.loads(file.read_text()))
    except FileNotFoundError:
        outcome = None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it and what the stage wrote") from error
    if outcome is not None and outcome.command == stage.typed(out):
        return outcome
    if stage.has_begun:
        raise UserError(f"{stage.run_folder} holds a run of another command; delete it, or name another --out")
    return None


def run_all(
    stages: Sequence[Stage], out: Path, begin: Callable[[Stage], None], told: Callable[[Stage, str], None],
    end: Callable[[dict[str, Outcome], Stage, bool], None],
) -> dict[str, Outcome]:
    """Outcome of each stage by name. A failed stage fails those that need it; the next call tries it again.

    begin   called before a stage runs
    told    called with each line it prints
    end     called with the outcomes so far, the last one's stage, and whether it is an earlier call's
    """
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    before = {stage.name: outcome_of(stage, out) for stage in stages}
    outcomes: dict[str, Outcome] = {}
    for stage in stages:
        file, command, outcome = out / FOLDER / f"{stage.name}.json", stage.typed(out), before[stage.name]
        earlier = outcome is not None and outcome.reason is None
        if not earlier:
            lacking = [name for name in stage.needs if outcomes[name].reason is not None]
            if lacking:
                outcome = Outcome(command=command, seconds=0.0, reason=f"it needs {lacking[0]}, which failed")
            else:
                begin(stage)
                write_json(file, asdict(Outcome(command=command, seconds=0.0, reason="it was interrupted")))
                outcome = run(stage, out, lambda line, stage=stage: told(stage, line))
            write_json(file, asdict(outcome))
        outcomes[stage.name] = outcome
        end(outcomes, stage, earlier)
    return outcomes


def run(stage: Stage, out: Path, told: Callable[[str], None]) -> Outcome:
    """Raises KeyboardInterrupt after the stage has stopped as it does for Ctrl-C."""
    begun, lines, errors = time.monotonic(), [], []
    # A session of its own: Ctrl-C reaches it through us, once.
    with (
        open(out / FOLDER / f"{stage.name}.txt", "w", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, *stage.command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        def follow(stream, into: list[str]) -> None:
            for line in stream:
                log.write(line)
                log.flush()
                if line.strip():
                    into.append(line.strip())
                    told(line.strip())

        threads = [
            threading.Thread(target=follow, args=pair)
            for pair in ((process.stdout, lines), (process.stderr, errors))
        ]
        try:
            for thread in threads:
                thread.start()
            process.wait()
        except KeyboardInterrupt:
            stop(process)
            raise
        finally:
            for thread in threads:
                thread.join()
    seconds = round(time.monotonic() - begun, 1)
    return Outcome(command=stage.typed(out), seconds=seconds, reason=reason_of(process.returncode, lines, errors))


def stop(process: subprocess.Popen) -> None:
    """As by Ctrl-C; by force where that takes too long, or Ctrl-C comes again."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_STOP)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()


def reason_of(code: int, lines: Sequence[str], errors: Sequence[str]) -> str | None:
    """What a command that failed said last, or by which signal it was ended."""
    if code == 0:
        return None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    said = (errors or lines or [f"exit code {code}"])[-1]
    return said.partition(": error: ")[2] or said
