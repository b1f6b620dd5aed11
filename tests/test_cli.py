"""What all commands share: the one line of a mistake, and what becomes of output that cannot be written."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import arguments_of, right_values
from commands import COMMANDS

from train.cli import LARGEST, error_line, number, path

ROOT = Path(__file__).resolve().parent.parent

# A command that is started within a fraction of a second: it imports no torch.
COMMAND = """
import os, signal, sys, time
from train.cli import Parser, UserError, make_console, run_command

class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        1 + 1

class Late:
    def __del__(self):
        raise RuntimeError("late")

def command(arguments):
    if arguments.how == "write":
        sys.stdout.write(arguments.text)
    elif arguments.how == "kill":
        os.kill(os.getpid(), getattr(signal, arguments.text))
    elif arguments.how == "finalise":
        Interrupted()
        time.sleep(60)
    elif arguments.how == "fail at the end":
        Late()
    elif arguments.how == "print":
        make_console().print(arguments.text)
    else:
        raise UserError(f"no file {arguments.text}")

parser = Parser("python -m tiny", usage="tiny", description="Tell a text.")
parser.add_argument("how")
parser.add_argument("text")
run_command(parser, command, None)
"""
MUCH = 10_000 * "x"  # more than a buffer holds: the write itself fails
each_how = pytest.mark.parametrize(
    "arguments", [["--help"], ["write", "x"], ["write", MUCH], ["print", MUCH]], ids=["help", "write", "much", "print"]
)
ENCODINGS = ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})
each_encoding = pytest.mark.parametrize("variables", ENCODINGS, ids=["ascii", "C"])


def tiny(
    *arguments: str | bytes, stdout: int | None = subprocess.PIPE, stderr: int = subprocess.PIPE, **variables: str
) -> tuple[int, bytes, bytes]:
    """(exit code, stdout, stderr) of COMMAND as a process of its own; stdout None is a closed one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, env=environment | variables, stderr=stderr,
        stdout=stdout, preexec_fn=(lambda: os.close(1)) if stdout is None else None, timeout=60,
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


@each_how
def test_a_reader_that_has_gone_ends_a_command_in_silence(arguments):
    assert into_no_reader(*arguments) == (1, None, b"")


def test_a_reader_that_has_gone_does_so_without_a_buffer_too():
    assert into_no_reader("write", "x", PYTHONUNBUFFERED="1") == (1, None, b"")


def into_no_reader(*arguments: str, **variables: str) -> tuple[int, None, bytes]:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return tiny(*arguments, stdout=writing, **variables)
    finally:
        os.close(writing)


@each_how
def test_output_that_a_full_disk_refuses_is_told_in_one_line(arguments):
    with open("/dev/full", "wb") as full:
        code, _, told = tiny(*arguments, stdout=full.fileno())
    assert (code, told) == (2, b"tiny: error: stdout: No space left on device\n")


@pytest.mark.parametrize("arguments", [["open", "x"], ["too few"]], ids=["mistake", "usage"])
def test_where_stderr_is_full_the_exit_code_tells(arguments):
    with open("/dev/full", "wb") as full:
        assert tiny(*arguments, stderr=full.fileno())[0] == 2


def test_a_closed_stdout_takes_everything():
    assert tiny("write", "x", stdout=None) == (0, None, b"")


@each_encoding
def test_what_an_encoding_lacks_is_written_as_an_escape(variables):
    code, out, told = tiny("write", "caf\u00e9 \u00d7", **variables)
    assert (code, told) == (0, b"")
    assert out.startswith(b"caf\\")
    assert out.isascii()


def test_a_name_that_is_no_text_is_written_as_an_escape():
    assert tiny("print", b"name \xff", PYTHONIOENCODING="utf-8") == (0, b"name \\udcff\n", b"")


@each_encoding
def test_a_mistake_is_told_whatever_the_encoding(variables):
    code, out, told = tiny("fail", b"caf\xc3\xa9 \xff\n\x1b[31m", **variables)
    assert (code, out) == (2, b"")
    assert told.startswith(b"tiny: error: no file caf")
    assert told.endswith(b"\\udcff \\x1b[31m\n")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        pytest.param("a\r\n\tb", "a b", id="lines"),
        pytest.param("a\x1b[31mb\x07", r"a\x1b[31mb\x07", id="terminal-codes"),
        pytest.param("a\u202eb\u2066", r"a\u202eb\u2066", id="direction-of-writing"),
        pytest.param("\udcff", r"\udcff", id="no-text"),
        pytest.param("café 写真 – ×", "café 写真 – ×", id="letters-stay"),
    ],
)
def test_an_error_is_one_line_that_steers_no_terminal(message, shown):
    assert error_line("python -m tiny", message) == f"tiny: error: {shown}\n"


@pytest.mark.parametrize("kind", [int, float])
def test_numbers_that_no_tensor_holds_are_refused(kind):
    for text in ("1" + 60 * "0", "-1" + 60 * "0", 400 * "9", 5000 * "9"):
        with pytest.raises(argparse.ArgumentTypeError):
            number(kind)(text)
    assert number(kind)(str(LARGEST[kind])) == LARGEST[kind]


def test_an_empty_path_is_never_the_current_folder():
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        path("")
    taking = [
        (command.name, action.option_strings or action.dest, action.type)
        for command in COMMANDS
        for actions in arguments_of(command.parser)
        for action in actions
        if action.type is not None and "nowhere/x.json" in right_values(action)
    ]
    assert len(taking) > 25
    for name, flag, kind in taking:
        with pytest.raises(argparse.ArgumentTypeError):
            pytest.fail(f"{name} takes an empty {flag}: {kind('')!r}")


@pytest.mark.parametrize(
    "arguments", [("kill", "SIGINT"), ("kill", "SIGTERM"), ("kill", "SIGHUP"), ("finalise", "x")], ids="-".join
)
def test_a_request_to_stop_is_one_line(arguments):
    """Whatever the command is doing, a finaliser that drops exceptions too; a training ends its step first."""
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "tiny: error: interrupted\n")


def test_what_else_a_finaliser_raises_is_told_as_ever():
    code, out, told = tiny("fail at the end", "x")
    assert (code, out) == (0, b"")
    assert b"Exception ignored in" in told
    assert b"RuntimeError: late" in told
