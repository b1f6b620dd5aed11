"""The diagram: what it finds in a model, that its words do not lie on each other, and one line for each mistake."""

import itertools
from functools import partial

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from torch import nn

import models
from train import diagram
from train.architecture import skip_of, trace


def found(name: str, conv: str = "torch", size: int = 128) -> tuple[nn.Module, list]:
    """The model on the meta device, and its layers."""
    with torch.device("meta"):
        model = models.build(name, conv, 100, size)
    return model, trace(model, size)


def test_layers_come_in_order_with_the_shapes_that_they_make():
    _, layers = found("simplenet")
    assert [(layer.label, layer.shape) for layer in layers][:5] == [
        ("image", (3, 128, 128)),
        ("conv 7×7, 3 → 64, stride 2", (64, 64, 64)),
        ("ReLU", (64, 64, 64)),
        ("max pool 3×3, stride 2", (64, 32, 32)),
        ("conv 1×1, 64 → 64", (64, 32, 32)),
    ]
    assert [(layer.label, layer.path, layer.shape) for layer in layers][-2:] == [
        ("global average pool", "pool", (512, 1, 1)),
        ("linear 512 → 100", "head", (100,)),
    ]
    assert all(layer.sources == [before] for before, layer in itertools.pairwise(layers))


def skips(name: str, conv: str = "torch") -> list[tuple[str, str, list[str]]]:
    """(where it leaves, where it ends, what lies on it) of each skip connection."""
    _, layers = found(name, conv)
    sums = [(layer, *skip_of(layer)) for layer in layers if layer.kind == "add"]
    return [(tap.path, total.path, [layer.path for layer in aside]) for total, tap, aside in sums]


@pytest.mark.parametrize("conv", models.CONVOLUTIONS)
def test_skip_connections_of_customnet(conv):
    assert skips("customnet", conv) == [
        ("block2.7", "skips.0", []), ("skips.0", "skips.1", []), ("skips.1", "skips.2", []), ("skips.2", "skips.3", []),
    ]  # fmt: skip


def test_skip_connections_of_resnet18_and_the_layers_on_three_of_them():
    found = skips("resnet18")
    assert [end for _, end, _ in found] == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert {end: aside for _, end, aside in found if aside} == {
        f"layer{stage}.0": [f"layer{stage}.0.downsample.0", f"layer{stage}.0.downsample.1"] for stage in (2, 3, 4)
    }


def test_skip_connections_of_simplevit_and_what_is_called_between_its_layers():
    assert [(end, aside) for _, end, aside in skips("simplevit")] == [(f"blocks.{i // 2}", []) for i in range(8)]
    _, layers = found("simplevit")
    called = [layer.label for layer in layers if layer.kind in ("attention", "other")]
    local, everywhere = "attention, 4 heads, 4 windows of 16 tokens", "attention, 4 heads, all 64 tokens"
    assert called == ["add position (learned)", local, everywhere, local, everywhere]
    assert skips("simplenet") == []


def test_the_model_is_left_without_hooks():
    model, _ = found("customnet")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", models.MODELS)
def test_every_layer_is_drawn_once(name):
    model, layers = found(name)
    rows = diagram.make_rows(layers, model)
    drawn = [layer for row in rows for layer in (*row.layers, *row.aside)]
    assert len(drawn) == len(layers)
    assert set(drawn) == set(layers)
    blocks = diagram.make_blocks(rows)
    for columns in (diagram.fill(blocks, most) for most in (1, 2, 3, 6)):
        assert list(itertools.chain.from_iterable(columns)) == blocks


@pytest.mark.parametrize(("name", "size"), [*((name, 128) for name in models.MODELS), ("customnet", 4096)])
def test_words_lie_inside_the_picture_and_not_on_each_other(name, size):
    model, layers = found(name, size=size)
    figure = diagram.draw(model, layers, name)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_visible()]
    assert len(boxes) > 2 * sum(layer.kind in ("conv", "linear") for layer in layers)
    for text, box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), (one, other)


@pytest.fixture
def diagram_run(run_main):
    """diagram_run("customnet", ...) -> (exit code, stdout, stderr)."""
    return partial(run_main, diagram.main)


def test_the_command_writes_a_picture_named_after_the_model(diagram_run, tmp_path):
    assert diagram_run("customnet") == (0, "customnet.png\n", "")
    with Image.open(tmp_path / "customnet.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 900
    assert [path.name for path in tmp_path.iterdir()] == ["customnet.png"]


def test_the_command_draws_what_it_was_asked_for(diagram_run, tmp_path, monkeypatch):
    titles = []
    draw = diagram.draw
    monkeypatch.setattr(diagram, "draw", lambda *rest: titles.append(rest[-1]) or draw(*rest))
    code, _, _ = diagram_run(
        "simplevit", "--conv", "triton", "--image-size", 32, "--num-classes", 7, "--out", tmp_path / "a.png"
    )
    assert code == 0
    assert (tmp_path / "a.png").is_file()
    assert titles == ["simplevit: 1,802,887 parameters, images of 32 × 32, 7 classes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["alexnet"], ["alexnet", "customnet"]),
        (["customnet", "--conv", "fft"], ["fft"]),
        (["simplevit", "--image-size", "100"], ["image size 100", "multiple of 8"]),
        (["resnet18", "--image-size", "16"], ["image size 16", "32 or more"]),
        (["customnet", "--num-classes", "0"], ["--num-classes"]),
        (["customnet", "--out", "picture.jpg"], ["picture.jpg", ".png"]),
        (["customnet", "--out", "missing/picture.png"], ["missing/picture.png", "No such file"]),
        (["customnet", "--out", "folder.png"], ["folder.png", "is a folder"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, diagram_run, tmp_path):
    (tmp_path / "folder.png").mkdir()
    code, out, err = diagram_run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("train.diagram: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
