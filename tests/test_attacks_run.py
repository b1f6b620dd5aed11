"""The attacking command's sweep: its figures against attacks one by one, going on, doubts, and mistakes in a line."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attacks import pgd
from attacks.run import sweep as command
from attacks.run.command import ATTACKS, make_parser
from attacks.run.counting import together
from attacks.run.hygiene import Examination
from attacks.run.sweep import accuracies_of, bar_chart, beside, doubts
from attacks.sweep import WRITEUP
from train.batches import val_batches
from train.checkpoint import load_model
from train.data import load_val

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 10
FIGURES = ("clean", "rows")


@pytest.fixture
def checkpoint(trained_folder, tmp_path) -> Path:
    """A run folder of one's own."""
    shutil.copytree(trained_folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def attack(attack_run, monkeypatch):
    """attack_run, whose checks (tests/test_hygiene.py) cost nothing."""
    unexamined = Examination(images=1, epsilon=0.1, curve=[(0.0, 50.0), (0.1, 10.0)], others={}, checks=[])
    monkeypatch.setattr(command, "examine", lambda *_, **__: unexamined)
    return attack_run


def figures(folder: Path) -> dict:
    report = json.loads((folder / "sweep.json").read_text())
    return {name: report[name] for name in FIGURES}


def test_figures_are_those_of_the_attacks_one_by_one(checkpoint, attack, tmp_path):
    code, out, _ = attack("sweep", "run", "--out", "out")
    assert code == 0
    report = json.loads((tmp_path / "out/sweep.json").read_text())
    model, _ = load_model(checkpoint, device=torch.device("cpu"))
    data = load_val("fashion-mini", 32, limit=LIMIT, console=Console(quiet=True))
    batches = list(val_batches(  # the command's own: another size would round otherwise
        data, batch_size=4, image_size=32, device=torch.device("cpu"), memory_format=torch.channels_last
    ))
    model = model.to(memory_format=torch.channels_last)
    assert (report["images"], report["backend"], report["model"]) == (LIMIT, "native", "simplenet")
    assert len(report["rows"]) == 12
    for row in (report["rows"][n] for n in (0, 5, 9)):
        names = ("num_steps", "step_size", "epsilon")
        found = []
        for x, y in batches:
            with torch.no_grad():
                logits = model(pgd(model, x, row["target"], y, **{name: row[name] for name in names}))
            found.append((logits > logits.gather(1, y[:, None])).sum(1))  # classes before the true one
        better = torch.cat(found)
        assert row["top1"] == pytest.approx(100 * (better < 1).float().mean().item())
        assert row["top5"] == pytest.approx(100 * (better < 5).float().mean().item())
    with open(tmp_path / "out/sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == [row["top1"] for row in report["rows"]]
    assert f"{report['rows'][3]['top1']:.2f} / {report['rows'][3]['top5']:.2f}" in out
    assert "native PyTorch on CPU" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert (tmp_path / "out/sweep.png").exists()
    assert not (tmp_path / "out/sweep.part.json").exists()


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(checkpoint, attack, monkeypatch, tmp_path):
    assert attack("sweep", "run", "--out", "whole")[0] == 0
    original, calls = command.attack_batch, []

    def counted(subject, x, y, mine):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(subject, x, y, mine)

    monkeypatch.setattr(command, "attack_batch", counted)
    code, _, err = attack("sweep", "run", "--out", "cut")
    assert (code, err.count("\n")) == (2, 1)
    assert "interrupted after 1 of 3 batches; the same command goes on from cut/sweep.part.json" in err
    assert attack("sweep", "run", "--out", "cut")[0] == 0
    assert calls == [4, 4, 4, 2]
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


@pytest.mark.slow
def test_what_was_counted_for_another_model_is_not_gone_on_with(checkpoint, attack, monkeypatch, tmp_path):
    assert attack("sweep", "run", "--out", "out")[0] == 0
    whole = figures(tmp_path / "out")
    other = {"key": "another", "results": [13 * [5 * [9.0]]]}
    (tmp_path / "out/sweep.part.json").write_text(json.dumps(other))
    assert attack("sweep", "run", "--out", "out")[0] == 0
    assert figures(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_masked_model_is_doubted(checkpoint, attack, tmp_path):
    """Logits so large that gradients vanish: no attack moves, and the accuracy looks like the clean one."""
    saved = torch.load(checkpoint / "best.pt", weights_only=True)
    saved["model"]["head.weight"] *= 1e6
    saved["model"]["head.bias"] *= 1e6
    torch.save(saved, tmp_path / "masked.pt")
    healthy, masked = attack("sweep", "run"), attack("sweep", "masked.pt", "--out", "masked")
    assert (healthy[0], masked[0]) == (0, 0)
    assert "speaks against" not in healthy[1]
    assert "What speaks against believing these figures" in masked[1]
    assert "the attack stands still" in masked[1].replace("\n", " ").replace("  ", " ")


def report_of(top1: list[float], zeros: float = 0.0) -> dict:
    """With the same figures for both targets."""
    rows = [
        asdict(setting) | {"target": target, "top1": value, "top5": 50.0, "zero_gradient": zeros}
        for setting, value in zip(WRITEUP, top1, strict=True) for target in ("least_likely", "most_likely")
    ]
    return {"rows": rows, "images": 1000, "clean": {"top1": 60.0, "top5": 90.0}, "model": "simplenet", "data": "/d"}


@pytest.mark.parametrize(
    ("top1", "zeros", "word", "count"),
    [
        pytest.param([11, 8, 17, 11, 2, 1], 0.0, "", 0, id="the-write-ups"),
        pytest.param([11, 8, 17, 11.2, 2, 1], 0.0, "", 0, id="rounding"),
        pytest.param([11, 8, 17, 14, 2, 1], 0.0, "reach neither", 2, id="rows-that-must-agree"),
        pytest.param([11, 13, 17, 11, 2, 1], 0.0, "50 steps leave more right", 1, id="more-steps"),
        pytest.param([11, 8, 17, 11, 15, 1], 0.0, "epsilon 10 leave more right", 1, id="larger-ball"),
        pytest.param([11, 8, 17, 11, 2, 15], 0.0, "50 steps and epsilon 10 leave more right", 1, id="all-raised"),
        pytest.param([11, 8, 17, 11, 2, 1], 0.2, "exactly 0", 2, id="zeros"),
    ],
)
def test_signs_of_an_artefact(top1, zeros, word, count):
    """One for each target, but for those by strength, which say nothing of "most likely"."""
    found = doubts(report_of(top1, zeros))
    assert len(found) == count
    assert all(word in doubt for doubt in found)


def test_the_writeups_figures_stand_beside_its_own_task_alone():
    task = {"model": "simplenet", "classes": 100, "image_size": 128}
    assert beside(task)
    assert not any(beside(task | change) for change in ({"model": "customnet"}, {"classes": 10}, {"image_size": 64}))


def test_what_several_checkpoints_share_is_the_attack_alone():
    """Shares of zero gradients are each one's own; of two of them none stands for both."""
    one, two = (report_of(top1, zeros) for top1, zeros in (([11, 8, 17, 11, 2, 1], 0.1), ([13, 8, 17, 11, 2, 1], 0.3)))
    rows = together([accuracies_of(one), accuracies_of(two)])
    assert set(rows[0]) == {
        "num_steps", "step_size", "epsilon", "target", "top1", "top1_sd", "top5", "top5_sd", "n",
    }
    assert (rows[0]["top1"], rows[0]["n"]) == (12, 2)
    assert (rows[-1]["target"], rows[-1]["top1"], rows[-1]["top1_sd"]) == ("clean", 60, 0)


@pytest.mark.parametrize("attack", [(), *((name,) for name in ATTACKS)], ids=lambda names: "-".join(names) or "all")
def test_help_fits_a_terminal(attack, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([*attack, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert len(lines) > 10
    assert max(map(len, lines)) <= 80


def test_bars_are_the_accuracies():
    figure = bar_chart(report_of([11, 8, 17, 11, 2, 1]) | {"image_size": 64})
    heights = sorted(patch.get_height() for patch in figure.axes[0].patches)
    assert heights == sorted(2 * [11, 8, 17, 11, 2, 1])
    assert len(figure.axes[0].get_xticklabels()) == len(WRITEUP)


def in_two_processes(*arguments: str, folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments += ("--device", "cpu", "--limit", str(LIMIT), "--batch-size", "4", "--check-images", "20")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, "-m", "attacks.run", *arguments], cwd=folder, env=environment, check=True, timeout=240)


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(checkpoint, attack_run, tmp_path):
    """Each of the images it attacked, in their order."""
    arguments = ("pgd", "run", "--target", "untargeted", "--out")
    assert attack_run(*arguments, "one", "--check-images", 20)[0] == 0
    in_two_processes(*arguments, "two", folder=tmp_path)
    one, two = (list(csv.DictReader((tmp_path / name / "pgd.csv").open())) for name in ("one", "two"))
    assert len(one) == len(two) == LIMIT
    for a, b in zip(one, two, strict=True):
        assert (a["image"], a["true"], a["clean_predicted"]) == (b["image"], b["true"], b["clean_predicted"])
        assert float(a["first_loss"]) == pytest.approx(float(b["first_loss"]), rel=1e-4)
        assert float(a["last_loss"]) == pytest.approx(float(b["last_loss"]), rel=0.05)


@pytest.mark.slow
def test_two_processes_count_what_one_does(checkpoint, attack, tmp_path):
    assert attack("sweep", "run", "--out", "one")[0] == 0
    in_two_processes("sweep", "run", "--out", "two", folder=tmp_path)
    one, two = (figures(tmp_path / name) for name in ("one", "two"))
    assert two["clean"] == one["clean"]
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert abs(a["top1"] - b["top1"]) <= 100 / LIMIT  # rounding may turn an image on the border
        assert a["zero_gradient"] == pytest.approx(b["zero_gradient"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("sweep", "nowhere.pt"), "no checkpoint nowhere.pt", id="missing"),
        pytest.param(("sweep", "text.pt"), "text.pt is damaged", id="no-checkpoint"),
        pytest.param(("swipe", "run"), "invalid choice", id="unknown-attack"),
        pytest.param(("sweep", "run", "--data", "nowhere"), "no data folder", id="missing-data"),
        pytest.param(("sweep", "run", "--out", "text.pt"), "text.pt", id="out-is-a-file"),
        pytest.param(("sweep", "run", "--out", "cut"), "sweep.part.json is damaged", id="damaged-part"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, checkpoint, attack, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/sweep.part.json").write_text('{"key"')
    code, _, err = attack(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("attacks.run")
    assert ": error: " in err
    assert words in err
