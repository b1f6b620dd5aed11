"""The saliency command: its figures against the library, what its pictures show, and one line for each mistake."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import models
from attacks import grad_cam, last_convolution, randomised_parameters, rank_correlation, saliency, smooth_grad
from attacks.run import command, explain
from train.batches import val_batches
from train.checkpoint import load_model
from train.data import load_val, spread
from train.distributed import World

PNG = b"\x89PNG"
RED = torch.tensor([1.0, 0.0, 0.0])


@pytest.fixture
def checkpoint(train_run, tiny_run, tmp_path) -> Path:
    """A run folder, trained for a second."""
    assert train_run(*tiny_run, "--out", "run")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def show_saliency(run_main, monkeypatch):
    """show_saliency("run", ...) -> (exit code, stdout, stderr), run in this process, two images unless told."""
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: run_main(
        command.main, "saliency", "--device", "cpu", "--limit", 10, "--images", 2, *arguments
    )


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """The figures saved, by their files' names."""
    figures, save = {}, explain.save_figure

    def keep(file, figure):
        figures[file.name] = figure
        save(file, figure)

    monkeypatch.setattr(explain, "save_figure", keep)
    return figures


@pytest.fixture
def few_samples(monkeypatch):
    """SmoothGrad of two samples, where its figures are not what is tested."""
    monkeypatch.setitem(explain.METHODS, "SmoothGrad", partial(smooth_grad, samples=2))


