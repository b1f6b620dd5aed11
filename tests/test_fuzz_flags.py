"""Whatever is typed behind a command: it does its work, or says in one line why not and leaves nothing behind."""

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from command_lines import Lines, arguments_of, each_value
from commands import COMMANDS, Command, cut_short
from workbench import Bench, make_places

import train.run

LINES, MANY_LINES = 6, 100
"""Random command lines of each command, in `make test` and in `make soak`."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, one that has begun, and much that is no run."""
    root = tmp_path_factory.mktemp("typed") / "template"
    make_places(root)
    shared = ("simplenet", "--conv", "torch", "--device", "cpu", "--image-size", "8", "--limit-val", "10")
    train.run.main([*shared, "--epochs", "1", "--limit-train", "10", "--out", str(root / "run")])
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch)
        train.run.main([*shared, "--out", str(root / "begun")])
    return root


@pytest.fixture
def bench(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "bench"
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(root / "home"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # chosen by TMPDIR anew
    cut_short(monkeypatch)
    return Bench(template, root)


def expect_all_right(bench: Bench, command: Command, lines: Iterable[Sequence[str]]) -> None:
    found, count = [], 0
    for line in lines:
        count += 1
        problem = bench.wrong(command, line)
        if problem is not None:
            found.append(f"{command.name} {' '.join(map(repr, line))[:300]}\n    {problem}")
    sys.stdout.write(f"{count} command lines, exit codes {bench.codes}, slowest {bench.slowest:.1f} s\n")
    assert not found, f"{len(found)} of {count}:\n" + "\n".join(found)


each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


@each_command
def test_a_few_command_lines(command, bench):
    lines = Lines(command, seed=1)
    expect_all_right(bench, command, (lines.next() for _ in range(LINES)))
    assert bench.codes.get(2), "nothing was refused"


@each_command
def test_help_on_a_narrow_and_dumb_terminal(command, bench, monkeypatch):
    for name, value in {"COLUMNS": "20", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    expect_all_right(bench, command, [[*command.first, "--help"]])
    assert set(bench.codes) == {0}


@each_command
def test_two_dashes_are_no_value(command, bench):
    """argparse would take `--flag=--` for an empty list, whatever the flag's type."""
    flags = [a.option_strings[0] for a in arguments_of(command.parser)[1] if a.nargs is None]
    expect_all_right(bench, command, [[*command.first, f"{flag}=--"] for flag in flags])
    assert set(bench.codes) <= {2}


@pytest.mark.soak
@each_command
def test_many_command_lines(command, bench):
    lines = Lines(command, seed=2)
    expect_all_right(bench, command, (lines.next() for _ in range(MANY_LINES)))


@pytest.mark.soak
@each_command
def test_every_value_of_every_argument(command, bench):
    expect_all_right(bench, command, each_value(command))
