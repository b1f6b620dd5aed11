"""Processes that die beside others, that meet in one folder, and threads that fail."""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from faults import (
    PHOTOS,
    SHORT_PLAN,
    SLOW_DECODING,
    STUCK,
    TINY,
    Command,
    Ended,
    Server,
    cache_bytes,
    decoding,
    leftovers,
    one_line,
    require_whole,
    trained_once,
)
from same_run import same_run

import train.batches


def until(condition, *commands: Command) -> None:
    deadline = time.monotonic() + STUCK
    while not condition():
        assert time.monotonic() < deadline, [command.said() for command in commands]
        time.sleep(0.002)


# ---------------------------------------------------------------- one of several that train as one

LOST = (
    "another process of this run ended or cannot be reached; "
    "go on with the same command and --resume DIR, from the run folder's last.pt"
)


def start_ranks(server: Server, folder: Path, setup: str = "") -> tuple[list[Command], dist.TCPStore]:
    """Two, as torchrun starts them; their store lives in this process, as torchrun's does in its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    ranks = [
        server.start(
            "train.run", *TINY, "--epochs", "4000", "--out", "run", folder=folder,
            setup=f"os.environ.update({shared | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}})\n{setup}",
        )
        for rank in range(2)
    ]  # fmt: skip
    until(lambda: "epoch 2/" in ranks[0].said()[0], *ranks)
    return ranks, store


def kill_one(server: Server, folder: Path, rank: int, seconds: float | None, setup: str = "") -> Ended:
    """SIGKILL for one rank, and for the other one torchrun's SIGTERM so much later, where it gets any."""
    ranks, _store = start_ranks(server, folder, setup)
    ranks[rank].send(signal.SIGKILL)
    if seconds is not None:
        time.sleep(seconds)
        ranks[1 - rank].send(signal.SIGTERM)
    assert ranks[rank].end().code == -signal.SIGKILL
    ended = ranks[1 - rank].end()
    assert ended.err == f"train.run: error: {LOST}\n"
    assert ended.code in (2, -signal.SIGTERM)  # which may come after the line, when all is done
    require_whole(folder)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_told_of_by_the_other(rank, server, tmp_path):
    ended = kill_one(server, tmp_path, rank, None)
    assert ended.code == 2


def delays(count: int) -> list[tuple[int, float]]:
    """(rank, seconds) before torchrun has seen the death: it looks ten times a second."""
    drawn = random.Random(5)
    return [(i % 2, round(drawn.choice([0.001, 0.01, 0.1]) * drawn.random(), 5)) for i in range(count)]


@pytest.mark.soak
@pytest.mark.parametrize(("rank", "seconds"), delays(24))
def test_torchruns_sigterm_meanwhile_takes_no_word_from_it(rank, seconds, server, tmp_path):
    kill_one(server, tmp_path, rank, seconds)


# Where a survivor is between its failure and its line; SIGTERM comes at the beginning of each function.
SIGTERM_AT = """
import signal, train.distributed, train.session
from train.display import Display

holder, name = {place}
usual = getattr(holder, name)

def struck(*arguments):
    setattr(holder, name, usual)
    signal.raise_signal(signal.SIGTERM)
    return usual(*arguments)

setattr(holder, name, struck)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["Display, '__exit__'", "train.distributed, 'is_lost_peer'", "train.distributed, 'tell_once'"]
)
def test_a_survivor_tells_wherever_torchruns_sigterm_finds_it(place, server, tmp_path):
    kill_one(server, tmp_path, 1, None, setup=SIGTERM_AT.format(place=place))


@pytest.mark.slow
def test_a_survivor_tells_without_waiting_for_the_lost_one(server, tmp_path):
    waiting = "import time, torch.distributed\ntorch.distributed.destroy_process_group = lambda: time.sleep(1000)"
    kill_one(server, tmp_path, 0, None, setup=waiting)


# ---------------------------------------------------------------- one folder, several processes


@pytest.fixture(scope="module")
def trained() -> Path:
    """The folder of a run that nothing disturbed."""
    return trained_once()[0]


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.soak) for i in range(1, 8))])
def test_of_trainings_begun_at_once_in_one_folder_one_trains(attempt, server, trained, tmp_path):
    commands = [server.start("train.run", *TINY, "--out", "run", folder=tmp_path) for _ in range(3)]
    ended = sorted((command.end() for command in commands), key=lambda one: one.code)
    assert [one.code for one in ended] == [0, 2, 2]
    for late in ended[1:]:
        assert "already holds a run" in one_line(late)
    same_run(trained, tmp_path / "run")
    assert not leftovers(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("attempt", range(6))
def test_of_resumptions_at_once_one_goes_on(attempt, server, trained, tmp_path):
    begun = server.start("train.run", *TINY, "--out", "run", folder=tmp_path)
    until(lambda: "epoch 2/" in begun.said()[0], begun)
    begun.send(signal.SIGINT)
    assert "stopped after step" in one_line(begun.end())
    commands = [server.start("train.run", "--resume", "run", folder=tmp_path) for _ in range(3)]
    ended = sorted((command.end() for command in commands), key=lambda one: one.code)
    assert [one.code for one in ended] == [0, 2, 2]
    for late in ended[1:]:
        assert one_line(late) == "another process is training in run"
    same_run(trained, tmp_path / "run")


# So many images decoded, the builder stands still while there is a file "hold": the others may come to wait for it
# later than it would take for all. Four fifths, the images to train on, have one cache, and so one builder.
HELD = """
decode = cache.read_square

