"""Commands of the lab run where a fault can reach them: forked from one warm process, on small disks of their own."""

import atexit
import contextlib
import csv
import functools
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train import cache

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 10  # for a process that a signal has reached
STUCK = 120  # seconds that nothing here takes

# A training of eight epochs of two steps, and its checkpoint after each epoch.
TINY = (
    "simplenet", "--conv", "torch", "--device", "cpu", "--epochs", "8", "--batch-size", "8", "--limit-train", "16",
    "--limit-val", "10",
)  # fmt: skip

# Imports once what takes seconds, then forks a process for each command, which begins and ends as `python -m` does.
# A line {"module", "arguments", "folder", "setup"} starts one, {"wait": pid} answers how one ended.
SERVER = """
import contextlib, gc, importlib, json, os, signal, sys, tempfile
import torch
import attacks.run.command, bench.memory.command, bench.report_card.command, bench.reproduce.command, train.run
from train.startup import quit_on_interrupt

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
    train.run.main([*sys.argv[1:], "--out", folder + "/run"])  # what is loaded late is loaded too
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        _, status, used = os.wait4(asked["wait"], 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.environ["FAULTS_COMMAND"] = str(os.getpid())  # what it starts is known by it
        for number, name in enumerate(("/dev/null", asked["out"], asked["err"])):
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        os.chdir(asked["folder"])
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        quit_on_interrupt(asked["module"].removesuffix(".command"))
        exec(asked["setup"])
        importlib.import_module(asked["module"]).main(asked["arguments"])
        sys.exit()
    print(pid, flush=True)
"""

PHOTOS = 300
# Of the command that is struck, so that decoding takes a while; each image decoded is a byte of the log.
SLOW_DECODING = """
import os, time
from train import cache, folder

def read_square(path, side):
    time.sleep(0.002)
    log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, b".")
    os.close(log)
    return folder.read_square(path, side)

cache.read_square = read_square
"""
# Of the sweep: attacks of at most two steps, and no checks, which write nothing and take most of the time.
SHORT_SWEEP = """
from dataclasses import replace
from attacks.run import sweep
from attacks.run.hygiene import Examination

whole_sweep, whole_pgd = sweep.sweep, sweep.pgd
sweep.sweep = lambda *a, settings: whole_sweep(
    *a, settings=[replace(setting, num_steps=min(2, setting.num_steps)) for setting in settings]
)
sweep.pgd = lambda *a, num_steps, **k: whole_pgd(*a, num_steps=min(2, num_steps), **k)
sweep.examine = lambda *a, **k: Examination(images=0, epsilon=0.1, curve=[], others={}, checks=[])
"""
# Of the reproduction: a plan of five stages by Python's own timeit, each of which leaves a byte in a file.
SHORT_PLAN = """
import bench.reproduce.command as command
from bench.reproduce.plan import Stage

def plan(scope):
    code = "import time; time.sleep(0.1); open('done-{}', 'a').write('.')"
    return [
        Stage(name=f"s{i}", title=f"stage {i}", module="timeit", arguments=("-n1", "-r1", code.format(i)))
        for i in range(5)
    ]

command.make_plan = plan
"""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float
    """Of the processor, those of its children included."""


@dataclass
class Command:
    """One that is running; `log` is where its output goes."""

    server: "Server"
    pid: int
    log: Path

    def send(self, signum: int) -> None:
        """Nothing to a process that has ended already."""
        os.kill(self.pid, signum)  # the server has not waited for it: the pid is still its own

    def end(self, seconds: float = STUCK) -> Ended:
        """Waits for its end, which must come within so many seconds, and for that of all it started."""
        try:
            code, used = self.server.ask({"wait": self.pid}, seconds)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            pytest.fail(f"still running after {seconds} s: {self.said()}")
        ended = Ended(int(code), *self.said(), float(used))
        deadline = time.monotonic() + SECONDS_TO_END
        while left := started_by(self.pid):
            assert time.monotonic() < deadline, f"it left processes behind: {left}"
            time.sleep(0.05)
        return ended

    def seconds(self) -> float:
        """Of the processor, so far; infinitely many of one that has ended."""
        state, *fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return math.inf if state == "Z" else sum(map(int, fields[10:12])) / os.sysconf("SC_CLK_TCK")

    def said(self) -> tuple[str, str]:
        return tuple(self.log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))


