"""What every command of the lab shares: mistakes are told in one line, with exit code 2 and no traceback."""

import argparse
import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rich.console import Console


class UserError(Exception):
    """Something its user can put right; the message is the one line that says what."""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line instead of a page of usage.

    `prog` is how the command is typed, as in "python -m train.run"; errors begin "train.run: error:". The description
    is filled to the terminal, `epilog` (examples) keeps its lines, and a flag is typed whole.
    """

    def __init__(self, prog: str, *, usage: str, description: str, epilog: str | None = None, **options: Any):
        super().__init__(
            prog=prog,
            usage=usage,
            description=textwrap.fill(description, max(40, shutil.get_terminal_size().columns - 2)),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # argparse takes it for a value that is an empty list
                self.error(f"argument {word.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        # Of several processes that torchrun starts with the same arguments one tells, and once.
        told = os.environ.get("RANK", "0") != "0" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self.exit(2, None if told else error_line(self.prog, message))


def error_line(prog: str, message: str) -> str:
    """One line, whatever `message` holds: what would steer a terminal, or is no text, is shown as an escape."""
    return f"{prog.removeprefix('python -m ')}: error: {printable(' '.join(message.split()))}\n"


def printable(text: str) -> str:
    """What steers a terminal, ends a line or is no text in UTF-8 as escapes; all other scripts as they are."""
    return "".join(char.encode("unicode_escape").decode() if steers(char) else char for char in text)


TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Classes of characters that turn the direction of writing: Unicode Standard Annex 9, section 2."""


def steers(char: str) -> bool:
    """Whether it is a control, a line's end, a surrogate, or turns what comes after it."""
    return unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} or unicodedata.bidirectional(char) in TURNS


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None], argv: list[str] | None):
    """Parses `argv`, calls `main`, and exits 2 with one line on stderr for what a user can cause.

    That is UserError, OSError (missing files, full disks), Ctrl-C and a lost terminal; anything else is a bug and keeps
    its traceback. Where whoever read stdout has gone, as in `| head`, it exits 1 in silence.
    """
    prepare_streams()
    usual, unraisable = usual_handlers(), sys.unraisablehook
    for signum in usual:
        signal.signal(signum, signal.default_int_handler)  # SIGTERM is as polite a request as Ctrl-C
    sys.unraisablehook = functools.partial(interrupt_again, unraisable)
    try:
        code, message = ending_of(lambda: main(parser.parse_args(argv)))
        # Before signals may end the process again. Where stderr is full or gone, the exit code is left to tell.
        flush(sys.stderr, "" if message is None else error_line(parser.prog, message))
    finally:
        sys.unraisablehook = unraisable
        for signum, handler in usual.items():
            signal.signal(signum, handler)
    if code is not None:
        sys.exit(code)


def interrupt_again(usual: Callable[[Any], None], dropped: Any) -> None:
    """Of an interrupt that came inside a finaliser or a weak reference's callback: Python would print and drop it.

    `usual` is told of everything else.
    """
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()  # when that callback has ended
    else:
        usual(dropped)


def prepare_streams() -> None:
    """Every character can be written: a file's name need not be text, and a locale may lack what tables are made of."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the process, as `>&-` does
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def ending_of(work: Callable[[], None]) -> tuple[Any, str | None]:
    """Calls `work` and writes stdout out; the exit code, None where all is well, and what the user is told."""
    nameless = False
    try:
        message = message_of(work)
        code = None if message is None else 2
    except SystemExit as stop:
        code, message = stop.code, None
    except OSError as error:
        nameless, code, message = True, 2, str(error)
    lost = flush(sys.stdout, "\n" if nameless else "")  # a stdout that failed once, and not in flush, fails again
    if lost is None or (message is not None and not nameless):
        return code, message
    return (1, None) if isinstance(lost, BrokenPipeError) else (2, f"stdout: {lost.strerror}")


def flush(stream: TextIO, more: str) -> OSError | None:
    """Why what `stream` still held, and `more`, is lost, if it is: at its end the interpreter would exit 120 for it."""
    try:
        stream.write(more)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def message_of(work: Callable[[], None]) -> str | None:
    """Calls `work`; what its user is told where that failed by something they can cause, else None.

    Raises OSError where it names no file: it may be stdout's.
    """
    try:
        work()
    except UserError as error:
        return str(error)
    except OSError as error:
        if not error.filename:
            raise
        return f"{error.filename}: {error.strerror}"
    except MemoryError as error:
        return f"not enough memory {error}"
    except KeyboardInterrupt:
        return "interrupted"
    return None


LARGEST = {int: 2**63 - 1, float: 3.4e38}
"""What int64 and float32, the numbers of tensors, can hold."""


def number(
    kind: type, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> Callable[[str], Any]:
    """An argparse type: an int or float within its bounds and LARGEST, NaN excluded."""

    def parse(text: str):
        noun = "a whole number" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        if not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
        if abs(value) > LARGEST[kind]:
            raise argparse.ArgumentTypeError(f"{text} is beyond the largest number, {LARGEST[kind]:g}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} must be above {above}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} must be at most {most}")
        return value

    return parse


def path(text: str) -> Path:
    """An argparse type: a path, with ~ as the shell has it; an empty one is a variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # a user whose home is not known
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def make_console(*, quiet: bool = False) -> Console:
    """A console that prints what it is given: paths hold brackets and colons, which are markup to rich."""
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False)


def usual_handlers() -> dict[signal.Signals, Any]:
    """What happens now at each signal that asks to stop."""
    usual = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if usual[signal.SIGHUP] == signal.SIG_IGN:  # under nohup a lost terminal is no request
        del usual[signal.SIGHUP]
    return usual


class StopRequest:
    """True once SIGINT (Ctrl-C), SIGTERM or SIGHUP (a lost terminal) has asked the process to stop."""

    def __init__(self):
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextlib.contextmanager
def stop_on_signal(*, patient: bool = False) -> Iterator[StopRequest]:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP only sets the request; a second one has its usual effect.

    A `patient` block takes any number of them for the same request: torchrun sends its own after the terminal's.
    """
    request = StopRequest()
    usual = usual_handlers()

    def restore():
        for signum, handler in usual.items():
            signal.signal(signum, handler)

    def ask(_signum, _frame):
        request.asked = True
        if patient:
            return
        restore()
        if sys.stderr.isatty():
            sys.stderr.write("\nfinishing this step, then saving; Ctrl-C again to quit without saving\n")

    for signum in usual:
        signal.signal(signum, ask)
    try:
        yield request
    finally:
        restore()
