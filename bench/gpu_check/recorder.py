"""A pytest plugin: a line of JSON for each test as it ends, so that a run that is stopped half way leaves the others.

    python -m pytest -p bench.gpu_check.recorder --lines FILE
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, required=True, metavar="FILE", help="where each outcome becomes a line")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist report to the process that started them
        config.pluginmanager.register(Recorder(config.getoption("--lines")))


class Recorder:
    def __init__(self, file: Path):
        self.file = file
        self.file.touch()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # a set-up that failed or skipped has no call
            self.note(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note(report.nodeid or "collection", report)

    def note(self, test: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        row = {"test": test, "outcome": report.outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
        if not report.passed:
            row["why"] = why(report)
        with open(self.file, "a") as lines:
            lines.write(json.dumps(row) + "\n")


def why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip, or the message of a failure, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)[-300:]
    return " ".join(text.split())[:300]
