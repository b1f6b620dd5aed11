"""The evaluating command: its figures against their definitions, and one line for each mistake."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

import models
from train import checkpoint, evaluate
from train.cli import UserError
from train.data import IMAGENET_MEAN, IMAGENET_STD, load_data
from train.optim import initialise
from train.recipes import RECIPES

LIMIT = 60


@pytest.fixture
def make_checkpoint(tmp_path):
    """make_checkpoint("run/best.pt") saves a SimpleNet of random weights as a run on fashion-mini would."""
    _, val = load_data("fashion-mini", 32, limit_train=1, limit_val=1, console=Console())

    def make(name: str, *, classes=val.classes, **settings: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        chosen = dataclasses.replace(
            RECIPES["quick"], **(dict(conv="torch", image_size=32, device="cpu") | settings)
        )
        torch.manual_seed(0)
        model = models.build("simplenet", "torch", len(classes))
        initialise(model, "kaiming")  # so that predictions spread over the classes
        checkpoint.save(path, {
            "settings": dataclasses.asdict(chosen), "classes": list(classes), "epoch": 2, "step": 8,
            "val_top1": 10.0, "model": model.state_dict(),
        })
        return path

    return make


@pytest.fixture
def evaluate_run(run_main, tmp_path, monkeypatch):
    """evaluate_run("best.pt") -> (exit code, stdout, stderr, the --json file), run in this process in tmp_path."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str, dict]:
        code, out, err = run_main(evaluate.main, *arguments, "--json", "result.json", "--device", "cpu")
        return code, out, err, json.loads(Path("result.json").read_text()) if code == 0 else {}

    return run


