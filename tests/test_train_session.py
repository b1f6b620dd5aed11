"""Training in a folder as other commands do it, and runs from before a setting was there."""

import dataclasses
import json
import shutil

import pytest
import torch
from rich.console import Console

import train.loop
from train.cli import UserError
from train.distributed import World
from train.recipes import RECIPES, Settings
from train.run_folder import has_settings
from train.session import train_in

QUIET = Console(quiet=True)
LATER = [name for name in Settings.__slots__ if name.startswith("adversarial")]  # settings that early runs lack


@pytest.fixture
def settings() -> Settings:
    """As a library has them, with nothing decided by a command: two epochs of four steps."""
    return dataclasses.replace(
        RECIPES["quick"], conv="torch", device="cpu", epochs=2, batch_size=16, limit_train=64, limit_val=20
    )


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(3): the next training is stopped after so many steps; stop_after(None): it is not."""
    original = train.loop.Trainer.stop_if_asked

    def stop_after(steps: int | None) -> None:
        def stop_if_asked(trainer, _stop):
            original(trainer, trainer.step == steps)

        monkeypatch.setattr(train.loop.Trainer, "stop_if_asked", stop_if_asked)

    return stop_after


def same_weights(a, b):
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    assert one["step"] == other["step"]
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_it_trains_what_the_command_trains(settings, train_run, tmp_path):
    train_in(tmp_path / "ours", settings, QUIET, World())
    flags = ("--conv", "torch", "--device", "cpu", "--epochs", 2, "--batch-size", 16, "--limit-train", 64)
    assert train_run("simplenet", *flags, "--limit-val", 20, "--out", "command")[0] == 0
    same_weights(tmp_path / "ours", tmp_path / "command")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "command")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_stopped_it_says_so_and_the_same_call_goes_on_to_the_same_weights(steps, settings, stop_after, tmp_path):
    settings = dataclasses.replace(settings, adversarial="least_likely")
    train_in(tmp_path / "whole", settings, QUIET, World())
    folder = tmp_path / "stopped"
    stop_after(steps)
    with pytest.raises(UserError) as told:
        train_in(folder, settings, QUIET, World())
    assert str(told.value) == (
        f"stopped after step {steps}, saved in {folder / 'last.pt'}; the same command goes on from there"
    )
    stop_after(None)
    train_in(folder, settings, QUIET, World())
    same_weights(tmp_path / "whole", folder)
    assert (folder / "summary.json").exists()


def test_a_complete_run_is_left_as_it_is(settings, tmp_path, capsys):
    train_in(tmp_path / "run", settings, QUIET, World())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    elsewhere = dataclasses.replace(settings, cache=str(tmp_path / "other"))
    train_in(tmp_path / "run", elsewhere, Console(), World())
    assert "run is complete" in capsys.readouterr().out.replace("\n", "")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"adversarial": "untargeted"}, {"data": "/elsewhere", "lr": 1.0}], ids=str
)
@pytest.mark.parametrize("steps", [None, 2], ids=["complete", "begun"])
def test_a_run_of_other_settings_is_refused_by_their_names(steps, change, settings, stop_after, tmp_path):
    stop_after(steps)
    try:
        train_in(tmp_path / "run", settings, QUIET, World())
    except UserError:
        assert steps is not None
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    others = dataclasses.replace(settings, image_size=32, **change)
    names = ", ".join(sorted(change))
    with pytest.raises(UserError, match=f"run holds a run of other settings: {names}; take another folder$"):
        train_in(tmp_path / "run", others, QUIET, World())
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_what_is_no_run_is_refused_and_left(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        train_in(tmp_path / "run", settings, QUIET, World())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


# ---------------------------------------------------------------- settings that came later


def forget(written: dict) -> dict:
    return {name: value for name, value in written.items() if name not in LATER}


@pytest.mark.parametrize("parts", [("config.json",), ("last.pt",), ("config.json", "last.pt")], ids=" ".join)
def test_a_run_from_before_a_setting_was_there_goes_on(parts, settings, stop_after, train_run, tmp_path):
    train_in(tmp_path / "whole", settings, QUIET, World())
    folder = tmp_path / "old"
    stop_after(5)
    with pytest.raises(UserError, match="stopped"):
        train_in(folder, settings, QUIET, World())
    stop_after(None)
    if "config.json" in parts:
        config = json.loads((folder / "config.json").read_text())
        assert config != forget(config)
        (folder / "config.json").write_text(json.dumps(forget(config)))
    if "last.pt" in parts:
        saved = torch.load(folder / "last.pt", weights_only=True)
        torch.save(saved | {"settings": forget(saved["settings"])}, folder / "last.pt")
    shutil.copytree(folder, tmp_path / "copy")
    assert train_run("--resume", "old")[0] == 0
    same_weights(tmp_path / "whole", folder)
    train_in(tmp_path / "copy", settings, QUIET, World())
    same_weights(tmp_path / "whole", tmp_path / "copy")


def test_a_folder_has_settings_whose_defaults_it_does_not_name(settings, tmp_path):
    path = tmp_path / "config.json"
    assert not has_settings(tmp_path, settings)
    path.write_text(json.dumps(forget(dataclasses.asdict(settings))))
    assert has_settings(tmp_path, settings)
    assert not has_settings(tmp_path, dataclasses.replace(settings, adversarial="untargeted"))
    for damaged in ("{", "[]", "{}", '{"flavour": "sweet"}'):
        path.write_text(damaged)
        assert not has_settings(tmp_path, settings)
