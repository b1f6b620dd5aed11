"""What SECURITY.md promises: nothing in a file of data is executed, and no code here opens a way for it."""

import ast
import io
import os
import pickle
import shlex
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.resnet import ResNet18_Weights

import attacks.run.command
import train.run
from train import evaluate

ROOT = Path(__file__).resolve().parent.parent
CODE = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("kernels", "models", "train", "attacks", "bench") for path in sorted((ROOT / folder).rglob("*.py"))
}  # fmt: skip

# Where what a name here stands for is used, and why that is no danger.
KNOWN = {
    ("kernels/interpreter.py", "eval"): "a lambda whose text is made of a range of numbers",
    ("kernels/fusion/analysis.py", "exec"): "what torch.fx writes of the model that is being fused",
    ("bench/measure/snapshot.py", "import pickle"): "writes what PyTorch's viewer of memory reads; loads nothing",
}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What can execute a file's contents or a string: its name, one for each place."""
    modules = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "_pickle"}
    shells = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in modules)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "__import__") or called in shells:
            yield called
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"):
            yield called
        if keywords.get("allow_pickle", "False") != "False":
            yield "allow_pickle"
        if keywords.get("shell", "False") != "False":
            yield "shell=True"


def test_no_code_executes_what_it_reads_but_for_the_known_exceptions():
    assert sorted((path, danger) for path, tree in CODE.items() for danger in dangers(tree)) == sorted(KNOWN)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import yaml", "import shelve", "torch.load(path)",
        "torch.load(path, weights_only=False)", "torch.jit.load(path)", "np.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)", "os.system('ls')", "os.popen('ls')", "eval(text)", "exec(text)",
    ],
)  # fmt: skip
def test_the_search_itself_finds(source):
    assert list(dangers(ast.parse(source)))


# ---------------------------------------------------------------- files that would execute something


class Executed:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.marker))}",)


def plain_pickle(path: Path, harm: Executed) -> None:
    path.write_bytes(pickle.dumps(harm, protocol=2))


def zip_file(path: Path, harm: Executed) -> None:
    torch.save(harm, path)


def nested(path: Path, harm: Executed) -> None:
    torch.save({"format": 2, "settings": {"model": harm}, "classes": ["a"], "model": {"w": torch.zeros(2)}}, path)


def among_the_weights(path: Path, harm: Executed) -> None:
    torch.save({"format": 2, "settings": {}, "classes": ["a"], "model": {"w": torch.zeros(2), "x": harm}}, path)


def legacy(path: Path, harm: Executed) -> None:
    torch.save({"format": 2, "model": harm}, path, _use_new_zipfile_serialization=False)


def legacy_tar(path: Path, harm: Executed) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            raw = pickle.dumps(harm, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))


def torchscript(path: Path, harm: Executed) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


FORMS = (plain_pickle, zip_file, nested, among_the_weights, legacy, legacy_tar, torchscript)
COMMANDS: dict[str, tuple[Callable, list[object]]] = {
    "resume": (train.run.main, ["--resume", "run"]),
    "init": (train.run.main, ["simplenet", "--init", "x.pt", "--conv", "torch", "--out", "new"]),
    "weights": (train.run.main, ["resnet18", "--weights", "x.pt", "--conv", "torch", "--out", "new"]),
    "evaluate": (evaluate.main, ["x.pt"]),
    "pgd": (attacks.run.command.main, ["pgd", "x.pt"]),
    "saliency": (attacks.run.command.main, ["saliency", "x.pt"]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize(
    ("command", "form"),
    [*(("evaluate", form) for form in FORMS), *((command, nested) for command in COMMANDS if command != "evaluate"),
     ("weights", plain_pickle), ("weights", legacy), ("weights", legacy_tar)],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_file_that_would_execute_something_is_refused(command, form, trained_folder, run_main, tmp_path):
    marker = tmp_path / "executed"
    form(tmp_path / "x.pt", Executed(marker))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_bytes((trained_folder / "config.json").read_bytes())
    (tmp_path / "run/last.pt").write_bytes((tmp_path / "x.pt").read_bytes())
    main, arguments = COMMANDS[command]
    options = [] if command == "resume" else ["--device", "cpu"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code, _, err = run_main(main, *arguments, *options)
    assert (code, err.count("\n")) == (2, 1), err
    assert "is damaged" in err
    assert not [warning for warning in told if warning.category is UserWarning]  # they would be lines on stderr
    assert not marker.exists()


@pytest.mark.parametrize("form", [plain_pickle, zip_file, legacy], ids=lambda form: form.__name__)
def test_downloaded_weights_that_were_exchanged_are_refused(form, train_run, tmp_path, monkeypatch):
    """torch.hub takes a file that is there already for the one it downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub/checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    kept.parent.mkdir(parents=True)
    form(kept, Executed(tmp_path / "executed"))
    code, _, err = train_run("resnet18", "--conv", "torch", "--device", "cpu", "--out", "new")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"is damaged (UnpicklingError); delete it from {kept.parent}" in err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("form", FORMS[:-2], ids=lambda form: form.__name__)
def test_the_files_above_do_execute_something_where_they_are_trusted(form, tmp_path):
    """Or the test above would prove nothing. PyTorch refuses the last two forms by itself."""
    form(tmp_path / "x.pt", Executed(tmp_path / "executed"))
    if form is plain_pickle:
        pickle.loads((tmp_path / "x.pt").read_bytes())
    else:
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "executed").exists()
