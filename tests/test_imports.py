"""Imports point one way, as the source tree's own files say: kernels at the bottom, commands on top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"kernels", "models", "attacks", "train", "bench", "tests"}

# Which of our folders a folder may import. bench/measure is a library that stands apart from the rest of bench.
ALLOWED = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "attacks": {"attacks", "kernels"},
    "bench.measure": {"bench.measure", "kernels"},
    "train": {"train", "kernels", "models", "attacks", "bench.measure"},
    "bench": OURS - {"tests"} | {"bench.measure"},
}
# What a command does before PyTorch is imported: of an attack, when its package is, which comes before the command.
EXCEPTIONS = {("attacks", name) for name in ("train", "train.startup", "train.startup.quit_on_interrupt")}
FILES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))


def folder_of(module: str) -> str:
    """The key of ALLOWED a dotted module name falls under."""
    return "bench.measure" if (module + ".").startswith("bench.measure.") else module.split(".")[0]


def in_command(module: str, of: str = "") -> bool:
    """Whether a module is a command, <folder>.run, or one of its modules; `of` is one of the same command's."""
    parts, others = module.split("."), of.split(".")
    return parts[1:2] == ["run"] and (not of or parts[:2] == others[:2])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, package: str) -> set[str]:
    """The modules of ours that a source imports anywhere in it; "from a import b" counts as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


def forbidden(module: str, imported: set[str]) -> list[str]:
    """Those of `imported` that `module` may not import."""
    wrong = []
    is_command = in_command(module) or folder_of(module) in ("bench", "tests")
    allowed = OURS | {"bench.measure"} if is_command else ALLOWED[folder_of(module)]
    for name in sorted(imported):
        package = folder_of(name)
        # "bench" itself is named on the way to bench.measure and holds nothing.
        outside = package not in allowed and not (name == "bench" and "bench.measure" in allowed)
        # A command is run, not imported; the tests may, to call its main(), and so may its own modules.
        command = in_command(name) and not in_command(module, of=name) and folder_of(module) != "tests"
        from_tests = package == "tests" and folder_of(module) != "tests"
        if (outside or command or from_tests) and (module, name) not in EXCEPTIONS:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_what_its_folder_may(path):
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    wrong = forbidden(module_of(path), imports_of(path.read_text(), package))
    assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"


def test_the_tree_was_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"kernels", "models", "train", "tests"}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("kernels.ops", "import models", ["models"]),
        ("kernels.ops", "def f():\n    from train.data import Dataset", ["train.data", "train.data.Dataset"]),
        ("models.simplenet", "from train import data", ["train", "train.data"]),
        ("bench.measure.nvml", "from train import cli", ["train", "train.cli"]),
        ("train.loop", "from train.run import main", ["train.run", "train.run.main"]),
        ("train.loop", "from bench import shapes", ["bench.shapes"]),
        ("train.loop", "from bench.measure import nvml\nimport models", []),
        ("train.run", "import attacks, bench.measure.nvml", []),
        ("attacks.run.sweep", "from train.files import write_json\nfrom attacks.run.kept import read", []),
        ("attacks.run.sweep", "from train.run import main", ["train.run", "train.run.main"]),
        ("attacks.pgd", "import train.startup", ["train.startup"]),
        ("attacks.pgd", "from attacks.run.kept import read", ["attacks.run.kept", "attacks.run.kept.read"]),
        ("bench.memory", "from train.cli import Parser\nimport bench.measure", []),
        ("kernels.ops", "from . import forward\nimport torch", []),
    ],
)
def test_the_rule_itself_catches_wrong_directions(module, source, wrong):
    assert forbidden(module, imports_of(source, module.rpartition(".")[0])) == wrong
