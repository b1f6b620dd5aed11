"""The attacking command's pgd: its figures and pictures against the library, spaces, several checkpoints, mistakes."""

import csv
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attacks import attack_report
from attacks.run import perturb
from attacks.run.autoattack import autoattack
from attacks.run.counting import together
from attacks.run.figures import picture_grid
from attacks.run.hygiene import Check, Examination
from attacks.run.subject import InPixels, make_folders, size
from train.batches import val_batches
from train.checkpoint import load_model
from train.cli import UserError
from train.data import IMAGENET_MEAN, IMAGENET_STD, load_val

LIMIT = 10  # attack_run's


@pytest.fixture
def run(trained_folder, tmp_path) -> Path:
    """A run folder of one's own, where the command runs."""
    return shutil.copytree(trained_folder, tmp_path / "run")


@pytest.fixture
def examined(monkeypatch) -> dict:
    """What the checks were asked for; they themselves (tests/test_hygiene.py) cost nothing here."""
    asked = {}

    def examine(subject, space, **arguments):
        asked.update(arguments, subject=subject, space=space)
        curve = [(0.0, 60.0), (arguments["epsilon"], 20.0)]
        return Examination(
            images=4, epsilon=arguments["epsilon"], curve=curve, others={"Other": 10.0},
            checks=[Check(name="c", found="f")],
        )

    monkeypatch.setattr(perturb, "examine", examine)
    return asked


def batches(image_size: int = 32) -> list:
    data = load_val("fashion-mini", image_size, limit=LIMIT, console=Console(quiet=True))
    return list(val_batches(  # the command's own: another size would round otherwise
        data, batch_size=4, image_size=image_size, device=torch.device("cpu"), memory_format=torch.channels_last
    ))


def reports(folder: Path, target="least_likely", **sizes) -> list:
    model, _ = load_model(folder, device=torch.device("cpu"))
    model = model.to(memory_format=torch.channels_last)
    return [(attack_report(model, x, target, y, **sizes), y) for x, y in batches()]


