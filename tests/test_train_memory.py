"""The memory of a training: what metrics.csv, summary.json and the closing table say of it.

A GPU is torch's functions faked, with NVML by a small library of our own; the training itself is on the CPU.
"""

import csv
import json
import mmap
import os
from types import SimpleNamespace

import pynvml
import pytest
import torch
from fake_nvml import SECOND, fake_fixture, libraries_fixture  # noqa: F401
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.loop
from train import report
from train.cli import StopRequest
from train.display import Display
from train.memory import COLUMNS, MemoryAccount, describe

MIB = 2**20
BUFFER = 200  # MiB
EMPTY = dict.fromkeys(COLUMNS, "")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def memory_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())["memory"]


def memory_cells(folder) -> list[dict[str, str]]:
    return [{name: row[name] for name in COLUMNS} for row in rows(folder / "metrics.csv")]


@pytest.fixture
def hold(monkeypatch):
    """hold(200): from now on each training holds so many MiB more during its steps; hold(0): none."""
    train_epoch = train.loop.Trainer.train_epoch

    def hold(mib: int) -> None:
        def holding(trainer, *arguments):
            # A mapping of its own: malloc may serve it from what earlier tests freed, and nothing would grow.
            with mmap.mmap(-1, max(mib, 1) * MIB) as buffer:
                torch.frombuffer(buffer, dtype=torch.uint8).fill_(1)
                train_epoch(trainer, *arguments)

        monkeypatch.setattr(train.loop.Trainer, "train_epoch", holding)

    return hold


# ---------------------------------------------------------------- on a CPU


def test_a_run_tells_its_resident_set(train_run, tiny_run, tmp_path):
    code, out, err = train_run(*tiny_run, "--out", "run")
    assert (code, err) == (0, "")
    epochs, memory = memory_cells(tmp_path / "run"), memory_of(tmp_path / "run")
    for row in epochs:
        assert (row["allocated_peak_mib"], row["reserved_peak_mib"]) == ("", "")
        assert 100 < float(row["memory_mean_mib"]) <= float(row["memory_peak_mib"])  # torch alone is more
    assert list(memory) == [
        "kind", "mib", "mean_mib", "peak_mib", "allocated_peak_mib", "reserved_peak_mib", "phases", "samples",
        "period_s", "notes",
    ]
    assert memory["kind"] == "mean resident set of the process (CPU)"
    assert memory["mib"] == memory["mean_mib"] <= memory["peak_mib"]
    assert (memory["allocated_peak_mib"], memory["reserved_peak_mib"]) == (None, None)
    assert list(memory["phases"]) == ["training steps", "validation", "saving"]
    peaks = [phase["peak_mib"] for phase in memory["phases"].values()]
    assert memory["peak_mib"] == max(peaks)
    assert max(float(row["memory_peak_mib"]) for row in epochs) == pytest.approx(max(peaks[:2]), abs=0.06)
    assert memory["samples"] >= 3 * 3
    assert (memory["period_s"], memory["notes"]) == (0.01, [])
    assert f"{memory['mean_mib']:,.0f} MiB mean, {memory['peak_mib']:,.0f} peak (resident set, CPU)" in out
    assert "memory is not followed" not in out


def test_what_a_training_holds_is_in_its_peak_and_gone_from_the_next(train_run, tiny_run, hold, tmp_path):
    """Three runs in one process, of which the second holds more, during the steps alone."""
    for name, mib in (("before", 0), ("holding", BUFFER), ("after", 0)):
        hold(mib)
        assert train_run(*tiny_run, "--out", name)[0] == 0
    before, holding, after = (memory_of(tmp_path / name) for name in ("before", "holding", "after"))
    assert holding["peak_mib"] - before["peak_mib"] == pytest.approx(BUFFER, abs=BUFFER / 4)
    steps, validation = (holding["phases"][name] for name in ("training steps", "validation"))
    assert steps["mean_mib"] > before["phases"]["training steps"]["peak_mib"] + BUFFER / 4
    assert validation["peak_mib"] < steps["peak_mib"] - BUFFER / 2
    assert validation["mean_mib"] < holding["mean_mib"] < steps["mean_mib"]
    assert after["peak_mib"] < holding["peak_mib"] - BUFFER / 2
    for row in memory_cells(tmp_path / "holding"):
        assert float(row["memory_peak_mib"]) > before["peak_mib"] + BUFFER / 2


def test_events_have_the_columns_that_have_values(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "run")[0] == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    told = [event.value for event in events.Scalars("epoch/memory_mean_mib")]
    assert told == pytest.approx([float(row["memory_mean_mib"]) for row in memory_cells(tmp_path / "run")], rel=1e-5)
    assert not [tag for tag in events.Tags()["scalars"] if "allocated" in tag or "reserved" in tag]


