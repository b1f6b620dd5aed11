"""Autotuning and its cache on disk, by a fake clock: what is timed, what is kept, and what is told."""

import gc
import json
import multiprocessing
import os
import warnings
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import assert_matches
from triton.runtime.errors import OutOfResources

from kernels import conv2d, runtime, tiles, tuning
from kernels.geometry import ConvGeometry
from kernels.tiles import Tile

H100 = runtime.Target("sm_90", 132)
FIRST, FASTEST, SLOWEST = (Tile(M=M, N=64, K=32) for M in (128, 64, 32))
SECONDS = {FIRST: 2e-3, FASTEST: 1e-3, SLOWEST: 3e-3}


class Bench:
    """A GPU that is not there: candidates, their times, and which of them were timed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds = dict(SECONDS)
        self.timed: list[Tile] = []
        self.capturing = False

    def measure(self, run, tile: Tile, device: torch.device) -> float:
        self.timed.append(tile)
        run(tile)
        seconds = self.seconds[tile]
        if isinstance(seconds, Exception):
            raise seconds
        return seconds

    def tile(self, op="forward", *, N=8, Ci=64, dtype=torch.float16, precision="ieee", device="cuda:0", run=None):
        """The tile that one launch takes."""
        geometry = ConvGeometry.of((N, Ci, 8, 8), (64, Ci, 3, 3), padding=1)
        operand = SimpleNamespace(dtype=dtype, device=torch.device(device))
        return tuning.tile(op, H100, geometry, operand, precision, run or (lambda tile: None))

    def file(self) -> Path:
        (file,) = self.folder.glob("*.json")
        return file

    def next_process(self) -> None:
        tuning.forget()
        self.timed.clear()


@pytest.fixture
def bench(monkeypatch, tmp_path) -> Bench:
    fake = Bench(tmp_path / "conv-lab" / "tuning")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_measure", fake.measure)
    monkeypatch.setattr(tuning, "_gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: fake.capturing)
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_warned", set())
    monkeypatch.setattr(tiles, "candidates", lambda *_: tuple(fake.seconds))
    return fake


@pytest.fixture
def on(bench):
    with tuning.enabled():
        yield bench


def test_off_by_default_the_first_candidate_is_taken_and_nothing_is_timed_or_written(bench):
    assert bench.tile() == FIRST
    assert bench.timed == []
    assert tuning.record() == ()
    assert not bench.folder.exists()


@pytest.mark.parametrize(("value", "tile"), [("1", FASTEST), ("0", FIRST), ("", FIRST)])
def test_an_environment_variable_switches_it_on(bench, monkeypatch, value, tile):
    monkeypatch.setenv(tuning.VARIABLE, value)
    assert bench.tile() == tile


def test_another_value_of_the_variable_is_refused_by_name(bench, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "yes")
    with pytest.raises(ValueError, match="CONV_LAB_AUTOTUNE must be 0 or 1, got 'yes'"):
        bench.tile()


def test_a_context_switches_it_on_and_off_again(bench):
    with tuning.enabled():
        assert bench.tile() == FASTEST
        with tuning.enabled():
            pass
        assert tuning.is_enabled()
    assert bench.tile() == FIRST


def test_each_candidate_runs_and_the_fastest_is_kept_for_the_process(on):
    ran = []
    assert on.tile(run=ran.append) == FASTEST
    assert ran == on.timed == [FIRST, FASTEST, SLOWEST]
    on.seconds[FIRST] = 0.0  # a later timing would choose otherwise
    assert on.tile(run=ran.append) == FASTEST
    assert len(ran) == 3
    (choice,) = tuning.record()
    assert (choice.tile, choice.origin) == (FASTEST, "timed")
    assert [(trial.tile, trial.seconds) for trial in choice.trials] == list(SECONDS.items())


def test_another_batch_size_is_the_same_key(on):
    on.tile(N=256)
    on.timed.clear()
    assert on.tile(N=7) == FASTEST
    assert on.timed == []
    (choice,) = tuning.record()
    assert "x 64x8x8, w 64x64x3x3, stride 1x1, padding 1x1, dilation 1x1, groups 1" in str(choice.key)


@pytest.mark.parametrize(
    "changed", [{"op": "input_grad"}, {"Ci": 32}, {"dtype": torch.float32}, {"precision": "tf32"}], ids=str
)
def test_whatever_else_a_launch_differs_by_is_another_key(on, changed):
    on.tile(**{"dtype": torch.float32} if "precision" in changed else {})
    on.timed.clear()
    on.tile(**{"dtype": torch.float32} | changed)
    assert len(on.timed) == 3
    assert len({str(choice.key) for choice in tuning.record()}) == 2


def test_the_next_process_reads_the_choice_and_times_nothing(on):
    on.tile()
    on.next_process()
    on.seconds = dict(reversed(SECONDS.items()))
    assert on.tile(N=3) == FASTEST
    assert on.timed == []
    (choice,) = tuning.record()
    assert choice.origin == "cached"
    assert [trial.seconds for trial in choice.trials] == list(SECONDS.values())


def test_a_cache_of_other_sources_or_another_gpu_is_stale(on, monkeypatch):
    on.tile()
    for name, value in (("_source_hash", lambda: "other"), ("_gpu_name", lambda device: "NVIDIA L4")):
        on.next_process()
        monkeypatch.setattr(tuning, name, value)
        on.tile()
        assert len(on.timed) == 3, name
    assert len(list(on.folder.glob("*.json"))) == 3


def test_the_hash_is_of_every_source_file_of_the_kernels(monkeypatch, tmp_path):
    for name in ("tiles.py", "forward.py"):
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    seen = {tuning._source_hash.__wrapped__()}
    for name in ("tiles.py", "forward.py", "new.py"):
        (tmp_path / name).write_text("two")
        seen.add(tuning._source_hash.__wrapped__())
    assert len(seen) == 4


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"choices": 3}', b'{"choices": {"a": {"tile": {"M": 1}}}}', b"\xff\xfe\x00"],
    ids=["empty", "cut-short", "a-list", "no-table", "half-an-entry", "no-text"],
)
def test_a_broken_file_is_one_warning_then_ignored_and_replaced(on, content):
    on.tile()
    file = on.file()
    file.write_bytes(content)
    on.next_process()
    with pytest.warns(UserWarning, match="ignored the cache file") as caught:
        assert [on.tile(), on.tile("input_grad")] == [FASTEST, FASTEST]
    assert len(caught) == 1
    assert str(file) in str(caught[0].message)
    assert "\n" not in str(caught[0].message)
    assert len(json.loads(file.read_text())["choices"]) == 2


@pytest.mark.parametrize("M", [7, 256, None, "64"])
def test_a_kept_tile_that_is_no_candidate_is_not_taken_and_is_replaced(on, M):
    on.tile()
    told = json.loads(on.file().read_text())
    (entry,) = told["choices"].values()
    entry["tile"]["M"] = M
    on.file().write_text(json.dumps(told))
    on.next_process()
    assert on.tile() == FASTEST
    assert len(on.timed) == 3
    on.next_process()
    assert on.tile() == FASTEST
    assert on.timed == []


def test_a_folder_that_cannot_be_written_is_one_warning(on, tmp_path):
    (tmp_path / "conv-lab").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot write") as caught:
        assert [on.tile(), on.tile("input_grad")] == [FASTEST, FASTEST]
    assert len(caught) == 1
    on.timed.clear()
    assert on.tile() == FASTEST
    assert on.timed == [], "a choice is kept for the process all the same"


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_half_written_file_takes_no_name(on, step, monkeypatch):
    on.tile()
    before = on.file().read_text()

    def full(path, *_):
        Path(path).touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"write": (Path, "write_text"), "rename": (os, "replace")}[step], full)
    with pytest.warns(UserWarning, match="No space left on device"):
        on.tile("input_grad")
    assert on.file().read_text() == before
    assert not list(on.folder.glob(".*.tmp"))


def test_another_folder_may_be_named(bench, tmp_path):
    with tuning.enabled(tmp_path / "here"):
        bench.tile()
    assert list((tmp_path / "here").glob("NVIDIA-H100-80GB-HBM3-triton-*.json"))
    assert not bench.folder.exists()


def test_a_candidate_that_fails_is_left_out_told_once_and_recorded(on):
    on.seconds[FASTEST] = OutOfResources(300_000, 232_448, "shared memory")
    with pytest.warns(UserWarning, match=r"left out tiles that do not run: Tile\(M=64.*shared memory") as caught:
        assert [on.tile(), on.tile()] == [FIRST, FIRST]
    assert len(caught) == 1
    (entry,) = json.loads(on.file().read_text())["choices"].values()
    assert [trial["seconds"] for trial in entry["trials"]] == [2e-3, None, 3e-3]
    assert "shared memory" in entry["trials"][1]["error"]
    assert entry["tile"] == asdict(FIRST)


def test_if_no_candidate_runs_the_first_ones_error_is_raised_and_nothing_kept(on):
    on.seconds = {tile: RuntimeError(f"{tile.M} rows fail") for tile in SECONDS}
    with pytest.raises(RuntimeError, match="128 rows fail") as caught:
        on.tile()
    assert "all 3 candidate tiles failed for forward, NVIDIA H100" in caught.value.__notes__[0]
    assert tuning.record() == ()
    assert not on.folder.exists()
    on.seconds = dict(SECONDS)
    assert on.tile() == FASTEST


def test_a_candidate_that_failed_keeps_no_memory_of_the_launch(on):
    on.seconds[FASTEST] = RuntimeError("fails")
    gc.collect()
    gc.disable()
    try:
        tensor = torch.empty(3)
        storage = weakref.ref(tensor)
        with pytest.warns(UserWarning, match="left out"):
            on.tile(run=lambda tile, tensor=tensor: None)
        on.seconds.clear()  # the fake's own hold of the error
        del tensor
        assert storage() is None
    finally:
        gc.enable()


def test_a_mistake_in_a_launcher_is_not_taken_for_a_tile_that_fails(on):
    on.seconds[SLOWEST] = TypeError("run() takes no tile")
    with pytest.raises(TypeError, match="takes no tile"):
        on.tile()


def test_one_candidate_is_not_timed(on):
    on.seconds = {FIRST: 1.0}
    assert on.tile() == FIRST
    assert on.timed == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_off_the_gpu_are_not_tuned_for(on, device):
    assert on.tile(device=device) == FIRST
    assert tuning.record() == ()


def test_while_pytorch_compiles_nothing_is_timed_or_settled(on, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert on.tile() == FIRST
    monkeypatch.undo()
    assert tuning.record() == ()


def test_a_graph_capture_times_nothing_and_keeps_what_it_took(on):
    on.capturing = True
    assert on.tile() == FIRST
    on.capturing = False
    assert on.tile() == FIRST, "the same launch would otherwise change its bits"
    assert on.timed == []
    assert tuning.record()[0].origin == "untimed: first met in a CUDA graph capture"
    assert not on.folder.exists()
    on.next_process()
    assert on.tile() == FASTEST
    on.next_process()
    on.capturing = True
    assert on.tile() == FASTEST, "the cache serves a capture too"


def test_a_process_that_was_slower_goes_by_what_the_other_wrote(on):
    on.tile()
    theirs = on.file().read_text()
    on.file().unlink()
    on.next_process()
    on.seconds[FIRST] = 0.0
    measure = on.measure

    def meanwhile(run, tile, device):
        file = tuning._cache_file(tuning.Key(
            op="", gpu="NVIDIA H100 80GB HBM3", arch="", dtype="", precision="", geometry=None
        ))  # fmt: skip
        file.write_text(theirs)
        return measure(run, tile, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_measure", meanwhile)
        assert on.tile() == FASTEST
    assert tuning.record()[0].origin == "cached"


def store_many(folder: str, start: int) -> None:
    """Of a process of its own: 20 choices of keys that are its own, and one that every process makes."""
    os.environ["XDG_CACHE_HOME"] = folder
    for channels in [*range(start, start + 20), 9999]:
        geometry = ConvGeometry.of((1, channels, 8, 8), (4, channels, 3, 3))
        key = tuning.Key(op="forward", gpu="G", arch="sm_90", dtype="float16", precision="ieee", geometry=geometry)
        choice = tuning.Choice(key=key, tile=Tile(M=start, N=16, K=16), origin="timed", trials=())
        tuning._store(tuning._cache_file(key), choice)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=store_many, args=(str(tmp_path), start)) for start in (100, 200, 300)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (file,) = (tmp_path / "conv-lab" / "tuning").glob("*.json")
    assert len(tuning._read(file)) == 61


def test_the_keys_of_compilation_ahead_and_interpretation_are_never_tuned(monkeypatch):
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("timed"))
    with tuning.enabled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runtime.compile_ahead("forward", (1, 64, 8, 8), (64, 64, 3, 3), arch="sm_90")


def test_each_launcher_runs_the_tile_that_tuning_names_and_may_be_run_again(monkeypatch):
    seen = []

    def tile(op, target, geometry, operand, precision, run):
        (only,) = tiles.candidates(op, target, geometry, operand.dtype, precision)
        run(replace(only, M=16))  # as tuning does, on the same tensors
        seen.append((op, operand.dtype))
        return replace(only, M=32)

    monkeypatch.setattr(tuning, "tile", tile)
    assert_matches(conv2d, (2, 20, 9, 7), (24, 20, 3, 3), torch.float64, padding=1)
    assert seen == [(op, torch.float64) for op in ("forward", "input_grad", "weight_grad")]
