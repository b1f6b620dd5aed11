"""Run folders whose files have rotted or were edited: one line from every command, and nothing in them changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from attacks.run import kept
from attacks.run.figures import save_figure
from train import checkpoint, compare, run_folder
from train.cli import UserError
from train.loop import Trainer
from train.records import Records

TEXT_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "no-text": lambda raw: raw[:20] + b"\xff\xfe" + raw[20:],
    "utf-16": lambda raw: raw.decode().encode("utf-16"),
    "zero-bytes": lambda raw: raw[:30] + bytes(9) + raw[30:],
    "list": lambda raw: b"[1, 2]",
    "number": lambda raw: b"5",
    "null": lambda raw: b"null",
    "deep": lambda raw: b"[" * 200_000,
    "digits": lambda raw: b'{"seed": ' + b"9" * 5000 + b"}",
}


def values(**changes: object) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps(json.loads(raw) | changes).encode()


CONFIG_DAMAGE = TEXT_DAMAGE | {
    f"{name}={value!r}": values(**{name: value})
    for name, wrong in {
        "image_size": ["32", -1, 10**9, float("nan")], "epochs": ["2", 0], "conv": [{}, 3, None],
        "data": [5, None], "device": [5], "seed": [-1, "0", 10**30], "lr": ["x", None, float("inf")],
        "batch_size": [0, 1.5], "cache": [5], "limit_val": [0, "x"],
        "recipe": [None, "\x1b[31mwri", "wri\x07", "a\u202eb", "\ud800"], "model": [5, "\x1b[2J"],
    }.items()
    for value in wrong
}  # fmt: skip
SUMMARY_DAMAGE = TEXT_DAMAGE | {
    f"{name}={value!r}": values(**{name: value})
    for name, wrong in {
        "backend": [5, None, "fpga"], "device": [None, 7, "\x1b[31mT4"], "classes": ["a", None],
        "images_per_s": ["x", None, float("nan")],
        "memory": [None, [], {}, {"kind": 5, "mib": 1}, {"kind": "a", "mib": "x"}, {"kind": "\x1b]0;", "mib": 1}],
        "processes": ["2", None],
    }.items()
    for value in wrong
}  # fmt: skip


def in_row(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    def changed(raw: bytes) -> bytes:
        header, first, *others = raw.split(b"\n")
        return b"\n".join([header, b",".join(change(first.split(b","))), *others])

    return changed


TABLE_DAMAGE = {name: TEXT_DAMAGE[name] for name in ("half", "empty", "no-text", "utf-16", "zero-bytes", "number")} | {
    "long-cell": lambda raw: raw[:40] + b'"' + b"x" * 200_000,
    "no-header": lambda raw: raw.partition(b"\n")[2],
    "other-columns": lambda raw: raw.replace(b"lr", b"rate", 1),
    "fewer-cells": in_row(lambda cells: cells[:2]),
    "words": in_row(lambda cells: [cells[0], b"abc", *cells[2:]]),
    "nan": in_row(lambda cells: [cells[0], b"nan", *cells[2:]]),
    "infinite": in_row(lambda cells: [cells[0], b"1e400", *cells[2:]]),
    "other-row": in_row(lambda cells: [b"7", *cells[1:]]),
    "rows-exchanged": lambda raw: b"\n".join([*raw.split(b"\n")[:1], *raw.split(b"\n")[2:0:-1], *raw.split(b"\n")[3:]]),
}


@pytest.fixture
def folder(trained_folder, tmp_path) -> Path:
    return shutil.copytree(trained_folder, tmp_path / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refuse(folder: Path, file: str, harm: Callable[[bytes], bytes], told: Callable[[], tuple[int, str, str]]) -> str:
    """The one line of a command that finds `file` harmed, and changes nothing in the folder."""
    (folder / file).write_bytes(harm((folder / file).read_bytes()))
    before = files_of(folder)
    code, _, err = told()
    assert (code, err.count("\n")) == (2, 1), err
    assert file in err
    assert files_of(folder) == before
    return err


@pytest.mark.parametrize("name", CONFIG_DAMAGE)
def test_a_damaged_config_is_refused_by_resume_and_compare(name, folder, train_run, run_main):
    (folder / "summary.json").unlink()
    original = (folder / "config.json").read_bytes()
    refuse(folder, "config.json", CONFIG_DAMAGE[name], lambda: train_run("--resume", "run"))
    (folder / "config.json").write_bytes(original)
    refuse(folder, "config.json", CONFIG_DAMAGE[name], lambda: run_main(compare.main, "run", "--out", "figures"))


def test_a_device_that_is_none_is_refused_by_compare(folder, run_main):
    (folder / "summary.json").unlink()
    refuse(folder, "config.json", values(device="cpq"), lambda: run_main(compare.main, "run", "--out", "figures"))


@pytest.mark.parametrize("name", SUMMARY_DAMAGE)
def test_a_damaged_summary_is_refused_by_compare(name, folder, run_main, tmp_path):
    refuse(folder, "summary.json", SUMMARY_DAMAGE[name], lambda: run_main(compare.main, "run", "--out", "figures"))
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name", TABLE_DAMAGE)
def test_damaged_metrics_are_refused_by_compare(name, folder, run_main):
    refuse(folder, "metrics.csv", TABLE_DAMAGE[name], lambda: run_main(compare.main, "run", "--out", "figures"))


@pytest.mark.parametrize("file", ["steps.csv", "metrics.csv"])
@pytest.mark.parametrize("name", TABLE_DAMAGE)
def test_damaged_tables_are_never_gone_on_with(name, file, folder):
    last = torch.load(folder / "last.pt", weights_only=True)
    (folder / file).write_bytes(TABLE_DAMAGE[name]((folder / file).read_bytes()))
    before = files_of(folder)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        Records(folder).read(up_to_step=last["step"], up_to_epoch=last["epoch"])
    assert files_of(folder) == before


@pytest.mark.parametrize("file", ["config.json", "metrics.csv", "summary.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(file, folder, run_main):
    (folder / file).unlink()
    os.mkfifo(folder / file)
    code, _, err = run_main(compare.main, "run", "--out", "figures")
    assert (code, err) == (2, f"train.compare: error: run is no run folder: it has no {file}\n")


def test_a_rotten_last_checkpoint_is_refused_and_kept(folder, train_run):
    (folder / "summary.json").unlink()

    def flip(raw: bytes) -> bytes:
        return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]

    assert "is damaged" in refuse(folder, "last.pt", flip, lambda: train_run("--resume", "run"))


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        pytest.param("quick", {}, id="adamw"),
        pytest.param("writeup", {}, id="sgd"),
        pytest.param("writeup", {"momentum": 0.0}, id="sgd-without-momentum"),
        pytest.param("modern", {"amp": "fp16"}, id="average-and-fp16"),
        pytest.param("modern", {"model": "customnet"}, id="customnet"),
        pytest.param("modern", {"model": "simplevit"}, id="simplevit"),
        pytest.param("modern", {"model": "resnet18"}, id="resnet18", marks=pytest.mark.slow),
    ],
)
def test_whatever_is_saved_in_an_epoch_is_gone_on_from(recipe, changes, make_trainer):
    require_gone_on_from(make_trainer(recipe, **changes), make_trainer(recipe, **changes))


def test_steps_left_out_because_gradients_overflow_leave_no_state_and_are_gone_on_from(make_trainer):
    first, second = (make_trainer(amp="fp16") for _ in range(2))
    first.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    require_gone_on_from(first, second)
    assert not first.optimizer.state


def require_gone_on_from(first: Trainer, second: Trainer) -> None:
    """The `second`, of the same folder and settings, takes up each position of the first's epoch."""
    for x, y in [*first.feeder.epoch(0), (None, None)]:
        first.save()
        second.resume(checkpoint.load(first.folder / "last.pt"))
        assert second.step == first.step
        if x is not None:
            first.train_step(x, y)
            first.count_time(0.1, 0.01, images=len(y))


