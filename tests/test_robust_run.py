"""The attacking command's robust: two copies that differ in what they see alone, attacked alike, and going on."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import train.run
from attacks import pgd
from attacks.run import harden
from attacks.run.hygiene import Check, Examination
from train import checkpoint
from train.batches import val_batches
from train.data import load_val

EPOCHS, LIMIT = 1, 10  # attack_run's limit


@pytest.fixture
def run(trained_folder, tmp_path) -> Path:
    return shutil.copytree(trained_folder, tmp_path / "run")


@pytest.fixture
def attack(attack_run, monkeypatch):
    """attack_run, whose checks (tests/test_hygiene.py) cost nothing."""
    def examine(_subject, _space, *, epsilon, **_):
        curve = [(0.0, 60.0), (epsilon, 20.0)]
        return Examination(
            images=4, epsilon=epsilon, curve=curve, others={"Other": 10.0}, checks=[Check(name="c", found="f")]
        )

    monkeypatch.setattr(harden, "examine", examine)
    return lambda *arguments: attack_run("robust", *arguments, "--epochs", EPOCHS)


def weights(file: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(file)["model"]


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_copies_are_ordinary_runs_and_attacked_alike(run, attack, tmp_path):
    code, out, _ = attack("run", "--out", "out", "--epsilon", "0.2")
    assert code == 0
    for name, flags in {
        "plain": (), "adversarial": ("--adversarial", "least_likely", "--adversarial-epsilon", "0.2"),
    }.items():
        train.run.main([  # what the run was made with, and the flags of the copy
            "simplenet", "--conv", "torch", "--device", "cpu", "--limit-train", "320", "--limit-val", "40",
            "--init", str(run), "--epochs", str(EPOCHS), "--out", f"by-hand-{name}", *flags,
        ])
        assert equal(weights(tmp_path / "out" / name / "last.pt"), weights(tmp_path / f"by-hand-{name}/last.pt"))
    plain, adversarial = (weights(tmp_path / "out" / name / "last.pt") for name in ("plain", "adversarial"))
    assert not equal(plain, adversarial)

    report = json.loads((tmp_path / "out/robust.json").read_text())
    data = load_val("fashion-mini", 32, limit=LIMIT, console=Console(quiet=True))
    for name in ("plain", "adversarial"):
        model, _ = checkpoint.load_model(tmp_path / "out" / name / "last.pt", device=torch.device("cpu"))
        model = model.to(memory_format=torch.channels_last)
        right = {"clean": 0, "least_likely": 0, "most_likely": 0, "untargeted": 0}
        for x, y in val_batches(
            data, batch_size=4, image_size=32, device=torch.device("cpu"), memory_format=torch.channels_last
        ):
            for under in right:
                seen = x if under == "clean" else pgd(model, x, under, y, epsilon=0.2, step_size=0.02)
                with torch.no_grad():
                    right[under] += (model(seen).argmax(1) == y).sum().item()
        found = report["copies"][name]
        assert {under: found[under]["top1"] for under in right} == {
            under: pytest.approx(100 * count / LIMIT) for under, count in right.items()
        }
        assert found["seconds_per_epoch"] > 0
        assert f"{found['untargeted']['top1']:.2f} / " in out
    assert report["training"] == {
        "epochs": EPOCHS, "target": "least_likely", "num_steps": 5, "step_size": 0.01, "epsilon": 0.2,
    }
    assert "times as long (measured, training steps alone" in " ".join(out.split())
    assert not list((tmp_path / "out").glob("*.part.json"))
    assert all(len(line) <= 80 for line in out[out.index("clean and under attack") :].splitlines())


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(run, attack, monkeypatch, tmp_path):
    """After the plain copy was trained and attacked: neither is done again."""
    assert attack("run", "--out", "whole")[0] == 0
    original, trained = harden.train_in, []

    def interrupted(folder, *arguments):
        trained.append(folder.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        original(folder, *arguments)

    monkeypatch.setattr(harden, "train_in", interrupted)
    code, _, err = attack("run", "--out", "cut")
    assert (code, err.count("\n")) == (2, 1)
    before = (tmp_path / "cut/plain/last.pt").stat().st_mtime_ns
    batches = []
    attack_batch = harden.attack_batch
    monkeypatch.setattr(harden, "attack_batch", lambda *a: batches.append(1) or attack_batch(*a))
    assert attack("run", "--out", "cut")[0] == 0
    assert (tmp_path / "cut/plain/last.pt").stat().st_mtime_ns == before
    assert len(batches) == 3  # of the adversarial copy
    whole, cut = (json.loads((tmp_path / name / "robust.json").read_text())["copies"] for name in ("whole", "cut"))
    for name in ("plain", "adversarial"):
        for under in harden.CONDITIONS:
            assert whole[name][under] == cut[name][under]


@pytest.mark.slow
def test_by_default_all_lies_in_the_runs_own_folder(run, attack):
    assert attack("run")[0] == 0
    assert {path.name for path in (run / "robust").iterdir()} == {
        "plain", "adversarial", "robust.json", "robust.csv", "robust.png",
    }


@pytest.mark.slow
def test_several_checkpoints_give_mean_and_spread(run, attack, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    code, out, _ = attack("run", "other", "--out", "out")
    assert code == 0
    report = json.loads((tmp_path / "out/run/robust.json").read_text())
    assert f"{report['copies']['plain']['clean']['top1']:.1f} ± 0.0" in out
    gain = report["copies"]["adversarial"]["untargeted"]["top1"] - report["copies"]["plain"]["untargeted"]["top1"]
    assert f"{gain:+.1f} ± 0.0" in out
    with open(tmp_path / "out/robust-together.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["copy"], row["under"]) for row in rows] == [
        (copy, under) for copy in harden.COPIES for under in harden.CONDITIONS
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("run", "--epsilon", "0"), "above 0", id="no-ball"),
        pytest.param(("run", "--target", "zebra"), "invalid choice", id="unknown-target"),
        pytest.param(("nowhere",), "no checkpoint nowhere", id="missing"),
        pytest.param(("run", "--out", "other"), "holds a run of other settings", id="another-run-there"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, run, attack, tmp_path):
    shutil.copytree(run, tmp_path / "other/plain")
    code, _, err = attack(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
