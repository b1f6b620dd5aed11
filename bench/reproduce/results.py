"""What the stages left behind, read back; what is missing says why."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.reproduce.plan import MODERN, MORE, PRETRAIN, RUNS, Scope
from bench.reproduce.stages import Outcome
from train.cli import UserError
from train.runs import Run, read_run


class Missing(Exception):
    """There is no such figure; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Of one folder."""

    out: Path
    scope: Scope
    outcomes: dict[str, Outcome]
    """By stage."""

    def require(self, stage: str) -> None:
        """Raises Missing unless the stage ended well."""
        outcome = self.outcomes.get(stage)
        if outcome is None:
            raise Missing("it has not run yet")
        if outcome.reason is not None:
            raise Missing(outcome.reason)

    def json(self, stage: str, name: str, *, even_failed: bool = False) -> dict[str, Any]:
        """The stage's file `name`, which lies in `out`. Raises Missing.

        even_failed     also of a stage that ran and failed, whose file says by what
        """
        if not (even_failed and stage in self.outcomes and (self.out / name).exists()):
            self.require(stage)
        try:
            return json.loads((self.out / name).read_text())
        except (OSError, ValueError) as error:
            raise Missing(f"{name} cannot be read ({error})") from error

    def run(self, stage: str) -> Run:
        """Of a training. Raises Missing."""
        self.require(stage)
        try:
            found = read_run(self.out / (MORE if stage in (MODERN, PRETRAIN) else RUNS) / stage)
        except UserError as error:
            raise Missing(str(error)) from error
        if found.summary is None:
            raise Missing("it is not finished")
        return found

    def figure(self, stage: str, name: str, caption: str) -> str:
        """Markdown of a picture in `out`, or of why there is none."""
        try:
            self.require(stage)
            if not (self.out / name).is_file():
                raise Missing(f"{name} is gone")
        except Missing as reason:
            return f"**{caption}** not available: {reason}"
        return f"![{caption}]({name})\n\n*{caption}*"


def cell(figure: Callable[[], str]) -> str:
    """What a table shows: the figure, or why there is none."""
    try:
        return figure()
    except Missing as reason:
        return f"not available: {reason}"