# ---------------------------------------------------------------- kept results of an attack


def test_a_pipe_in_place_of_kept_results_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pgd.part.json")
    with pytest.raises(UserError, match=r"pgd\.part\.json is no file"):
        kept.read(tmp_path / "pgd.part.json", "k")


@pytest.mark.parametrize("harm", [lambda t: t.replace("0.25", "0.75"), lambda t: t[:-9], lambda t: "[" * 10**5])
def test_rotten_results_of_an_interrupted_attack_are_not_gone_on_with(harm, tmp_path):
    results, file = [[0.25, 1.0]], tmp_path / "pgd.part.json"
    text = json.dumps({"key": "k", "results": results, "checksum": kept.checksum(results)})
    file.write_text(text)
    assert kept.read(file, "k") == results
    file.write_text(harm(text))
    with pytest.raises(UserError, match=r"pgd\.part\.json is damaged; delete it"):
        kept.read(file, "k")
    assert file.read_text() == harm(text)


@pytest.mark.parametrize("shown", [str, lambda name: compare.wrap(name, 80)], ids=["attacks", "compare"])
def test_dollars_in_names_are_no_mathematics(shown, tmp_path):
    figure = Figure()
    figure.suptitle(shown("d$_$"))
    if shown is str:
        save_figure(tmp_path / "x.png", figure)
    else:
        figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size


def test_names_in_any_script_are_settings():
    checkpoint.require_values({"recipe": "写\u3000真", "data": "/\x1b"})


def test_settings_are_those_that_a_command_writes(folder):
    written = json.loads((folder / "config.json").read_text())
    assert run_folder.has_settings(folder, checkpoint.parse_settings(written))