@torch.no_grad()
def by_definition(path: Path, *, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of the first validation images, computed as plainly as can be."""
    saved = torch.load(path, weights_only=True)
    model = models.build("simplenet", "torch", len(saved["classes"]))
    model.load_state_dict(saved["model"])
    _, val = load_data("fashion-mini", 32, limit_train=1, limit_val=LIMIT, console=Console())
    pixels = val.images.expand(-1, 3, -1, -1)[:, :, 2:34, 2:34] / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = (pixels - mean) / std
    logits = model.eval()(x)
    return (logits + model(x.flip(3))) / 2 if flip else logits, val.labels


@pytest.mark.parametrize("batch_size", [256, 7])
def test_figures_are_those_of_their_definitions(batch_size, make_checkpoint, evaluate_run):
    path = make_checkpoint("best.pt")
    code, out, err, report = evaluate_run(path, "--limit-val", LIMIT, "--batch-size", batch_size)
    assert (code, err) == (0, "")
    logits, labels = by_definition(path)
    ranked = logits.argsort(descending=True)
    assert report["images"] == LIMIT
    assert report["top1"] == pytest.approx(100 * (ranked[:, 0] == labels).float().mean().item())
    assert report["top5"] == pytest.approx(100 * (ranked[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert report["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    expected = [[int(((labels == i) & (ranked[:, 0] == j)).sum()) for j in range(10)] for i in range(10)]
    assert report["confusion"] == expected
    assert len({j for row in expected for j, count in enumerate(row) if count}) > 2
    assert f"{report['top1']:.2f}%" in out


def test_the_table_by_class_reads_the_confusion_matrix():
    confusion = torch.tensor([[5, 3, 2], [0, 4, 0], [0, 0, 0]])
    a, b, c = evaluate.by_class(confusion, ("a", "b", "c"))
    assert a == {"class": "a", "images": 10, "top1": 50, "most_confused_with": "b", "confusions": 3}
    assert b == {"class": "b", "images": 4, "top1": 100, "most_confused_with": None, "confusions": 0}
    assert c == {"class": "c", "images": 0, "top1": None, "most_confused_with": None, "confusions": 0}


def test_a_runs_best_checkpoint_gives_the_runs_best_accuracy(train_run, tiny_run, evaluate_run, tmp_path):
    assert train_run(*tiny_run, "--out", "run")[0] == 0
    report = evaluate_run("run", "--limit-val", 20)[3]
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["val_top1"]))
    assert report["checkpoint"] == "run/best.pt"
    assert report["epoch"] == int(best["epoch"])
    assert report["top1"] == pytest.approx(float(best["val_top1"]), rel=1e-5)
    assert report["loss"] == pytest.approx(float(best["val_loss"]), rel=1e-4)


@pytest.mark.parametrize(("conv", "backend"), [("unfold", "native"), ("triton", "interpreter")])
def test_every_convolution_gives_the_same_figures(conv, backend, make_checkpoint, evaluate_run):
    path = make_checkpoint("best.pt")
    usual, other = (evaluate_run(path, "--limit-val", 20, *more)[3] for more in ([], ["--conv", conv]))
    assert (usual["conv"], usual["backend"]) == ("torch", "native")
    assert (other["conv"], other["backend"]) == (conv, backend)
    assert other["confusion"] == usual["confusion"]
    assert other["loss"] == pytest.approx(usual["loss"], rel=1e-3)


def test_mirror_images_count_with_flip_tta(make_checkpoint, evaluate_run):
    path = make_checkpoint("best.pt")
    plain, both = (evaluate_run(path, "--limit-val", LIMIT, *more)[3] for more in ([], ["--flip-tta"]))
    assert both["loss"] == pytest.approx(F.cross_entropy(*by_definition(path, flip=True)).item(), rel=1e-4)
    assert abs(both["loss"] - plain["loss"]) > 1e-3 * plain["loss"]


def test_mixed_precision_differs_by_rounding(make_checkpoint, evaluate_run):
    path = make_checkpoint("best.pt")
    plain, mixed = (evaluate_run(path, "--limit-val", LIMIT, *more)[3] for more in ([], ["--amp", "bf16"]))
    assert mixed["loss"] != plain["loss"]
    assert mixed["loss"] == pytest.approx(plain["loss"], rel=0.05)


def test_a_checkpoint_is_judged_as_it_was_validated_unless_told_otherwise(make_checkpoint, evaluate_run):
    path = make_checkpoint("best.pt", flip_tta=True, amp="bf16")
    told = [evaluate_run(path, "--limit-val", 20, *more)[3] for more in ([], ["--no-flip-tta", "--amp", "off"])]
    assert [(report["flip_tta"], report["amp"]) for report in told] == [(True, "bf16"), (False, "off")]
    assert told[0]["loss"] != told[1]["loss"]


@pytest.mark.parametrize(
    ("conv", "channels_last", "expected"),
    [
        ("torch", True, torch.channels_last),
        ("torch", False, torch.contiguous_format),
        ("unfold", True, torch.contiguous_format),
        ("triton", False, torch.channels_last),
    ],
)
def test_parameters_and_batches_lie_as_in_validation(
    conv, channels_last, expected, make_checkpoint, evaluate_run, monkeypatch
):
    told = []
    original = evaluate.evaluate

    def spy(model, data, **options):
        weight = max(model.parameters(), key=torch.Tensor.dim)
        told.append((options["memory_format"], weight.is_contiguous(memory_format=expected)))
        return original(model, data, **options)

    monkeypatch.setattr(evaluate, "evaluate", spy)
    path = make_checkpoint("best.pt", channels_last=channels_last)
    assert evaluate_run(path, "--limit-val", 2, "--conv", conv)[0] == 0
    assert told == [(expected, True)]


# ---------------------------------------------------------------- folders of images


@pytest.fixture
def folder_checkpoint(make_checkpoint):
    """A checkpoint for folders of the classes a and b."""
    return make_checkpoint("best.pt", classes=("a", "b"), image_size=16)


def test_a_folder_with_val_alone_is_judged_whole(make_images, folder_checkpoint, evaluate_run, tmp_path):
    make_images(tmp_path / "d", {"val/a": 6, "val/b": 3})
    code, out, err, report = evaluate_run(folder_checkpoint, "--data", "d")
    assert (code, err) == (0, "")
    assert (report["images"], report["split"]) == (9, None)
    assert "every" not in out


def test_training_images_are_neither_read_nor_kept(make_images, folder_checkpoint, evaluate_run, tmp_path):
    make_images(tmp_path / "d", {"train/a": 1, "train/b": 1, "val/a": 2, "val/b": 1})
    (tmp_path / "d/train/a/000.jpg").write_text("no picture")
    assert evaluate_run(folder_checkpoint, "--data", "d")[3]["images"] == 3
    assert [path.name[:6] for path in (tmp_path / "cache/conv-lab").glob("*.images")] == ["d-val-"]


def test_of_plain_class_folders_a_fifth_is_judged_and_that_is_said(
    make_images, folder_checkpoint, evaluate_run, tmp_path
):
    make_images(tmp_path / "d", {"a": 10, "b": 5})
    _, out, _, report = evaluate_run(folder_checkpoint, "--data", "d")
    assert report["images"] == 3
    box = " ".join(out.split("╭")[1].replace("│", " ").split())  # as it is folded into the table
    assert "3 images (every 5th image of each class), 16 px" in box


def test_fashion_mini_is_not_called_a_split(make_checkpoint, evaluate_run):
    assert evaluate_run(make_checkpoint("best.pt"), "--limit-val", 2)[3]["split"] is None


def test_miniplaces_is_not_called_a_split(make_images, folder_checkpoint, evaluate_run, tmp_path):
    make_images(tmp_path / "d/images", {"a": 2, "b": 2})
    for part, number in (("train", 0), ("val", 1)):
        (tmp_path / f"d/{part}.txt").write_text(f"a/00{number}.jpg 0\nb/00{number}.jpg 1\n")
    report = evaluate_run(folder_checkpoint, "--data", "d")[3]
    assert (report["images"], report["split"]) == (2, None)


def test_every_name_of_a_pnm_file_counts(folder_checkpoint, evaluate_run, tmp_path):
    for name, mode in (("a/0.pbm", "1"), ("a/1.pgm", "L"), ("a/2.ppm", "RGB"), ("b/3.pnm", "L"), ("b/4.PNM", "RGB")):
        file = tmp_path / "d/val" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (20, 20)).save(file, format="PPM")
    assert evaluate_run(folder_checkpoint, "--data", "d")[3]["images"] == 5


def test_100_classes_fit_80_columns(make_images, make_checkpoint, evaluate_run, tmp_path):
    names = [f"natural_history_museum[{i:02}]" for i in range(100)]
    make_images(tmp_path / "d", {f"{part}/{name}": 1 for part in ("train", "val") for name in names}, size=(20, 20))
    path = make_checkpoint("best.pt", classes=names, image_size=16, data=str(tmp_path / "d"))
    code, out, _, report = evaluate_run(path)
    assert code == 0
    assert report["images"] == 100
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert all(f"{name} " in out for name in names)
    assert out.splitlines()[-1].startswith("╰")  # the figures over all come last, where the eye is


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        pytest.param(["a", "b", "c"], ["3 classes", "10"], id="other-count"),
        pytest.param(list("abcdefghij"), ["'a'", "'t-shirt/top'"], id="other-names"),
    ],
)
def test_other_classes_are_refused_by_name(classes, words, make_checkpoint, evaluate_run):
    code, out, err, _ = evaluate_run(make_checkpoint("best.pt", classes=classes))
    assert (code, out) == (2, "")
    assert err.startswith("train.evaluate: error: ")
    assert err.count("\n") == 1
    assert all(word in err.lower() for word in words), err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["nowhere.pt"], ["nowhere.pt"], id="no-file"),
        pytest.param(["empty"], ["empty/best.pt"], id="no-best-in-folder"),
        pytest.param(["text.pt"], ["text.pt", "damaged"], id="no-checkpoint"),
        pytest.param(["good.pt", "--data", "nowhere"], ["nowhere"], id="no-data"),
        pytest.param(["good.pt", "--conv", "fft"], ["fft", "triton"], id="unknown-conv"),
        pytest.param(["good.pt", "--batch-size", "0"], ["--batch-size", "0"], id="zero-batch"),
        pytest.param(["good.pt", "--amp", "int8"], ["int8", "bf16"], id="unknown-amp"),
        pytest.param(["misfit.pt"], ["misfit.pt", "fit"], id="weights-of-another-model"),
        pytest.param(["unknown.pt"], ["unknown.pt", "alexnet"], id="unknown-model"),
        pytest.param(["bare.pt"], ["bare.pt", "damaged"], id="without-settings"),
        pytest.param(["old.pt"], ["old.pt", "sed"], id="settings-of-another-version"),
        pytest.param(["~nobody-of-that-name/a.pt"], ["~nobody-of-that-name/a.pt"], id="unknown-user"),
        pytest.param(["good.pt", "--data", "~nobody-of-that-name/d"], ["--data: ~nobody"], id="data-of-unknown-user"),
        pytest.param([], ["CHECKPOINT"], id="nothing-named"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, make_checkpoint, evaluate_run, tmp_path):
    make_checkpoint("good.pt")
    make_checkpoint("unknown.pt", model="alexnet")
    saved = torch.load(make_checkpoint("misfit.pt"), weights_only=True)
    saved["model"].popitem()
    torch.save(saved, tmp_path / "misfit.pt")
    torch.save({"format": checkpoint.FORMAT}, tmp_path / "bare.pt")
    saved = torch.load(make_checkpoint("old.pt"), weights_only=True)
    saved["settings"]["sed"] = saved["settings"].pop("seed")
    torch.save(saved, tmp_path / "old.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    code, out, err, _ = evaluate_run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("train.evaluate: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(("place", "words"), [("nodir/x.json", "no folder nodir"), (".", "is a folder")])
def test_a_place_where_no_json_can_go_is_told_before_anything_else(place, words, run_main):
    code, out, err = run_main(evaluate.main, "nowhere.pt", "--json", place)
    assert (code, out) == (2, "")
    assert err.startswith(f"train.evaluate: error: --json {place}")
    assert words in err
    assert err.count("\n") == 1


def test_load_model_is_ready_to_use(make_checkpoint):
    path = make_checkpoint("run/best.pt")
    model, saved = checkpoint.load_model(path.parent, conv="triton", device=torch.device("cpu"))
    assert not model.training
    assert saved["epoch"] == 2
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())
    first = next(model.parameters())
    assert first.is_contiguous(memory_format=models.memory_format("triton"))
    with pytest.raises(UserError, match="fft"):
        checkpoint.load_model(path, conv="fft", device=torch.device("cpu"))
