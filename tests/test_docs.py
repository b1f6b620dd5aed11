"""README.md and docs/: what they link to, run and name exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [link for link in inside if link and not ((ROOT / page).parent / link).exists()]
    assert not missing
    assert links


@pytest.mark.parametrize("page", TEXTS)
def test_commands_exist(page):
    text = TEXTS[page]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        assert importlib.util.find_spec(module), module
    for target in set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, flags=re.MULTILINE)):
        assert "".join(target) in targets, target


def test_the_tree_names_every_module():
    """The annotated tree of README.md knows every module of the lab, and none that is gone."""
    tree = TEXTS["README.md"].partition("## Where things are")[2].partition("```")[2].partition("```")[0]
    named = set(re.findall(r"[\w-]+\.py", tree))
    modules = {
        file.name
        for folder in ("kernels", "models", "attacks", "train", "bench")
        for file in (ROOT / folder).rglob("*.py")
    }
    assert named <= modules | {file.name for file in (ROOT / "docs").glob("*.py")}
    top = {file.name for folder in ("kernels", "train") for file in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert top <= named