def report_in(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads((folder / "saliency.json").read_text(), parse_constant=refuse)


def edges(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Maps that ignore the model."""
    return (x - x.roll(1, dims=3)).abs().amax(1)


def nothing(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Maps of a Grad-CAM whose sums are all negative."""
    return torch.zeros_like(x[:, 0])


# ---- figures


def test_figures_are_those_of_the_library(checkpoint, show_saliency, drawn, tmp_path):
    code, out, _ = show_saliency("run", "--out", "out")
    assert code == 0
    report = report_in(tmp_path / "out")
    model, _ = load_model(checkpoint, device=torch.device("cpu"))
    model = model.to(memory_format=torch.channels_last)
    data = load_val("fashion-mini", 32, limit=10, console=Console(quiet=True))
    ((x, y),) = val_batches(
        data, batch_size=10, image_size=32, device=torch.device("cpu"), memory_format=torch.channels_last
    )
    chosen = spread(data.labels.numpy(), 2)
    x, y = x[chosen], y[chosen]
    with torch.no_grad():
        confidence, predicted = model(x).softmax(1).max(1)
    methods = {
        "gradient": saliency, "SmoothGrad": smooth_grad,
        "Grad-CAM": lambda model, x, labels: grad_cam(model, x, last_convolution(model), labels),
    }
    assert list(report["methods"]) == list(methods)
    for name, method in methods.items():
        steps = randomised_parameters(model, x, method, predicted)
        other = randomised_parameters(model, x, method, predicted, seed=1)
        found = report["methods"][name]
        assert report["layers"] == [step.layer for step in steps[1:]]
        wanted = [step.correlation.nanmean().item() for step in steps[1:]]
        assert [math.nan if value is None else value for value in found["correlations"]] == pytest.approx(
            wanted, abs=1e-6, nan_ok=True
        )
        floor = rank_correlation(steps[-1].maps, other[-1].maps).nanmean().item()
        assert (math.nan if found["floor"] is None else found["floor"]) == pytest.approx(floor, abs=1e-6, nan_ok=True)
        line = next(line for line in out.splitlines() if line.strip().startswith(name))
        assert line.split()[1:] == [explain.in_words(value) for value in (wanted[0], wanted[-1], floor)]
    names = [name.replace("_", " ") for name in data.classes]
    assert [picture["true"] for picture in report["pictures"]] == [names[label] for label in y]
    assert [picture["predicted"] for picture in report["pictures"]] == [names[label] for label in predicted]
    assert [picture["confidence"] for picture in report["pictures"]] == pytest.approx(confidence.tolist())
    assert (report["images"], report["backend"], report["model"], report["doubts"]) == (2, "native", "simplenet", [])
    mean, std = (torch.tensor(moment).view(3, 1, 1) for moment in (data.mean, data.std))
    image = (x[0] * std + mean).permute(1, 2, 0).clamp(0, 1)
    torch.testing.assert_close(torch.tensor(drawn["saliency.png"].axes[0].get_images()[0].get_array().data), image)
    for name in ("saliency.png", "saliency-randomised.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
    assert "2 images of 10 classes, 32 px, fashion-mini" in " ".join(out.split())
    assert "speaks against" not in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_an_image_without_a_correlation_is_left_out():
    assert explain.mean(torch.tensor([0.5, math.nan, 0.1])) == pytest.approx(0.3)
    assert explain.mean(torch.tensor([math.nan, math.nan])) is None
    assert explain.in_words(None) == explain.in_words(math.nan) == "-"
    assert explain.in_words(-0.001) == "0.00"


def test_every_checkpoint_gets_its_folder(checkpoint, show_saliency, few_samples, tmp_path):
    (tmp_path / "copy.pt").write_bytes((checkpoint / "best.pt").read_bytes())
    assert show_saliency("run", "copy.pt", "--images", 3, "--out", "out")[0] == 0
    first, second = (report_in(tmp_path / "out" / name) for name in ("run", "copy"))
    assert first["methods"] == second["methods"]
    assert len({picture["true"] for picture in first["pictures"]}) == 3  # evenly over the classes
    assert show_saliency("run")[0] == 0
    assert report_in(checkpoint)["images"] == 2


def test_of_several_processes_one_works():
    nowhere = command.make_parser().parse_args(["saliency", "nowhere.pt", "--device", "cpu"])
    explain.run(nowhere, Console(quiet=True), World(rank=1, size=2))
    with pytest.raises(explain.UserError, match="no checkpoint"):
        explain.run(nowhere, Console(quiet=True), World(rank=0, size=2))


# ---- doubts


def test_a_method_that_ignores_the_model_is_doubted(checkpoint, show_saliency, monkeypatch, tmp_path):
    monkeypatch.setattr(explain, "METHODS", {"gradient": saliency, "edges": edges})
    code, out, _ = show_saliency("run", "--out", "out")
    report = report_in(tmp_path / "out")
    assert code == 0
    assert report["methods"]["edges"]["correlations"] == pytest.approx(len(report["layers"]) * [1.0])
    assert report["methods"]["edges"]["floor"] == pytest.approx(1)
    (doubt,) = report["doubts"]
    assert doubt.startswith("edges: the maps stay as they were (rank correlation 1.00)")
    assert "What speaks against believing these figures" in out
    assert doubt in " ".join(out.split())


@pytest.mark.parametrize(
    ("correlations", "floor", "word"),
    [
        pytest.param([0.5, 0.3], 0.35, None, id="falls-to-its-floor"),
        pytest.param([0.6, 0.73], 0.73, None, id="a-grid-in-all-maps"),
        pytest.param([0.1, 0.47], -0.42, None, id="grad-cam-of-a-lucky-sign"),
        pytest.param([1.0, 1.0], 1.0, "stay as they were", id="ignores-the-model"),
        pytest.param([0.99, 0.95], 0.5, "stay as they were", id="stays-above-its-floor"),
        pytest.param([0.98, 0.4], 0.4, None, id="forgets-late"),
        pytest.param([None, 0.2], None, None, id="a-step-without-maps"),
        pytest.param([0.2, None], None, None, id="no-maps-in-the-end"),
        pytest.param([None, None], None, "0 everywhere", id="no-maps-at-all"),
    ],
)
def test_signs_of_maps_that_show_something_else(correlations, floor, word):
    found = explain.doubts({"method": {"correlations": correlations, "floor": floor}})
    assert len(found) == (word is not None)
    assert all(word in doubt for doubt in found)


# ---- pictures


def test_red_is_where_a_map_is_high():
    pictures = torch.rand(2, 20, 20, 3, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(2, 20, 20)
    maps[0, :5] = 4.0  # a quarter of a map at its 99th percentile
    maps[0, 5, 0] = 1.0
    maps[0, 6, 0] = 4000.0  # an outlier, which pales nothing
    maps[1, :3] = 1e-9  # every map has a scale of its own
    out = explain.red_over(pictures, maps, opacity=0.5)
    for place, strength in (((0, 0, 0), 1.0), ((0, 5, 0), 0.25), ((0, 6, 0), 1.0), ((1, 2, 3), 1.0)):
        torch.testing.assert_close(out[place], pictures[place] + 0.5 * strength * (RED - pictures[place]))
    assert torch.equal(out[maps == 0], pictures[maps == 0])


@pytest.mark.parametrize("value", [0.0, math.nan], ids=["zero", "no-number"])
def test_an_empty_map_leaves_the_picture(value):
    pictures = torch.rand(2, 6, 6, 3)
    assert torch.equal(explain.red_over(pictures, torch.full((2, 6, 6), value)), pictures)


def test_a_sparse_map_is_scaled_by_its_highest():
    """Fewer pixels than lie above the percentile: that is 0 then."""
    maps = torch.zeros(1, 20, 20)
    maps[0, 0, :2] = torch.tensor([3.0, 1.5])
    out = explain.red_over(torch.ones(1, 20, 20, 3), maps, opacity=1)
    torch.testing.assert_close(out[0, 0, :2], torch.tensor([[1.0, 0, 0], [1, 0.5, 0.5]]))


def test_the_sheet_names_true_and_predicted_classes(checkpoint, show_saliency, drawn, few_samples, tmp_path):
    assert show_saliency("run", "--images", 3, "--out", "out")[0] == 0
    figure, report = drawn["saliency.png"], report_in(tmp_path / "out")
    cells = [figure.axes[4 * row : 4 * row + 4] for row in range(3)]
    assert [row[0].get_ylabel() for row in cells] == [picture["true"] for picture in report["pictures"]]
    for row, picture in zip(cells, report["pictures"], strict=True):
        caption = f"{picture['predicted']} {100 * picture['confidence']:.0f}%"
        assert " ".join(row[0].get_xlabel().split()) == caption
        right = picture["true"] == picture["predicted"]
        assert row[0].xaxis.label.get_color() == (explain.RIGHT if right else explain.WRONG)
    titles = [cell.get_title() for cell in cells[0]]
    assert titles == ["image", "gradient", "SmoothGrad", "Grad-CAM of\nblock3.5"]
    image, gradient = (cells[0][column].get_images()[0].get_array() for column in (0, 1))
    assert (gradient[..., 0] >= image[..., 0] - 1e-6).all()  # red is laid over the image, nothing else
    assert (gradient[..., 1:] <= image[..., 1:] + 1e-6).all()
    assert (gradient - image).max() > 0.1


def test_the_chart_has_every_layer_and_floor(checkpoint, show_saliency, drawn, few_samples, tmp_path):
    assert show_saliency("run", "--out", "out")[0] == 0
    figure, report = drawn["saliency-randomised.png"], report_in(tmp_path / "out")
    chart, *cells = figure.axes
    assert [label.get_text() for label in chart.get_xticklabels()] == ["as trained", *report["layers"]]
    lines = {line.get_label(): line for line in chart.lines}
    for name, method in report["methods"].items():
        shown = [None if math.isnan(value) else value for value in lines[name].get_ydata()]
        assert shown[1:] == method["correlations"]
    dashed = {line.get_ydata()[0] for line in chart.lines if line.get_linestyle() == "--" and len(line.get_ydata())}
    assert dashed == {method["floor"] for method in report["methods"].values()} - {None}
    assert cells[0].get_ylabel() == report["pictures"][0]["true"]
    titles = [cell.get_title() for cell in cells[:7]]
    layers = report["layers"]
    assert titles[:3] == ["image", "as trained", f"{layers[0]}\nforgotten"]
    assert titles[-1] == f"{layers[-1]}\nforgotten"


def test_a_map_of_nothing_is_called_so(checkpoint, show_saliency, drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(explain, "METHODS", {"gradient": saliency, "Grad-CAM": nothing})
    code, out, _ = show_saliency("run", "--out", "out")
    assert code == 0
    image, gradient, empty = drawn["saliency.png"].axes[:3]
    assert (gradient.get_xlabel(), empty.get_xlabel()) == ("", "0 everywhere")
    assert (empty.get_images()[0].get_array() == image.get_images()[0].get_array()).all()
    report = report_in(tmp_path / "out")
    assert report["methods"]["Grad-CAM"] == {"correlations": len(report["layers"]) * [None], "floor": None}
    assert "no map has ranks" in report["doubts"][0]
    assert next(line for line in out.splitlines() if "Grad-CAM  " in line).split() == ["Grad-CAM", "-", "-", "-"]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_only_simplevit_has_a_patch_embedding(name):
    model = models.build(name, "torch", 10, 32)
    layer = last_convolution(model)
    assert explain.is_patch_embedding(model, layer) == (name == "simplevit")
    assert ("shows little" in explain.heading("Grad-CAM", model)) == (name == "simplevit")
    assert explain.heading("gradient", model) == "gradient"


def test_a_single_convolution_need_not_be_a_patch_embedding():
    one = nn.Conv2d(3, 4, 3, padding=1)
    assert not explain.is_patch_embedding(nn.Sequential(one, nn.ReLU()), one)


def test_simplevit_works(train_run, tiny_run, show_saliency, drawn, few_samples, tmp_path):
    assert train_run("simplevit", *tiny_run[1:], "--epochs", 1, "--limit-train", 16, "--out", "run")[0] == 0
    code, out, _ = show_saliency("run", "--images", 1)
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    report = report_in(tmp_path / "run")
    assert report["layers"][-1] == "SimpleViT"  # its position
    assert drawn["saliency.png"].axes[3].get_title() == "Grad-CAM\nof the patch embedding:\nit shows little"
    chart, *cells = drawn["saliency-randomised.png"].axes
    assert len(chart.get_xticklabels()) == 1 + len(report["layers"])
    assert len(cells) == 7  # one image, where two are not asked for
    correlations = report["methods"]["gradient"]["correlations"]
    assert cells[2].get_xlabel() == f"correlation {explain.in_words(correlations[0])}"
    assert cells[6].get_xlabel() == f"correlation {explain.in_words(correlations[-1])}"


def test_two_classes_work(train_run, show_saliency, make_images, few_samples, tmp_path):
    make_images(tmp_path / "pets", {"train/cat": 8, "train/guide_dog": 8, "val/cat": 2, "val/guide_dog": 2})
    arguments = ("--conv", "torch", "--device", "cpu", "--epochs", 1, "--batch-size", 8, "--image-size", 16)
    assert train_run("simplenet", "--data", "pets", *arguments, "--out", "run")[0] == 0
    assert show_saliency("run", "--images", 9)[0] == 0
    report = report_in(tmp_path / "run")
    assert (report["classes"], report["images"]) == (2, 4)  # all there are
    assert {picture["true"] for picture in report["pictures"]} == {"cat", "guide dog"}


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("nowhere.pt",), "no checkpoint nowhere.pt", id="missing"),
        pytest.param(("run", "text.pt", "--out", "out"), "text.pt is damaged", id="the-second-is-no-checkpoint"),
        pytest.param(("run", "--images", "0"), "0 must be above 0", id="no-images"),
        pytest.param(("run", "--images", "101"), "101 must be at most 100", id="too-many-images"),
        pytest.param(("run", "--data", "nowhere"), "no data folder", id="missing-data"),
        pytest.param(("run", "--out", "text.pt"), "text.pt", id="out-is-a-file"),
        pytest.param(("diverged.pt",), "diverged.pt: the model's logits are not finite", id="a-diverged-model"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, checkpoint, show_saliency, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    saved = torch.load(checkpoint / "best.pt", weights_only=True)
    saved["model"]["head.bias"] += torch.finfo(torch.float32).max  # finite, and what they make of images is not
    saved["model"]["head.weight"] *= 1e38
    torch.save(saved, tmp_path / "diverged.pt")
    code, out, err = show_saliency(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("attacks.run")
    assert "error: " in err
    assert words in err
    assert not list(tmp_path.glob("out/*/saliency*"))  # told before the first checkpoint is worked on


def test_help_fits_the_terminal(show_saliency):
    code, out, _ = show_saliency("--help")
    assert code == 0
    assert "--images" in out
    assert max(len(line) for line in out.splitlines()) <= 80