def held(path, side):
    while os.path.exists("hold") and os.path.exists("log") and os.path.getsize("log") >= {decoded}:
        time.sleep(0.01)
    return decode(path, side)

cache.read_square = held
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, *(pytest.param(i / 8, marks=pytest.mark.soak) for i in range(7))])
def test_three_processes_and_the_death_of_one_make_one_cache(share, server, photos, cached, tmp_path):
    log, hold, decoded = tmp_path / "log", tmp_path / "hold", int(share * PHOTOS)
    hold.touch()
    setup = SLOW_DECODING + HELD.format(decoded=decoded)
    commands = [server.start(*decoding(photos, out), folder=tmp_path, setup=setup) for out in ("a", "b", "c")]
    until(lambda: log.exists() and log.stat().st_size >= decoded, *commands)
    until(lambda: sum("waiting for another process" in one.said()[0] for one in commands) == 2, *commands)
    (builder,) = [one for one in commands if "waiting for another process" not in one.said()[0]]
    builder.send(signal.SIGKILL)
    hold.unlink()
    ended = {one.pid: one.end() for one in commands}
    killed = ended.pop(builder.pid)
    assert killed.code == -signal.SIGKILL
    assert [one.code for one in ended.values()] == [0, 0], ended
    assert cache_bytes(tmp_path) == cached
    assert log.stat().st_size <= PHOTOS + os.cpu_count()


@pytest.mark.slow
def test_of_two_reproductions_in_one_folder_one_works(server, tmp_path):
    command = ("bench.reproduce.command", "--quick", "--device", "cpu", "--out", "out")
    first = server.start(*command, folder=tmp_path, setup=SHORT_PLAN)
    until(lambda: "stage 0 ..." in first.said()[0], first)
    assert one_line(server.run(*command, folder=tmp_path, setup=SHORT_PLAN)) == "another process is working in out"
    assert first.end().code == 0
    outcomes = [json.loads(file.read_text()) for file in (tmp_path / "out/stages").glob("*.json")]
    assert [outcome["reason"] for outcome in outcomes] == [None] * 5
    assert [file.read_text() for file in tmp_path.glob("done-*")] == ["."] * 5  # each stage ran once


# ---------------------------------------------------------------- the thread that gathers images


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(MemoryError("for a batch"), "not enough memory", marks=pytest.mark.slow),
        pytest.param(
            OSError(5, "Input/output error", "/data/cache.images"), "/data/cache.images: Input/output error",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["memory", "disk"],
)
def test_a_thread_that_fails_ends_the_training_in_one_line(error, told, train_run, tmp_path, monkeypatch):
    whole, calls = train.batches.gather_rows, itertools.count()

    def failing(*arguments, **options):
        if next(calls) == 5:
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(train.batches, "gather_rows", failing)
    code, _, err = train_run(*TINY, "--epochs", "3", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert told in err
    require_whole(tmp_path)
    monkeypatch.setattr(train.batches, "gather_rows", whole)
    assert train_run("--resume", tmp_path / "run")[0] == 0
    assert train_run(*TINY, "--epochs", "3", "--out", tmp_path / "whole")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "run")