def test_figures_are_the_librarys(run, attack_run, examined, tmp_path):
    code, out, _ = attack_run("pgd", "run", "--out", "out")
    assert code == 0
    report = json.loads((tmp_path / "out/pgd.json").read_text())
    found = reports(run)
    y = torch.cat([y for _, y in found])
    logits, clean = (torch.cat([getattr(r, name) for r, _ in found]) for name in ("logits", "clean_logits"))
    assert report["attacked"]["top1"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert report["clean"]["top1"] == pytest.approx(100 * (clean.argmax(1) == y).float().mean().item())
    rank = (logits > logits.gather(1, y[:, None])).sum(1)
    assert report["attacked"]["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    loss = torch.cat([r.loss for r, _ in found], dim=1)
    assert report["mean_loss"] == pytest.approx(loss.double().mean(dim=1).tolist())
    assert report["queries_per_image"] == {"forwards": 12, "backwards": 10}
    assert report["attack"]["eps_space"] == "normalized"
    assert report["doubts"] == []
    assert f"{report['attacked']['top1']:.2f}" in out
    assert "native PyTorch on CPU" in " ".join(out.split())
    right = clean.argmax(1) == y
    fooled = (logits.argmax(1) != y)[right].double().mean().item()
    assert report["attackable"] == right.sum()
    assert f"Of the {right.sum()} images that were right {100 * fooled:.2f}% are fooled" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())


def test_each_image_has_a_row(run, attack_run, examined, tmp_path):
    assert attack_run("pgd", "run", "--target", "untargeted", "--epsilon", "0.3", "--step-size", "0.05")[0] == 0
    with open(run / "pgd.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = reports(run, "untargeted", epsilon=0.3, step_size=0.05)
    logits = torch.cat([r.logits for r, _ in found])
    classes = load_val("fashion-mini", 32, limit=LIMIT, console=Console(quiet=True)).classes
    confidence, predicted = logits.double().softmax(1).max(1)
    assert [row["predicted"] for row in rows] == [classes[i] for i in predicted]
    assert [float(row["confidence"]) for row in rows] == pytest.approx(confidence.tolist())
    assert [row["true"] for row in rows] == [classes[i] for _, y in found for i in y]
    assert [bool(int(row["success"])) for row in rows] == torch.cat([r.success for r, _ in found]).tolist()
    last = torch.cat([r.loss[-1] for r, _ in found]).tolist()
    assert [float(row["last_loss"]) for row in rows] == pytest.approx(last)


def test_a_class_as_target(run, attack_run, examined, tmp_path):
    sizes = ("--epsilon", 1, "--step-size", 0.1)
    assert attack_run("pgd", "run", "--target", "Bag", *sizes)[0] == 0
    with open(run / "pgd.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["predicted"] for row in rows} == {"Bag"}
    assert all(int(row["success"]) for row in rows)


def test_pixel_space_moves_by_grey_levels(run, attack_run, examined, tmp_path, monkeypatch):
    """Eight grey levels of each channel, within 0 ... 1: of normalised images that is a size a channel."""
    seen = []
    original = perturb.attack_report

    def spy(model, x, *args, **kwargs):
        report = original(model, x, *args, **kwargs)
        seen.append((x, report.adversarial))
        return report

    monkeypatch.setattr(perturb, "attack_report", spy)
    assert attack_run("pgd", "run", "--eps-space", "pixel", "--epsilon", "8/255", "--target", "untargeted")[0] == 0
    x, adversarial = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert (adversarial - x).abs().max().item() == pytest.approx(8 / 255, rel=1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(x, torch.cat([x for x, _ in batches()]) * std + mean)
    report = json.loads((run / "pgd.json").read_text())
    assert report["attack"] | {"clamp": True, "eps_space": "pixel", "epsilon": 8 / 255} == report["attack"]
    normal = attack_report(  # the same attack where the network's own images live
        load_model(run, device=torch.device("cpu"))[0].to(memory_format=torch.channels_last), batches()[0][0],
        "untargeted", batches()[0][1], num_steps=10, step_size=2 / 255 / std, epsilon=8 / 255 / std,
        bounds=(-mean / std, (1 - mean) / std),
    )
    assert report["mean_loss"][1] > report["mean_loss"][0]
    same = ((normal.adversarial * std + mean) - seen[0][1]).abs() < 1e-4  # but where a sign of nearly 0 turned
    assert same.double().mean() > 0.95
    assert examined["space"].bounds == (0.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "step_size", "epsilon"),
    [
        ((), 0.01, 0.1), (("--epsilon", "10"), 0.01, 10), (("--eps-space", "pixel"), 2 / 255, 8 / 255),
        (("--eps-space", "pixel", "--epsilon", "1/255"), 0.25 / 255, 1 / 255), (("--norm", "l2"), 0.5, 2),
        (("--norm", "l2", "--eps-space", "pixel", "--step-size", "0.2"), 0.2, 0.5),
    ],
    ids=["writeup", "its-fourth-row", "pixel", "one-grey-level", "l2", "all-typed"],
)
def test_sizes_that_are_not_typed(flags, step_size, epsilon, run, attack_run, examined):
    assert attack_run("pgd", "run", "--steps", 1, *flags)[0] == 0
    sizes = json.loads((run / "pgd.json").read_text())["attack"]
    assert (sizes["step_size"], sizes["epsilon"]) == (pytest.approx(step_size), pytest.approx(epsilon))


def test_a_wrong_target_is_told_before_anything_is_attacked(run, attack_run, examined, trained_folder, tmp_path):
    code, _, err = attack_run("pgd", "run", "--target", "zebra", "--out", "out")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_without_a_clamp_pixels_leave_their_range(run, attack_run, examined, tmp_path):
    assert attack_run("pgd", "run", "--eps-space", "pixel", "--no-clamp")[0] == 0
    assert examined["space"].bounds is None
    assert attack_run("pgd", "run", "--clamp")[0] == 0
    low, high = examined["space"].bounds
    assert low.flatten().tolist() == pytest.approx([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    assert high.flatten().tolist() == pytest.approx(
        [(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    )


def test_pixels_through_the_wrapper_are_the_models_own_images():
    model = torch.nn.Flatten()
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(InPixels(model, mean, std)(x * std + mean), model(x), atol=1e-6)


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(run, attack_run, examined, monkeypatch, tmp_path):
    assert attack_run("pgd", "run", "--out", "whole")[0] == 0
    original, calls = perturb.attack, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(perturb, "attack", counted)
    code, _, err = attack_run("pgd", "run", "--out", "cut")
    assert (code, err.count("\n")) == (2, 1)
    assert "interrupted after 1 of 3 batches; the same command goes on from cut/pgd.part.json" in err
    monkeypatch.setattr(perturb, "attack", stopped)
    code, _, err = attack_run("pgd", "run", "--out", "nothing")
    assert (code, "interrupted before the first of 3 batches was done" in err) == (2, True)
    monkeypatch.setattr(perturb, "attack", counted)
    assert attack_run("pgd", "run", "--out", "cut", "--steps", 9)[0] == 0  # another attack begins anew
    assert len(calls) == 2 + 3
    assert attack_run("pgd", "run", "--out", "cut")[0] == 0
    whole, cut = ((tmp_path / name / "pgd.csv").read_text() for name in ("whole", "cut"))
    assert whole == cut


def test_several_checkpoints_give_mean_and_spread(run, attack_run, examined, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    code, out, _ = attack_run("pgd", "run", "other", "--out", "out")
    assert code == 0
    one, two = (json.loads((tmp_path / "out" / name / "pgd.json").read_text()) for name in ("run", "other"))
    assert one["attacked"] == two["attacked"]
    assert f"{one['attacked']['top1']:.1f} ± 0.0" in out
    with open(tmp_path / "out/pgd-together.csv", newline="") as file:
        clean, attacked = csv.DictReader(file)
    assert (clean["images"], attacked["images"], attacked["n"]) == ("clean", "attacked", "2")
    assert float(attacked["top1"]) == one["attacked"]["top1"]


def test_mean_and_spread_of_checkpoints():
    tables = [[{"what": "a", "top1": top1, "top5": 50.0}] for top1 in (1.0, 3.0)]
    (row,) = together(tables)
    assert row == {"what": "a", "top1": 2.0, "top1_sd": pytest.approx(2**0.5), "top5": 50.0, "top5_sd": 0.0, "n": 2}


def test_checkpoints_do_not_share_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = tmp_path / "a/last.pt", tmp_path / "b/last.pt"
    assert make_folders([a, b], tmp_path / "out") == [tmp_path / "out/a-last", tmp_path / "out/b-last"]
    assert make_folders([a, b], None) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(UserError, match="same files"):
        make_folders([a, tmp_path / "a/best.pt"], None)


def test_pictures_name_what_is_true_and_what_is_seen(run, attack_run, examined):
    assert attack_run("pgd", "run")[0] == 0
    subject, space = examined["subject"], examined["space"]
    x, y = subject.some(2)
    figure = picture_grid(subject, space, y, [("clean", x), ("moved", x + 0.1)], title="t", difference=True)
    with torch.no_grad():
        confidence, predicted = subject.model(x).softmax(1).max(1)
    cells = figure.axes
    assert [cell.get_title() for cell in cells[:2]] == ["clean", "moved"]
    names = subject.data.classes
    assert cells[0].get_ylabel() == names[y[0]]
    assert cells[0].get_xlabel() == f"{names[predicted[0]]} {100 * confidence[0]:.0f}%"
    shown = torch.tensor(cells[0].images[0].get_array())
    assert torch.allclose(shown, space.pixels(x)[0].permute(1, 2, 0).clamp(0, 1))
    # The largest change of a pixel, 0.1 of the largest deviation, fills the contrast.
    difference = torch.tensor(cells[2].images[0].get_array())
    assert difference.max().item() == pytest.approx(1)
    assert cells[2].get_title() == f"last less first, × {0.5 / (0.1 * max(IMAGENET_STD)):.3g}"


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1), ("2", 2.0)])
def test_sizes_may_be_fractions(text, value):
    assert size(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("loss", "target", "zeros", "words"),
    [
        ([1.0, 2.0], "untargeted", 0.0, None), ([1.0, 1.0], "untargeted", 0.0, "did not rise"),
        ([2.0, 1.0], "least_likely", 0.0, None), ([1.0, 1.5], "Bag", 0.0, "did not fall"),
        ([1.0, 0.5], "most_likely", 0.0, None), ([1.0, 2.0], "untargeted", 0.2, "stands still"),
    ],
)
def test_signs_of_an_artefact(loss, target, zeros, words):
    found = perturb.doubts({"mean_loss": loss, "zero_gradient": zeros, "attack": {"target": target}})
    assert ([words in doubt for doubt in found] == [True]) if words else not found


def test_autoattack_is_its_own_package(monkeypatch):
    """What it is given: pixels, sizes, the norm by its name for it, and a model that asks for no weight gradient."""
    given = {}

    class AutoAttack:
        def __init__(self, model, **options):
            given.update(options, model=model)

        def run_standard_evaluation(self, x, y, bs):
            given.update(bs=bs, frozen=not any(p.requires_grad for p in given["model"].parameters()))
            return x + 0.5

    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x = torch.zeros(2, 3, 2, 2)
    logits = autoattack(model, x, torch.tensor([0, 1]), epsilon=0.1, norm="linf")
    assert torch.equal(logits, model(x + 0.5))
    assert given | {"norm": "Linf", "eps": 0.1, "version": "standard", "seed": 0, "bs": 2, "frozen": True} == given


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("pgd", "run", "--target", "zebra"), "neither one of least_likely", id="unknown-target"),
        pytest.param(("pgd", "run", "--epsilon", "8/0"), "is not a number", id="no-fraction"),
        pytest.param(("pgd", "run", "--epsilon", "-1"), "above 0", id="negative"),
        pytest.param(("pgd", "run", "--epsilon", "inf"), "'inf' is not a number", id="infinite"),
        pytest.param(("pgd", "run", "--check-images", "2"), "at least 20", id="too-few-to-check"),
        pytest.param(("sweep", "run", "--target", "Bag"), "attacks.run sweep: error: unrecognized", id="anothers-flag"),
        pytest.param(("pgd", "run", "--steps", "0"), "above 0", id="no-steps"),
        pytest.param(("pgd", "run", "--eps-space", "grey"), "invalid choice", id="unknown-space"),
        pytest.param(("pgd", "run", "--autoattack"), "it needs --eps-space pixel", id="autoattack-normalised"),
        pytest.param(("pgd", "run", "nowhere.pt"), "no checkpoint nowhere.pt", id="one-of-two-missing"),
        pytest.param(("pgd",), "CHECKPOINT", id="no-checkpoint"),
        pytest.param((), "{pgd,sweep,saliency,robust}", id="no-attack"),
        pytest.param(("swipe", "run"), "invalid choice", id="unknown-attack"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, run, attack_run, examined):
    code, out, err = attack_run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert "top-1" not in out


def test_a_missing_autoattack_says_how_to_get_it(run, attack_run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, err = attack_run("pgd", "run", "--autoattack", "--eps-space", "pixel")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install git+https://github.com/fra31/auto-attack" in err