def test_a_machine_that_tells_nothing_is_one_line_and_stops_nobody(train_run, tiny_run, tmp_path, monkeypatch):
    def no_proc():
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr("train.memory.open_host", no_proc)
    code, out, err = train_run(*tiny_run, "--out", "run")
    assert (code, err) == (0, "")
    reason = "[Errno 2] No such file or directory: '/proc/meminfo'"
    assert out.count(f"memory is not followed: {reason}\n") == out.count("is not followed") == 1
    assert memory_cells(tmp_path / "run") == [EMPTY] * 3
    memory = memory_of(tmp_path / "run")
    assert (memory["mib"], memory["samples"], memory["notes"]) == (None, 0, [reason])
    assert "│ not known" in out


# ---------------------------------------------------------------- runs that go on


@pytest.fixture
def stopped(train_run, tiny_run, tmp_path, monkeypatch):
    """The folder of a run stopped after its sixth step, in the second of three epochs."""
    original = train.loop.Trainer.stop_if_asked
    with monkeypatch.context() as patch:
        patch.setattr(
            train.loop.Trainer, "stop_if_asked", lambda trainer, _stop: original(trainer, trainer.step == 6)
        )
        assert train_run(*tiny_run, "--out", "run")[0] == 2
    return tmp_path / "run"


def cut_columns(path, names) -> None:
    kept = [name for name in rows(path)[0] if name not in names]
    lines = [kept, *([row[name] for name in kept] for row in rows(path))]
    path.write_text("".join(",".join(line) + "\n" for line in lines))


def test_a_table_from_before_the_columns_goes_on_with_empty_cells(stopped, train_run):
    path = stopped / "metrics.csv"
    cut_columns(path, COLUMNS)
    before = path.read_text()
    assert before.splitlines()[0].endswith("data_wait_pct")
    assert train_run("--resume", "run")[0] == 0
    assert [row["epoch"] for row in rows(path)] == ["1", "2", "3"]
    assert path.read_text().splitlines()[1] == before.splitlines()[1] + ",,,,"
    first, *others = memory_cells(stopped)
    assert first == EMPTY
    assert all(float(row["memory_mean_mib"]) > 100 for row in others)


@pytest.mark.parametrize("names", [COLUMNS[:1], COLUMNS[1:], ["lr", *COLUMNS]], ids=" ".join)
def test_a_table_that_lacks_other_columns_is_damaged(names, stopped, train_run):
    cut_columns(stopped / "metrics.csv", names)
    code, _, err = train_run("--resume", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "run/metrics.csv is damaged" in err


def test_memory_is_of_the_part_since_the_run_was_resumed(stopped, train_run, hold):
    before = float(memory_cells(stopped)[0]["memory_peak_mib"])
    hold(BUFFER)
    assert train_run("--resume", "run")[0] == 0
    first, *others = (float(row["memory_peak_mib"]) for row in memory_cells(stopped))
    assert first == before
    memory = memory_of(stopped)
    assert memory["phases"]["training steps"]["peak_mib"] == pytest.approx(max(others), abs=0.06)
    assert memory["mean_mib"] > before


def test_where_no_epoch_was_left_memory_is_not_known(train_run, tiny_run, tmp_path):
    assert train_run(*tiny_run, "--out", "run")[0] == 0
    (tmp_path / "run/summary.json").unlink()
    code, out, _ = train_run("--resume", "run")
    assert code == 0
    memory = memory_of(tmp_path / "run")
    assert (memory["mib"], memory["peak_mib"], memory["phases"], memory["samples"]) == (None, None, {}, 0)
    assert "not known" in out


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu(monkeypatch, fake):
    """torch's part of a GPU: the second of NVML's two, with an allocator whose figures are set here, in MiB."""
    allocator = SimpleNamespace(allocated=0, reserved=0, fake=fake, calls=[])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid=SECOND[4:]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: allocator.calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: allocator.calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: allocator.allocated * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: allocator.reserved * MIB)
    return allocator


@pytest.fixture
def fit(make_trainer, gpu, monkeypatch, capsys):
    """fit(between) trains three epochs; between(epoch) is called before the steps of each. -> (folder, memory, out)"""

    def fit(between):
        trainer = make_trainer(epochs=3)
        trainer.memory = MemoryAccount(torch.device("cuda"))
        train_epoch = trainer.train_epoch
        monkeypatch.setattr(trainer, "train_epoch", lambda *args: (between(trainer.epoch), train_epoch(*args)))
        display = Display(Console(), epochs=3, train_images=12, val_images=8, batch_size=4)
        with display:
            trainer.fit(display, StopRequest())
        return trainer.folder, trainer.memory.summary(), capsys.readouterr().out

    return fit


