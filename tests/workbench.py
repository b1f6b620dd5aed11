"""Where command lines are tried: a folder of their own, watched, with little time and memory."""

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from commands import PICTURE, Command

SECONDS, BYTES = 60, 4 * 2**30
"""More than any command line may take before its work begins: on a busy machine, and beyond what is mapped already."""


def make_places(root: Path) -> None:
    """What PATHS names, under `root`: the folder that command lines are tried in."""
    for name in ("empty", "data/cat", "data/dog", "new\nline"):
        (root / name).mkdir(parents=True)
    for name in ("notes.txt", "broken.pt", "broken.json", "\udcffile"):
        (root / name).write_text("no JSON, and no checkpoint\n")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("gone")
    for folder in ("cat", "dog"):
        for i in range(5):
            (root / f"data/{folder}/{i}.png").write_bytes(PICTURE)


class TooLong(BaseException):
    pass


class Bench:
    """root/here, a copy of `template`, where command lines are tried; made anew wherever one has changed it.

    root/home is for what commands keep: decoded images are no leftovers.
    """

    def __init__(self, template: Path, root: Path):
        self.template, self.root, self.here = template, root, root / "here"
        self.codes: dict[object, int] = {}
        self.slowest = 0.0
        self._restore()

    def _restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.template, self.here, symlinks=True)
        (self.root / "home").mkdir()
        os.chdir(self.here)
        self.before = self._listing()

    def _listing(self) -> dict[str, tuple[int, int] | None]:
        """Files with their sizes and times, and folders, but for decoded images and the folders with nothing else."""
        found: dict[str, tuple[int, int] | None] = {}
        for folder, folders, files in os.walk(self.root, topdown=False):
            inside = [os.path.join(folder, name) for name in folders]
            states = {path: os.lstat(path) for name in files if (path := os.path.join(folder, name))}
            kept = [path for path in states if ".images" in path]
            found |= {path: (s.st_size, s.st_mtime_ns) for path, s in states.items() if path not in kept}
            if folder != str(self.root) and (len(states) > len(kept) or not kept or any(p in found for p in inside)):
                found[folder] = None
        return found

    def wrong(self, command: Command, line: Sequence[str]) -> str | None:
        """What is not as it must be when these arguments are typed; None if all is."""
        begun = time.perf_counter()
        with watched(self.root) as strays:
            code, err, problem = run(command, line)
        self.slowest = max(self.slowest, time.perf_counter() - begun)
        self.codes[code] = self.codes.get(code, 0) + 1
        after = self._listing()
        differing = {path for path in {**self.before, **after} if self.before.get(path, "") != after.get(path, "")}
        changed = sorted(path.removeprefix(str(self.root)) for path in differing)
        if changed:
            self._restore()
        if problem is None and strays:
            problem = f"it wrote outside its folder: {strays}"
        if problem is None and code == 2:
            told = re.fullmatch(rf"{command.name.split()[0]}( \w+)?: error: (.+)\n", err)
            if told is None or not told[2].isprintable():
                problem = f"this is no single line of its own: {err!r}"
            elif changed:
                problem = f"it was refused ({err.strip()}) and left {changed}"
        elif problem is None and (code != 0 or err):
            problem = f"exit code {code}, and on stderr {err!r}"
        return problem


def run(command: Command, line: Sequence[str]) -> tuple[object, str, str | None]:
    """(exit code, stderr, what broke)"""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code, problem = 0, None
    with (
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited(),
        warnings.catch_warnings(record=True) as told,
    ):  # fmt: skip
        warnings.simplefilter("always")
        try:
            command.main(list(line))
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        except TooLong:
            problem = f"it took more than {SECONDS} seconds"
        except Exception as error:  # noqa: BLE001 -- a bug, whichever it is
            problem = f"{type(error).__name__}: {str(error)[:300]}"
    err.flush()
    if told and problem is None:
        problem = f"a warning: {told[0].message}"
    return code, err.buffer.getvalue().decode(), problem


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """TooLong after SECONDS, and allocations of more than BYTES fail."""

    def stop(*_: object) -> None:
        raise TooLong

    usual, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, usual)


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_watch: SimpleNamespace = SimpleNamespace(root=None, strays=[], installed=False)


@contextlib.contextmanager
def watched(root: Path) -> Iterator[list[str]]:
    """What is written or removed outside `root` within the block, by the interpreter's own audit events."""
    if not _watch.installed:
        sys.addaudithook(_audit)
        _watch.installed = True
    _watch.root, _watch.strays = os.path.realpath(root), []
    try:
        yield _watch.strays
    finally:
        _watch.root = None


def _audit(event: str, arguments: tuple) -> None:
    if _watch.root is None or (event != "open" and event not in CHANGES):
        return
    path = arguments[0]
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    place = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else _watch.root
    inside = f"{place}/".startswith((f"{_watch.root}/", "/dev/", "/proc/"))
    if not inside and os.path.isdir(os.path.dirname(place)):
        _watch.strays.append(f"{event} {place}")
