"""docs/your-own-kernel.md as tests use it: its files, its edits, its commands and what they printed."""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import models
from kernels import runtime, variants

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "your-own-kernel.md"
KERNEL, TEST = "kernels/variants/mine.py", "tests/test_mine.py"

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What stands between two fences."""

    language: str
    """"python", "diff", "sh" or "text"."""
    mark: str
    """What the comment above it says, as "file: kernels/variants/mine.py"; empty where there is none."""
    text: str


def blocks() -> list[Block]:
    """All of the page, in order."""
    return [
        Block(language=found["language"], mark=found["mark"] or "", text=found["text"])
        for found in _BLOCK.finditer(PAGE.read_text())
    ]


def source(file: str) -> str:
    """The file that the page says to write, before its edits."""
    (block,) = (block for block in blocks() if block.mark == f"file: {file}")
    return block.text


def edited(text: str, diff: str) -> str:
    """`text` after one of the page's edits, whose old lines must stand in it once."""
    old, new = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in f" {sign}") for sign in "-+"
    )
    assert text.count(old) == 1, f"the edit fits {text.count(old)} places:\n{old}"
    return text.replace(old, new)


def commands() -> list[str]:
    """The lines of all shell blocks, in order."""
    return [line for block in blocks() if block.language == "sh" for line in block.text.splitlines()]


def function_of(cls: type[variants.Variant]) -> Callable[..., torch.Tensor]:
    """conv2d(x, w, b, ...) of a Conv2d class."""

    def conv2d(x, w, b, stride=1, padding=0):
        layer = cls(w.shape[1], w.shape[0], w.shape[2:], stride, padding, bias=b is not None)
        return functional_call(layer, {"weight": w} if b is None else {"weight": w, "bias": b}, (x,))

    return conv2d


def install(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[variants.Variant]:
    """The variant that a file of that name and text makes, known to `models` until the test ends.

    It stands in for a reader's own file of the same name, if there is one.
    """
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(variants, "__path__", [str(folder), *variants.__path__])
    known = {op: call for op, call in runtime._operations.items() if op != name or name not in variants.OPERATIONS}
    monkeypatch.setattr(runtime, "_operations", known)
    module = f"{variants.__name__}.{name}"
    monkeypatch.setitem(sys.modules, module, None)  # so that it is as before when the test ends
    del sys.modules[module]
    importlib.invalidate_caches()
    found = variants.find(reserved=(*models.LABS, *models.PEERS))[name]
    for known_to in (models.VARIANTS, models.CONVOLUTIONS):
        monkeypatch.setitem(known_to, name, found)
    return found