def test_a_gpu_tells_the_processs_share_and_the_allocators_peaks(fit, gpu):
    gpu.fake.list_processes(dict(pid=1, used=900 * MIB), dict(pid=os.getpid(), used=3000 * MIB), device=1)

    def between(epoch: int) -> None:
        gpu.fake.set("1.compute.1.used", (3000, 3100, 3200)[epoch] * MIB)
        gpu.allocated, gpu.reserved = ((1400, 1600), (1523, 1880), (1500, 1700))[epoch]
        gpu.fake.await_samples()

    folder, memory, _ = fit(between)
    assert [list(map(float, row.values())) for row in memory_cells(folder)] == [
        [3000, 3000, 1400, 1600],
        [pytest.approx(3100, abs=20), 3100, 1523, 1880],  # a sample may still fall before the change
        [pytest.approx(3200, abs=20), 3200, 1500, 1700],
    ]
    assert gpu.calls == ["empty", "reset", "reset", "reset", "reset"]
    assert memory["kind"] == "mean GPU memory of the process (NVML)"
    assert 3000 < memory["mib"] == memory["mean_mib"] < memory["peak_mib"] == 3200
    assert (memory["allocated_peak_mib"], memory["reserved_peak_mib"]) == (1523, 1880)
    assert (memory["notes"], memory["samples"] >= 3 * 6) == ([], True)
    assert describe(memory | {"mean_mib": 3101.3, "peak_mib": 3113.0}) == (
        "3,101 MiB mean, 3,113 peak (NVML, this process)\nallocator's peaks: 1,523 MiB allocated, 1,880 reserved"
    )


def test_where_nvml_hides_processes_it_is_the_whole_devices_and_says_so(fit, gpu):
    gpu.fake.set("1.used", 5000 * MIB)
    folder, memory, out = fit(lambda _epoch: None)
    assert memory["kind"] == "mean GPU memory of the whole device (NVML)"
    assert memory["mib"] == memory["peak_mib"] == float(memory_cells(folder)[0]["memory_mean_mib"]) == 5000
    assert any("lists no process" in note for note in memory["notes"])
    assert describe(memory).startswith("5,000 MiB mean, 5,000 peak (NVML, whole device)\n")
    assert "not followed" not in out


def test_without_nvml_the_allocators_peaks_stay_and_the_reason_is_told_once(fit, gpu):
    gpu.fake.fail("nvmlInitWithFlags", code=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    gpu.allocated, gpu.reserved = 1523, 1880
    folder, memory, out = fit(lambda _epoch: None)
    assert out.count("memory is not followed: no NVML: Driver Not Loaded\n") == out.count("NVML") == 1
    assert memory_cells(folder) == [EMPTY | {"allocated_peak_mib": "1523", "reserved_peak_mib": "1880"}] * 3
    assert (memory["kind"], memory["mib"]) == ("peak of PyTorch's allocated GPU memory", 1523)
    assert (memory["mean_mib"], memory["peak_mib"], memory["samples"]) == (None, None, 0)
    assert memory["notes"] == ["no NVML: Driver Not Loaded"]
    assert describe(memory) == "allocator's peaks: 1,523 MiB allocated, 1,880 reserved"


def test_a_gpu_lost_on_the_way_is_told_and_stops_nobody(fit, gpu):
    gpu.fake.list_processes(dict(pid=os.getpid(), used=3000 * MIB), device=1)

    def between(epoch: int) -> None:
        if epoch == 1:
            gpu.fake.fail("nvmlDeviceGetMemoryInfo_v2", code=pynvml.NVML_ERROR_GPU_IS_LOST)

    folder, memory, _ = fit(between)
    first, _, third = memory_cells(folder)
    assert (first["memory_mean_mib"], third["memory_mean_mib"]) == ("3000", "")
    assert memory["mib"] == 3000
    (note,) = memory["notes"]
    assert note.startswith("GPU is lost (")


# ---------------------------------------------------------------- the closing table


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        pytest.param({"kind": "peak of some counter", "mib": 3001.2}, ["3,001 MiB, peak of some counter"], id="old"),
        pytest.param(
            {
                "kind": "mean GPU memory of the process (NVML)", "mib": 131_010.0, "mean_mib": 131_010.0,
                "peak_mib": 131_072.0, "allocated_peak_mib": 101_523.0, "reserved_peak_mib": 101_880.0,
            },
            [
                "131,010 MiB mean, 131,072 peak (NVML, this process)",
                "allocator's peaks: 101,523 MiB allocated, 101,880 reserved",
            ],
            id="large",
        ),
    ],
)
def test_the_closing_table_has_a_short_line_a_counter(memory, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    summary = dict(
        model="simplenet", conv="torch", backend="native", device="NVIDIA H200", classes=10, val_top1=50.0,
        val_top5=90.0, best_val_top1=50.0, best_epoch=1, images_per_s=1000.0, memory=memory,
    )
    report.print_summary(Console(), summary, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for word in words:
        assert any(f"│ {word} " in line for line in lines), word
