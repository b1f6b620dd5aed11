"""docs/how-it-works.md: its blocks print what stands below them, its quotations and its pictures are the code's."""

import contextlib
import importlib.util
import io
import re
import textwrap
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch.nn.functional import conv2d, unfold

from kernels.geometry import ConvGeometry

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "how-it-works.md"
FENCES = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
BLOCKS = [
    (code, after if kind == "output" else None)
    for (language, code), (kind, after) in zip(FENCES, [*FENCES[1:], ("", "")], strict=True)
    if language == "python"
]
QUOTATIONS = [text for language, text in FENCES if language == "py"]
SHAPES = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def load_drawings() -> ModuleType:
    """docs is no package: its script is loaded by its path."""
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "docs" / "drawings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawings = load_drawings()


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=lambda text: (text or "").strip().splitlines()[-1][:40])
def test_a_block_of_the_page_prints_what_stands_below_it(code, printed):
    assert printed is not None, "no output block follows"
    torch.manual_seed(0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    assert [line.rstrip() for line in out.getvalue().splitlines()] == printed.splitlines()


@pytest.mark.parametrize("text", QUOTATIONS, ids=lambda text: text.strip().splitlines()[1].strip()[:40])
def test_a_quotation_stands_in_the_file_it_names(text):
    named, lines = text.split("\n", 1)
    source = (ROOT / named.strip().removeprefix("# ")).read_text()
    assert indented(lines) in blocks_of(source, lines.count("\n"))


def indented(lines: str) -> str:
    return textwrap.dedent(lines).strip("\n")


def blocks_of(source: str, count: int) -> set[str]:
    """Every run of so many lines, without their common indentation."""
    lines = source.splitlines()
    return {indented("\n".join(lines[first : first + count])) for first in range(len(lines))}


def test_the_page_was_read():
    assert len(BLOCKS) >= 6
    assert len(QUOTATIONS) >= 8
    assert {language for language, _ in FENCES} == {"python", "py", "output"}


def test_every_picture_is_shown_and_every_shown_one_is_drawn():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE.read_text())
    assert sorted(shown) == sorted(f"pictures/{name}.svg" for name in drawings.DRAWINGS)
    assert sorted(path.stem for path in drawings.PICTURES.iterdir()) == sorted(drawings.DRAWINGS)


def test_every_file_that_the_page_names_exists():
    named = set(re.findall(r"`((?:kernels|tests|docs|bench)/[\w./]*)`", PAGE.read_text()))
    assert len(named) > 10
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def content(svg: bytes) -> Iterator[tuple[str, list[float]]]:
    """What an SVG shows, in order: shapes and words, (without their numbers, the numbers)."""
    for element in ElementTree.fromstring(svg).iter():
        if element.tag in (f"{SHAPES}path", f"{SHAPES}text"):
            place = " ".join(element.get(name, "") for name in ("d", "x", "y"))
            style = re.sub(r"font-family:[^;]*;?", "", element.get("style", ""))
            numbers = [float(number) for number in NUMBER.findall(place)]
            yield f"{NUMBER.sub('', place).split()} {style} {element.text}", numbers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("pictures")
    return {name: drawings.save(name, folder).read_bytes() for name in drawings.DRAWINGS}


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_picture_is_what_the_script_draws(name, pictures):
    """To a tenth of a point: another matplotlib may write numbers and headers otherwise."""
    drawn, kept = (list(content(svg)) for svg in (pictures[name], (drawings.PICTURES / f"{name}.svg").read_bytes()))
    hint = "the code has changed what is drawn: run python docs/drawings.py, look at it, and keep it"
    assert [shape for shape, _ in drawn] == [shape for shape, _ in kept], hint
    for (shape, numbers), (_, others) in zip(drawn, kept, strict=True):
        assert np.allclose(numbers, others, rtol=0, atol=0.1), f"{shape}: {hint}"


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_picture_is_small_white_and_the_same_each_time(name, pictures, tmp_path):
    svg = pictures[name]
    assert len(svg) < 150_000
    assert b"date" not in svg
    assert "fill: #ffffff" in next(content(svg))[0]
    assert drawings.save(name, tmp_path).read_bytes() == svg


def words_of(figure: Figure) -> dict[Text, Bbox]:
    """Each piece of text of a picture and the box it fills."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.axes[0].texts if text.get_text()]  # an arrow is a text without words
    return {text: text.get_window_extent(renderer) for text in texts}


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_words_are_legible_and_lie_on_the_sheet_and_beside_each_other(name):
    figure = drawings.DRAWINGS[name]()
    words = words_of(figure)
    assert min(text.get_fontsize() for text in words) >= 11
    assert not [text for text, box in words.items() if not all(map(figure.bbox.contains, *box.get_points().T))]
    assert not [(a, b) for (a, box), (b, other) in combinations(words.items(), 2) if box.overlaps(other)]


GEOMETRIES = [
    pytest.param(drawings.EXAMPLE, id="example"),
    pytest.param(drawings.STRIDED, id="strided"),
    pytest.param(ConvGeometry.of((1, 1, 9, 7), (1, 1, 3, 2), stride=(3, 2), padding=(2, 1), dilation=(2, 3)), id="any"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_drawn_matrix_is_the_unfolded_one(geometry):
    g = geometry
    x = torch.arange(1.0, g.H * g.W + 1).reshape(1, 1, g.H, g.W)  # 0 is the halo's
    expected = unfold(x, (g.R, g.S), dilation=(g.DH, g.DW), padding=(g.PH, g.PW), stride=(g.SH, g.SW))[0].T
    drawn = [[0 if pixel is None else pixel + 1 for pixel in row] for row in drawings.unfolded(g)]
    assert drawn == expected.tolist()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_drawn_taps_are_those_of_the_input_gradient(geometry):
    g = geometry
    x = torch.zeros(g.x_shape, dtype=torch.float64, requires_grad=True)
    for r, s in drawings.taps(g):
        w = torch.zeros(g.w_shape, dtype=torch.float64)
        w[0, 0, r, s] = 1
        y = conv2d(x, w, stride=(g.SH, g.SW), padding=(g.PH, g.PW), dilation=(g.DH, g.DW))
        (dx,) = torch.autograd.grad(y, x, torch.arange(1.0, g.P * g.Q + 1, dtype=torch.float64).reshape(y.shape))
        for h, w_place in product(range(g.H), range(g.W)):
            p, q = drawings.readers(g, (h, w_place)).get((r, s), (-1, -1))
            assert dx[0, 0, h, w_place] == (p * g.Q + q + 1 if 0 <= p < g.P and 0 <= q < g.Q else 0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixels_of_a_residue_class_meet_the_same_taps(geometry):
    g = geometry
    for h, w in product(range(g.H), range(g.W)):
        assert set(drawings.readers(g, (h, w))) == set(drawings.readers(g, (h % g.SH, w % g.SW)))


def test_the_command_refuses_what_it_does_not_know(run_main):
    code, out, err = run_main(drawings.main, "--everything")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