class Server:
    """The warm process."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *TINY], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip

    def start(self, module: str, *arguments: object, folder: Path, setup: str = "", out: str | None = None) -> Command:
        """`setup` is Python that runs before the command; `out` is where its stdout goes instead of a log."""
        self.count += 1
        log = self.folder / str(self.count)
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()
        (pid,) = self.ask({
            "module": module, "arguments": [str(one) for one in arguments], "folder": str(folder), "setup": setup,
            "out": out or str(log.with_suffix(".out")), "err": str(log.with_suffix(".err")),
        }, STUCK)  # fmt: skip
        return Command(self, int(pid), log)

    def run(self, module: str, *arguments: object, folder: Path, setup: str = "", out: str | None = None) -> Ended:
        return self.start(module, *arguments, folder=folder, setup=setup, out=out).end()

    def ask(self, question: dict, seconds: float) -> list[str]:
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return self.process.stdout.readline().decode().split()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(STUCK)


def run_whole(server: Server, *command: object, **options: object) -> Ended:
    """One that nothing disturbs."""
    ended = server.run(*command, **options)
    assert ended.code == 0, ended.err
    return ended


@functools.cache
def warm_server() -> Server:
    """One for all tests of this process; importing PyTorch takes seconds."""
    folder = tempfile.TemporaryDirectory()
    server = Server(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


@functools.cache
def trained_once() -> tuple[Path, float]:
    """(the folder of a TINY training that nothing disturbed, the processor's seconds it took)"""
    server = warm_server()
    ended = run_whole(server, "train.run", *TINY, "--out", "trained", folder=server.folder)
    return server.folder / "trained", ended.seconds


def started_by(pid: int) -> list[str]:
    """The command lines of the processes that a command started and that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FAULTS_COMMAND={pid}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


# ---------------------------------------------------------------- signals

POLITE = {"SIGINT": [signal.SIGINT], "SIGTERM": [signal.SIGTERM], "SIGHUP": [signal.SIGHUP]}
SIGNALS = {"SIGKILL": [signal.SIGKILL], **POLITE, "SIGINT-twice": [signal.SIGINT] * 2}


def moments(count: int, seed: int) -> list[tuple[str, float, float]]:
    """(name of SIGNALS, share of a command's work after which it is sent, seconds to the second one)."""
    drawn = random.Random(seed)
    names = [name for _ in range(count) for name in SIGNALS][:count]
    return [(name, round(drawn.random(), 3), round(0.05 * drawn.random(), 4)) for name in names]


def strike(command: Command, name: str, between: float, when: Callable[[], bool]) -> Ended:
    """Sends the signals, the first of them once it is time; the command must then end soon.

    And as it should: by SIGKILL at once, otherwise well, if the signal came too late, or with one line and exit code 2.
    In the instants before the command's own handlers are there and after they are gone, and of a lost terminal for as
    long as nothing is trained, a signal has its usual effect, in silence.
    """
    deadline = time.monotonic() + STUCK
    while not when():
        assert time.monotonic() < deadline, command.said()
        time.sleep(0.002)
    for number, signum in enumerate(SIGNALS[name]):
        time.sleep(between if number else 0)
        command.send(signum)
    ended = command.end(SECONDS_TO_END)
    if ended.code in (0, -signum):
        told = name == "SIGINT-twice" and ended.code  # of the first; the second came as the process was ending
        assert not ended.err or (told and ended.err.count("\n") == 1 and "error: interrupted" in ended.err), ended
    elif name == "SIGINT-twice" and ended.err.count("\n") == 2:  # the second came after the first had been told of
        assert (ended.code, len({line.partition(": error: ")[0] for line in ended.err.splitlines()})) == (2, 1), ended
    else:
        assert name != "SIGKILL", ended
        one_line(ended)
    return ended


# ---------------------------------------------------------------- what lies on the disk


def require_whole(folder: Path) -> None:
    """Every file under its own name in `folder` can be read to its end; hidden ones and *.part are not final names."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            text = path.read_text()
            rows = list(csv.reader(text.splitlines()))
            assert text.endswith("\n"), path
            assert {len(row) for row in rows} == {len(rows[0])}, path
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".images":
            side = int(path.name.split("px-")[0].rpartition("-")[2])
            with open(path, "rb") as file:
                assert len(cache.read_rows(file.fileno(), side)), path


def make_photos(folder: Path) -> Path:
    """PHOTOS of them in two classes."""
    noise = np.random.default_rng(0)
    for i in range(PHOTOS):
        path = folder / ("cat", "dog")[i % 2] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def decoding(photos: Path, out: str = "run") -> tuple[str, ...]:
    """The command that caches them in `cache` and trains in `out` for a moment."""
    return (
        "train.run", *TINY[:5], "--epochs", "1", "--batch-size", "100", "--image-size", "16", "--data", str(photos),
        "--cache", "cache", "--out", out,
    )  # fmt: skip


def cache_bytes(folder: Path) -> dict[str, bytes]:
    """Of the training and of the validation images."""
    assert not list((folder / "cache").glob("*.part"))
    files = {file.name: file.read_bytes() for file in (folder / "cache").glob("*.images")}
    assert len(files) == 2
    return files


def leftovers(folder: Path) -> list[str]:
    """Temporary files."""
    return [path.name for path in folder.rglob(".*.tmp*")]


def one_line(ended: Ended) -> str:
    """What a command that could not go on told: one line, with exit code 2."""
    assert (ended.code, ended.err.count("\n")) == (2, 1), (ended.code, ended.err)
    command, _, told = ended.err.rstrip("\n").partition(": error: ")
    assert told, ended.err
    assert " " not in command, ended.err
    return told


class Disk:
    """A tmpfs of a few megabytes at `path`, filled up at will."""

    def __init__(self, path: Path):
        self.path, self.ballast = path, path / "ballast"

    def leave(self, kib: int) -> None:
        """So much is free from now on, in whole pages; until now all of it was."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - kib * 1024)

    def free(self) -> None:
        self.ballast.unlink()

    def read_only(self) -> None:
        mount("-o", "remount,ro", str(self.path))

    def writable(self) -> None:
        mount("-o", "remount,rw", str(self.path))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def small_disk(path: Path, mib: int) -> Iterator[Disk]:
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={mib}m", "none", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk to fill: mounting a tmpfs takes root ({error})")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
